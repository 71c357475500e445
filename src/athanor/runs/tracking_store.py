"""MLflow's tracking store: connecting to it, finding runs, reporting its errors.

MLflow takes seconds to import, so it is imported only where it is used.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from athanor import files, switches
from athanor.errors import UserError
from athanor.paths import Workspace

EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "athanor")


def uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of the SQLite store in mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Workspace.here().runs}/mlflow.db"


def shown_uri() -> str:
    """Return the tracking URI without its password."""
    return hide_passwords(uri())


def journal_store() -> str:
    """Return the name of the store in journals; the embedded one moves with the repository."""
    return shown_uri() if os.environ.get("MLFLOW_TRACKING_URI") else "embedded"


def is_server() -> bool:
    """Return whether the store is a server's, and not a database."""
    return uri().startswith(("http://", "https://"))


def sqlite_path() -> Path | None:
    """Return the file of an SQLite store, None for any other store."""
    return Path(uri().removeprefix("sqlite:///")) if uri().startswith("sqlite:///") else None


def hold_lock() -> AbstractContextManager[Any]:
    """Return a lock on an SQLite store for a `with` block, nothing for any other store."""
    path = sqlite_path()
    return nullcontext() if path is None else files.lock(path.parent / ".lock")


def connect() -> Any:
    """Return an MlflowClient of the store.

    One process creates the embedded store while others wait. A database gets its name when its
    schema is complete, because MLflow cannot repair one whose creation was interrupted.
    """
    switches.configure_mlflow()
    from mlflow import MlflowClient

    if is_server():
        return MlflowClient(uri())
    if (path := sqlite_path()) is None:
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 0  # no setting shortens its retries of a minute or more
        return MlflowClient(uri())
    with hold_lock():
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        client = MlflowClient(uri())
        ensure_experiment(client, EXPERIMENT)
    return client


def ensure_experiment(client: Any, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    embedded = not os.environ.get("MLFLOW_TRACKING_URI")
    location = (Workspace.here().runs / "artifacts").as_uri() if embedded else None
    # Without its kind MLflow's UI opens an experiment as one of prompts and traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=tags))
    except Exception:
        # Of several processes that start at once on a server, one creates it.
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return str(experiment.experiment_id)


def require_store() -> None:
    """Refuse an SQLite store that does not exist, which `connect` would create.

    Raises:
        UserError: if it does not exist.
    """
    path = sqlite_path()
    if path is None or path.exists():
        return
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
        raise UserError(
            "runs.store_failed", store=shown_uri(), error=summarize_error(error)
        ) from None


@report_errors()
def find_run(prefix: str) -> Any:
    """Return MLflow's run whose id begins with `prefix`, as git finds commits.

    Raises:
        UserError: if no run or several begin so, or the store is missing or unreachable.
    """
    require_store()
    client = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    matches = (
        client.search_runs(
            experiments,
            filter_string=f"attributes.run_id LIKE '{prefix.lower()}%'",
            max_results=5,
        )
        if re.fullmatch(r"[0-9a-fA-F]+", prefix)
        else []
    )
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError("runs.ambiguous_run", prefix=prefix, runs=list_runs(matches))
    latest = client.search_runs(experiments, max_results=5, order_by=["attributes.start_time DESC"])
    if not latest:
        raise UserError("runs.no_runs", store=shown_uri())
    raise UserError("runs.no_such_run", prefix=prefix, store=shown_uri(), runs=list_runs(latest))


def list_runs(runs: list[Any]) -> str:
    """Return a line for each run: its id, name and status."""
    return "\n  ".join(
        f"{run.info.run_id}  {run.info.run_name} ({run.info.status})" for run in runs
    )


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
    """Return an exception's type and first line without passwords."""
    lines = hide_passwords(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
