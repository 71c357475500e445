"""MLflow's tracking store: connecting to it, finding runs, reporting its errors.

MLflow takes seconds to import, so it is imported only where it is used.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from athanor import console, files, switches
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import sqlite_store
from athanor.runs.sqlite_store import RunSummary
from mlflow_plugins.relative_locations import find_base, open_artifacts, parse_sqlite

EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or "athanor"
LONGEST_NAME = 500  # MLflow's own limit
EMBEDDED, DEFAULT = "embedded", Path("mlruns/mlflow.db")
# Names of stores that MLflow takes for a folder, in which it no longer keeps runs.
FOLDER = re.compile(r"file:.*|[A-Za-z]:[\\/].*|(?!databricks|uc$)[^:]*")


def uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of the SQLite store in mlruns/.

    The file of an SQLite store is named by its absolute path: a relative one starts from the
    repository's main folder, where a queued experiment does not run.
    """
    given = _given_uri() or f"sqlite:///{DEFAULT}"
    if (path := parse_sqlite(given)) is None:
        return given
    path = Path(os.path.normpath(Workspace.here().home / path))
    return _make_uri(path) + "".join(given.partition("?")[1:])


def _make_uri(path: Path) -> str:
    """Return the URI of an SQLite file.

    SQLAlchemy decodes it, and MLflow makes the folders of what is not decoded. So a path with
    characters that would be encoded is named from the working directory.
    """
    name = os.path.relpath(path) if re.search("[%?]", str(path)) else str(path)
    return f"sqlite:///{name.replace('%', '%25').replace('?', '%3F')}"


def _given_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip()


def shown_uri() -> str:
    """Return the tracking URI without its password."""
    return hide_passwords(uri())


def uri_in_command() -> str:
    """Return the tracking URI without its password, as a shell reads it."""
    return shlex.quote(shown_uri())


def journal_store() -> str:
    """Return the name of the store in journals."""
    return name_store(uri())


def name_store(store: str) -> str:
    """Return the name that journals have for a store; inside the repository it moves with it."""
    if (path := parse_sqlite(store)) is None:
        return hide_passwords(store).rstrip("/")
    home = Workspace.here().home
    path = Path(os.path.normpath(home / path))
    if os.path.realpath(path) == os.path.realpath(home / DEFAULT):
        return EMBEDDED
    return f"sqlite:///{path.relative_to(home) if path.is_relative_to(home) else path}"


def is_given() -> bool:
    """Return whether a person named the store, which is not the default then."""
    return bool(_given_uri())


def has_answered(name: str) -> bool:
    """Return whether a store of that name has ever answered in this repository."""
    path = Workspace.here().answered
    return path.exists() and name in path.read_text(encoding="utf-8").splitlines()


def note_answer() -> None:
    """Note that the store answers, so that records of it wait for it from now on."""
    if (name := journal_store()) == EMBEDDED or has_answered(name):
        return
    path = Workspace.here().answered
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def check_settings() -> None:
    """Refuse an address or the name of an experiment that no store of MLflow's can have.

    Raises:
        UserError: if MLFLOW_TRACKING_URI is a folder or a database in memory, or
            MLFLOW_EXPERIMENT_NAME is too long.
    """
    given = _given_uri()
    if given and FOLDER.fullmatch(given):
        raise UserError("runs.folder_as_store", uri=given)
    if re.match(r"sqlite(\+\w+)?:(//)?/?(:memory:|\?|$)", given):
        raise UserError("runs.store_in_memory", uri=given)
    if len(EXPERIMENT) > LONGEST_NAME:
        raise UserError("runs.long_name", length=len(EXPERIMENT), limit=LONGEST_NAME)


def is_server() -> bool:
    """Return whether the store is a server's, and not a database."""
    return uri().startswith(("http://", "https://"))


def sqlite_path() -> Path | None:
    """Return the file of an SQLite store, None for any other store."""
    path = parse_sqlite(uri())
    return None if path is None else Path(os.path.normpath(Path.cwd() / path))


def hold_lock() -> AbstractContextManager[Any]:
    """Return a lock on an SQLite store for a `with` block, nothing for any other store.

    One that this process can only read needs none.
    """
    path = sqlite_path()
    if path is None or (path.exists() and not os.access(path.parent, os.W_OK)):
        return nullcontext()
    return files.lock(path.parent / ".lock")


def connect() -> Any:
    """Return an MlflowClient of the store.

    One process creates the embedded store while others wait. A database gets its name when its
    schema is complete, because MLflow cannot repair one whose creation was interrupted.

    Raises:
        UserError: if the address cannot be a store's, or the file is none that MLflow can use.
    """
    check_settings()
    path = sqlite_path()
    if path is not None and sqlite_store.exists(path):
        sqlite_store.check(path)
    switches.configure_mlflow()
    from mlflow import MlflowClient
    from mlflow.store.artifact import artifact_repository_registry as registry

    # The plugin of an environment that was installed before is not known to MLflow.
    registry.get_registered_artifact_repositories()["file"] = open_artifacts
    if is_server():
        return MlflowClient(uri())
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 0  # no setting shortens its retries of a minute or more
    utils._logger.setLevel("CRITICAL")  # else tracebacks of errors that are reported here
    if path is None:
        return MlflowClient(uri())
    with hold_lock():
        if not sqlite_store.exists(path):
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(_make_uri(new)).search_experiments(max_results=1)
            new.replace(path)
        _make_locations_relative(path)
        try:
            client = MlflowClient(uri())
        except Exception as error:
            raise sqlite_store.explain(error, path) or error from None
        if client.get_experiment_by_name(EXPERIMENT) is None:
            ensure_experiment(client, EXPERIMENT)
    return client


def _make_locations_relative(path: Path) -> None:
    """Make the locations of a repository's own store follow the repository."""
    if path.parent.name == "mlruns" or path.is_relative_to(Workspace.here().home):
        sqlite_store.make_locations_relative(path, find_base(path))


def ensure_experiment(client: Any, name: str) -> str:
    """Return the id of an experiment, created if it does not exist, restored if it was deleted."""
    path = sqlite_path()
    if (experiment := client.get_experiment_by_name(name)) is not None:
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
            console.warn(f"experiment {name} was deleted in MLflow; it is restored with its runs")
        if path is not None and experiment.artifact_location.startswith("mlflow-artifacts:"):
            sqlite_store.keep_files_here(path, name)
        return str(experiment.experiment_id)
    # MLflow's default is in the working directory, which a queued experiment removes.
    location = (Workspace.here().runs / "artifacts").as_uri() if path is not None else None
    # Without its kind MLflow's UI opens an experiment as one of prompts and traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        created = str(client.create_experiment(name, artifact_location=location, tags=tags))
    except Exception:
        # Of several processes that start at once on a server, one creates it.
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return str(experiment.experiment_id)
    if path is not None:
        _make_locations_relative(path)
    return created


def require_store() -> None:
    """Refuse an SQLite store that does not exist, which `connect` would create.

    Raises:
        UserError: if it does not exist.
    """
    check_settings()
    path = sqlite_path()
    if path is None or sqlite_store.exists(path):
        return
    refuse_result_without_record("")
    if os.environ.get("MLFLOW_TRACKING_URI") or (Workspace.here().home / "conf").is_dir():
        raise UserError("runs.no_store", store=shown_uri())
    raise UserError("runs.no_store_in_this_folder", store=shown_uri())


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn any exception of the block into an error of one line without passwords.

    Raises:
        UserError: for any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        path = sqlite_path()
        raise (sqlite_store.explain(error, path) if path is not None else None) or UserError(
            "runs.store_failed", store=shown_uri(), error=summarize_error(error)
        ) from None


@report_errors()
def find_run(prefix: str) -> Any:
    """Return MLflow's run whose id begins with `prefix`, as git finds commits.

    Raises:
        UserError: if no run or several begin so, or the store is missing or unreachable.
    """
    run_id = find_run_id(prefix)
    return connect().get_run(run_id)


@report_errors()
def find_run_id(prefix: str) -> str:
    """Return the id of the run that begins with `prefix`; an SQLite store needs no MLflow for it.

    Raises:
        UserError: as find_run does.
    """
    require_store()
    runs = _list_latest(prefix.lower(), 6)
    present = [run for run in runs if not run.restore]
    if len(present) == 1:
        return present[0].id
    if present:
        raise UserError("runs.ambiguous_run", prefix=prefix, runs=list_runs(present[:5]))
    if runs:
        raise UserError(
            "runs.deleted_run",
            prefix=prefix,
            store=uri_in_command(),
            command=runs[0].restore,
            runs=list_runs(runs),
        )
    refuse_result_without_record(prefix)
    latest = [run for run in _list_latest("", 5) if not run.restore]
    if not latest:
        refuse_result_without_record("")
        raise UserError("runs.no_runs", store=shown_uri())
    raise UserError("runs.no_such_run", prefix=prefix, store=shown_uri(), runs=list_runs(latest))


def _list_latest(prefix: str, limit: int) -> list[RunSummary]:
    """Return the latest runs whose ids begin with `prefix`, deleted ones last."""
    if (path := sqlite_path()) is not None:
        sqlite_store.check(path)
        return sqlite_store.find_runs(path, prefix, limit)
    if not re.fullmatch("[0-9a-f]*", prefix):
        return []
    client, every = connect(), 3  # MLflow's ViewType.ALL
    experiments = {
        experiment.experiment_id: experiment.lifecycle_stage == "deleted"
        for experiment in client.search_experiments(view_type=every)
    }
    runs = client.search_runs(
        list(experiments),
        filter_string=f"attributes.run_id LIKE '{prefix}%'",
        run_view_type=every,
        max_results=limit,
        order_by=["attributes.start_time DESC"],
    )
    summaries = [summarize_run(run, experiments[run.info.experiment_id]) for run in runs]
    return sorted(summaries, key=lambda run: bool(run.restore))


def refuse_result_without_record(prefix: str) -> None:
    """Refuse a run whose result is in artifacts/ and whose record is not in this store.

    Raises:
        UserError: if artifacts/train is of a run whose id begins with `prefix`.
    """
    path = Workspace.here().trained / "run.json"
    run_id = files.read_json(path)["run_id"] if path.exists() else None
    if run_id is not None and run_id.startswith(prefix.lower()):
        raise UserError("runs.result_without_record", run=run_id, store=shown_uri())


def summarize_run(run: Any, experiment_deleted: bool = False) -> RunSummary:
    """Return MLflow's run as a line of a list."""
    info = run.info
    deleted = (info.lifecycle_stage == "deleted", experiment_deleted)
    restore = sqlite_store.restore_command(info.run_id, info.experiment_id, *deleted)
    return RunSummary(info.run_id, info.run_name, info.status, restore)


def list_runs(runs: list[RunSummary]) -> str:
    """Return a line for each run: its id, name and status."""
    return "\n  ".join(map(str, runs))


def list_finished_children(run_id: str) -> list[str]:
    """Return our names of the finished child runs of a run."""
    client = connect()
    experiment = client.get_run(run_id).info.experiment_id
    children = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'"
    names: list[str] = []
    token = None
    while True:
        page = client.search_runs([experiment], filter_string=children, page_token=token)
        names += [run.data.tags["athanor.run"] for run in page if "athanor.run" in run.data.tags]
        if not (token := page.token):
            return names


def hide_passwords(text: str) -> str:
    """Return a text without the passwords of its URIs, before the host or in the query."""
    # Up to the last @: people write / and @ unescaped. A driver quotes what it took for a host.
    text = re.sub(r"(//|')\S*@", r"\1", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token|sslpassword)=)[^&\s]*", r"\1…", text)


def summarize_error(error: Exception) -> str:
    """Return an exception's type and first line without passwords; of a UserError the line."""
    lines = hide_passwords(str(error)).strip().splitlines()
    if isinstance(error, UserError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
