"""Stores that are damaged, locked or emptied by a person: one line, and nothing is lost."""

import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor import files, ui
from athanor.runs import compare, sqlite_store, tracking_store
from athanor.runs.run import start_run
from support import mlflow_store
from support.records import create_run
from support.refused import refused


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder whose name a shell would read otherwise."""
    folder = tmp_path / "a person's"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded store of a repository in the working directory, with nothing in it."""
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "conf").mkdir()
    path = tmp_path / "mlruns/mlflow.db"
    shutil.copyfile(empty_store, path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def come_from_the_future(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = 'f00dfeedbeef'")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_store, "SECONDS_FOR_A_LOCK", 0.01)
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.close()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: path.write_bytes(b"no database " * 1000), "runs.damaged_store"),
        (cut, "runs.damaged_store"),
        (put_folder, "runs.store_is_a_folder"),
        (come_from_the_future, "runs.newer_store"),
        (lock, "runs.locked_store"),
        (lambda path: path.write_bytes(b""), "runs.no_store"),
        (lambda path: path.unlink(), "runs.no_store"),
    ],
)
def test_a_store_that_is_spoilt_is_reported_and_left_as_it_is(
    spoil: Callable[[Path], Any], code: str, store: Path, tmp_path: Path
) -> None:
    spoilt = spoil(store)
    with spoilt if hasattr(spoilt, "__enter__") else nullcontext():
        before = store.read_bytes() if store.is_file() else None
        with refused(code) as caught:
            compare.load_record("ab", tmp_path)
        assert "\n" not in str(caught.value)
        assert before == (store.read_bytes() if store.is_file() else None)


def test_a_store_of_an_older_mlflow_names_the_command_that_upgrades_it(store: Path) -> None:
    with sqlite3.connect(store) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with refused("runs.older_store", path=store):
        tracking_store.connect()


def test_a_training_keeps_the_record_that_a_spoilt_store_cannot_take(
    store: Path, empty_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(store)
    with start_run("tiny", {}, {}, []) as run:
        run.log_metrics(1, {"train_loss": 2.0})
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert "damaged" in warning
    assert "keeps the record" in warning
    store.rename(tmp_path / "damaged.db")
    shutil.copyfile(empty_store, store)
    with start_run("next", {}, {}, []):
        pass
    assert {run.info.run_name for run in mlflow_store.list_runs(tmp_path)} == {"tiny", "next"}


@pytest.mark.parametrize("blocked", ["mlruns", "mlruns/outbox"])
def test_a_training_without_a_place_for_its_record_does_not_start(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    Path(blocked).parent.mkdir(exist_ok=True)
    Path(blocked).write_text("", encoding="utf-8")
    with refused("runs.outbox_unwritable"):
        start_run("tiny", {}, {}, [])


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("MLFLOW_TRACKING_URI", "mlruns", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "./mlruns/mlflow.db", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "/data/mlruns", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "file:///data/mlruns", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "file:mlruns", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "C:\\Users\\me\\mlruns", "runs.folder_as_store"),
        ("MLFLOW_TRACKING_URI", "sqlite://", "runs.store_in_memory"),
        ("MLFLOW_TRACKING_URI", "sqlite:///:memory:", "runs.store_in_memory"),
        ("EXPERIMENT", "x" * 501, "runs.long_name"),
    ],
)
def test_an_address_that_no_store_can_have_is_refused_before_a_training(
    variable: str, value: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if variable == "EXPERIMENT":
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setattr(tracking_store, variable, value)
    else:
        monkeypatch.setenv(variable, value)
    for act in (lambda: start_run("tiny", {}, {}, []), lambda: tracking_store.find_run("ab")):
        with refused(code):
            act()
    assert list(tmp_path.iterdir()) == []


def test_what_was_deleted_in_mlflow_is_named_and_restored(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.cli import cli

    client = tracking_store.connect()
    run, experiment = create_run(run_name="first"), "1"
    client.delete_run(run)

    def restore_as_told() -> None:
        with refused("runs.deleted_run", prefix=run[:9]) as caught:
            compare.load_record(run[:9], tmp_path)
        command = caught.value.facts["command"].split()
        [address] = shlex.split(caught.value.facts["store"])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert CliRunner().invoke(cli, command).exit_code == 0
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert compare.load_record(run[:9], tmp_path).name == "first"

    restore_as_told()
    client.delete_experiment(experiment)
    with refused("ui.deleted_experiment", name="athanor"):
        ui.find_page("http://host", [])
    restore_as_told()

    client.delete_experiment(experiment)
    with start_run("second", {}, {}, []):
        pass
    assert "experiment athanor was deleted in MLflow; it is restored" in capsys.readouterr().err
    names = {one.info.run_name for one in mlflow_store.list_runs(tmp_path)}
    assert names == {"first", "second"}

    # Renamed, it is an experiment of before, whose runs are still found by their ids.
    client.rename_experiment(experiment, "before")
    with start_run("third", {}, {}, []):
        pass
    assert [one.info.run_name for one in mlflow_store.list_runs(tmp_path)] == ["third"]
    assert compare.load_record(run[:9], tmp_path).name == "first"

    # The folder of a run's files was removed by hand.
    shutil.rmtree("mlruns/artifacts", ignore_errors=True)
    assert compare.load_record(run, tmp_path).fetch_artifact("adapters/a.safetensors") is None


@pytest.mark.parametrize("has_store", [False, True])
def test_a_result_from_the_cache_says_where_its_record_is(
    has_store: bool, store: Path, tmp_path: Path
) -> None:
    """Instead of a command that takes the same result from the cache again."""
    if not has_store:
        store.unlink()
    run = "3780998" + "0" * 25
    files.write_json(tmp_path / "artifacts/train/run.json", {"run": "mine", "run_id": run})
    for ask in (
        lambda: compare.load_record(run[:7], tmp_path),
        lambda: compare.load_record("abc", tmp_path),
        *(() if has_store else (tracking_store.require_store,)),
    ):
        with refused("runs.result_without_record", run=run) as caught:
            ask()
        assert "dvc repro --pull" not in str(caught.value)


def test_a_wrong_id_is_answered_before_anything_large_is_imported(store: Path) -> None:
    run = create_run(run_name="the one")
    script = (
        "import sys\n"
        "from athanor import diff, reproduce\n"
        "from athanor.errors import UserError\n"
        "for main, arguments in ((diff.main, [sys.argv[1], '0y']), (reproduce.main, ['0x'])):\n"
        "    sys.argv = ['command', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except UserError as error:\n"
        "        print(error.code, 'the one' in str(error))\n"
        "print({'mlflow', 'mlx', 'mlx_lm', 'transformers', 'pandas'} & {*sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, run], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("runs.no_such_run True\n" * 2 + "set()\n", "")
