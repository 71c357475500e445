"""Records follow their repository: in place, moved, copied, in any folder and from any folder."""

import shutil
import sqlite3
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.server import app, handlers
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking._tracking_service import utils

from athanor.runs import compare, sqlite_store, tracking_store
from athanor.runs.run import Run, send_left_journals, start_run
from support import mlflow_store

ADAPTERS = "adapters/adapters.safetensors"
# Characters that a URI, SQLAlchemy or a shell gives a meaning to, in the repository's own path.
ODD = "用户 项目#1%41?&'é"


def start(name: str) -> Run:
    return start_run("tiny lora", {"seed": 0}, {}, [], run=name)


def log_adapters(run: Run, text: str) -> None:
    path = Path("adapters/adapters.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    run.log_artifact(path.parent, "adapters")
    shutil.rmtree(path.parent)


class Recorded(NamedTuple):
    """A repository with a run that has adapters, a model and a version of a registered model."""

    folder: Path
    run: str
    model: str


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "mlruns").mkdir()
    shutil.copyfile(empty_store, folder / "mlruns/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with start("mine") as run:
            log_adapters(run, "first")
        client = tracking_store.connect()
        experiment = client.get_run(str(run.id)).info.experiment_id
        model = client.create_logged_model(experiment, "fused", source_run_id=run.id)
        (folder / "model").mkdir()
        (folder / "model/MLmodel").write_text("a model", encoding="utf-8")
        client.log_model_artifacts(model.model_id, str(folder / "model"))
        client.create_registered_model("facts")
        client.create_model_version(
            "facts", model.artifact_location, run.id, model_id=model.model_id
        )
    return Recorded(folder, str(run.id), model.model_id)


def make_old(folder: Path, home: Path) -> None:
    """Make a store one that was recorded in `home` by a version with absolute locations."""
    with sqlite3.connect(folder / "mlruns/mlflow.db") as database:
        for table, column in sqlite_store.LOCATIONS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, 6) "
                f"WHERE {column} LIKE 'file:mlruns%'",
                (f"{home.as_uri()}/",),
            )


def absolute_locations(folder: Path) -> list[str]:
    """Return all but that of the experiment `Default`, from where the empty store was made."""
    with sqlite3.connect(folder / "mlruns/mlflow.db") as database:
        return [
            location
            for table, column in sqlite_store.LOCATIONS
            for (location,) in database.execute(f"SELECT {column} FROM {table}")
            if location and not location.startswith("file:mlruns") and location[-9:] != "/mlruns/0"
        ]


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fetch_by_mlflow(store: str, run: str, into: Path) -> str:
    path = mlflow.artifacts.download_artifacts(
        run_id=run, artifact_path=ADAPTERS, tracking_uri=store, dst_path=str(into)
    )
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's cache of places by run: here one run is in many places."""
    monkeypatch.setattr(utils, "_artifact_repos_cache", OrderedDict())


def ask_page(monkeypatch: pytest.MonkeyPatch, store: str, recorded: Recorded) -> list[str]:
    """Return what MLflow's page gets: the list, the adapters of the run, the file of the model."""
    monkeypatch.setattr(handlers, "_tracking_store", None)
    monkeypatch.setattr(handlers, "_model_registry_store", None)
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
    page = app.test_client()
    listed = page.get(f"/ajax-api/2.0/mlflow/artifacts/list?run_id={recorded.run}&path=adapters")
    files = page.get(f"/get-artifact?path={ADAPTERS}&run_uuid={recorded.run}")
    model = page.get(
        f"/ajax-api/2.0/mlflow/logged-models/{recorded.model}/artifacts/files"
        "?artifact_file_path=MLmodel"
    )
    mlflow.set_tracking_uri(None)  # the server's store became the process's
    return [listed.json["files"][0]["path"], files.text, model.text]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("way", ["in place", "moved", "copied", "copied again"])
def test_a_record_is_read_wherever_its_repository_is(
    way: str, old: bool, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / ODD
    if way == "in place":
        before = after
    shutil.copytree(recorded.folder, before)
    if old:
        make_old(before, before)
        assert len(absolute_locations(before)) == 5
    if way == "moved":
        before.rename(after)
    elif way != "in place":
        between = tmp_path / "between"
        shutil.copytree(before, between)
        if way == "copied again":  # what it was copied from is gone
            shutil.copytree(between, after)
            shutil.rmtree(between)
        else:
            between.rename(after)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(after)
    store = tracking_store.uri()
    if not old:
        # By MLflow alone, before a command of ours has opened it.
        with pytest.MonkeyPatch.context() as patch:
            plain = get_registered_artifact_repositories()
            patch.setitem(plain, "file", LocalArtifactRepository)
            assert fetch_by_mlflow(store, recorded.run, tmp_path) == "first"
            assert ask_page(patch, store, recorded) == [ADAPTERS, "first", "a model"]
    there = read_all(before) if before.exists() else {}
    record = compare.load_record(recorded.run[:9], tmp_path / "fetched")
    record.folder.mkdir()
    path = record.fetch_artifact(ADAPTERS)
    assert path is not None and path.read_text(encoding="utf-8") == "first"
    assert absolute_locations(after) == []
    assert ask_page(monkeypatch, store, recorded) == [ADAPTERS, "first", "a model"]
    # It goes on here, and what it was copied from stays as it is.
    with start("mine") as run:
        log_adapters(run, "second")
    with start("new") as new:
        log_adapters(new, "third")
    assert run.id == recorded.run
    if after != before and before.exists():
        assert read_all(before) == there
    monkeypatch.chdir(tmp_path)  # by the address of the store, from any folder
    for run_id, text in ((recorded.run, "second"), (str(new.id), "third")):
        path = after / f"mlruns/artifacts/{run_id}/artifacts" / ADAPTERS
        assert path.read_text(encoding="utf-8") == text
    store = f"sqlite:///{after}/mlruns/mlflow.db".replace("%", "%25").replace("?", "%3F")
    assert MlflowClient(store).get_run(recorded.run).info.artifact_uri.startswith("file:mlruns/")
    (tmp_path / "again").mkdir()
    assert fetch_by_mlflow(store, recorded.run, tmp_path / "again") == "second"


def test_a_run_goes_on_while_its_repository_is_copied(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the copy it ended when the copy was made; each has its own files."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    shutil.copytree(recorded.folder, original)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(original)
    with start("other") as run:
        assert run.wait_for_id()
        shutil.copytree(original, copy)
        monkeypatch.chdir(copy)
        send_left_journals()
        monkeypatch.chdir(original)
        log_adapters(run, "later")
    states = {
        folder.name: mlflow_store.connect(folder).get_run(run.id).info.status
        for folder in (original, copy)
    }
    assert states == {"original": "FINISHED", "copy": "KILLED"}
    assert list((copy / "mlruns/outbox").iterdir()) == []
    adapters = Path(f"mlruns/artifacts/{run.id}/artifacts", ADAPTERS)
    assert [(folder / adapters).exists() for folder in (original, copy)] == [True, False]


def test_an_experiment_that_was_created_on_mlflows_page_gets_files(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow ui` gives it a place that only a server can write."""
    home = tmp_path / "home"
    shutil.copytree(recorded.folder, home)
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking_store, "EXPERIMENT", "page")
    client = mlflow_store.connect(home)
    client.create_experiment("page", artifact_location="mlflow-artifacts:/2")
    with start("of the page") as run:
        log_adapters(run, "here")
    assert mlflow_store.fetch_artifact(home, run.id, ADAPTERS).read_text() == "here"


def test_files_that_a_person_keeps_elsewhere_stay_there(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another disk can have folders of the same names, and a bucket has no path."""
    home, disk = tmp_path / "home", tmp_path / "disk"
    shutil.copytree(recorded.folder, home)
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    locations = [(disk / "mlruns/artifacts").as_uri(), f"{disk}/runs", "s3://bucket/mlruns"]
    (disk / "mlruns/artifacts").mkdir(parents=True)
    client = tracking_store.connect()
    for location in locations:
        client.create_experiment(location, artifact_location=location)
    assert absolute_locations(home) == locations
    tracking_store.connect()
    assert absolute_locations(home) == locations


@pytest.mark.parametrize("seen", [True, False])
def test_a_place_that_is_absent_is_a_former_one_if_its_files_are_here(
    seen: bool, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is a disk that is not mounted now, and its records wait for it."""
    home = tmp_path / "home"
    shutil.copytree(recorded.folder, home)
    # A path that cannot be looked at stands for another user's home.
    former, disk = tmp_path / ("former" if seen else "f" * 300), tmp_path / "disk"
    make_old(home, former)
    monkeypatch.chdir(home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with sqlite3.connect("mlruns/mlflow.db") as database:
        place = f"{disk}/mlruns/artifacts/of the disk/artifacts"
        columns = "run_uuid, name, status, experiment_id, lifecycle_stage, artifact_uri"
        database.execute(
            f"INSERT INTO runs ({columns}) VALUES ('{'d' * 32}', 'd', 'FINISHED', 1, 'active', ?)",
            (place,),
        )
    tracking_store.connect()
    assert absolute_locations(home) == [place]


HERE = "sqlite:///mlruns/mlflow.db"


@pytest.mark.parametrize(
    ("given", "name", "file"),
    [
        (None, "embedded", "mlruns/mlflow.db"),
        ("", "embedded", "mlruns/mlflow.db"),
        (HERE, "embedded", "mlruns/mlflow.db"),
        (f" {HERE}\n", "embedded", "mlruns/mlflow.db"),
        ("sqlite:///./mlruns/../mlruns/mlflow.db", "embedded", "mlruns/mlflow.db"),
        ("sqlite+pysqlite:///mlruns/mlflow.db", "embedded", "mlruns/mlflow.db"),
        (f"{HERE}?timeout=30", "embedded", "mlruns/mlflow.db"),
        ("sqlite:///{home}/mlruns/mlflow.db", "embedded", "mlruns/mlflow.db"),
        ("sqlite:///runs.db", "sqlite:///runs.db", "runs.db"),
        ("sqlite:///{home}/runs.db", "sqlite:///runs.db", "runs.db"),
        ("sqlite:///a/runs%20of%20us.db", "sqlite:///a/runs of us.db", "a/runs of us.db"),
        ("sqlite:////elsewhere/runs.db", "sqlite:////elsewhere/runs.db", "/elsewhere/runs.db"),
        ("http://me:secret@host:5000", "http://host:5000", None),
        ("http://host:5000/", "http://host:5000", None),
    ],
)
def test_a_relative_address_is_the_repositorys(
    given: str | None,
    name: str,
    file: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a queued experiment, which works in a folder that is thrown away."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "queued").mkdir()
    monkeypatch.chdir(tmp_path / "queued")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given.format(home=tmp_path))
    assert tracking_store.journal_store() == name
    assert tracking_store.sqlite_path() == (tmp_path / file if file else None)
    assert tracking_store.uri().endswith("?timeout=30") == ("timeout" in (given or ""))


@pytest.mark.parametrize("given", [None, HERE, "sqlite:///runs.db"])
def test_a_queued_experiment_records_in_the_repository(
    given: str | None,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, queued = tmp_path / "home", tmp_path / "home/.dvc/tmp/exps/a"
    (home / "mlruns").mkdir(parents=True)
    queued.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.chdir(queued)
    shutil.copyfile(empty_store, str(tracking_store.sqlite_path()))
    with start("queued") as run:
        log_adapters(run, "queued")
    assert [path for path in queued.rglob("*") if path.is_file()] == []
    assert (home / f"mlruns/artifacts/{run.id}/artifacts" / ADAPTERS).read_text() == "queued"
    monkeypatch.chdir(home)
    adapters = mlflow_store.fetch_artifact(tracking_store.uri(), run.id, ADAPTERS)
    assert adapters.read_text(encoding="utf-8") == "queued"


def test_a_client_of_a_server_writes_into_its_own_repository(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a queued experiment: the server names a place that is relative to the repository."""
    from mlflow_plugins.relative_locations import open_artifacts

    location = f"file:mlruns/artifacts/{recorded.run}/artifacts"
    monkeypatch.setenv("DVC_ROOT", str(recorded.folder))
    monkeypatch.chdir(tmp_path)
    repository: Any = open_artifacts(location, tracking_uri="http://127.0.0.1:9")
    assert [file.path for file in repository.list_artifacts("adapters")] == [ADAPTERS]
