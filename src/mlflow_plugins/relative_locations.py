"""Read artifact locations that are relative to their store, in every MLflow of this environment.

Athanor's stores name their artifacts `file:mlruns/artifacts/…`, so that they move with their
repository. MLflow takes such a location from the working directory, which is right in the
repository's folder; with this plugin it is right in any folder. MLflow imports the module through
the entry point `mlflow.artifact_repository` in pyproject.toml, so it imports nothing of Athanor.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import url2pathname

SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)(?P<query>\?.*)?", re.DOTALL)


def parse_sqlite(store: str) -> Path | None:
    """Return the file of an SQLite store's URI, relative or absolute; None for any other store."""
    match = SQLITE.fullmatch(store)
    if match is None or match["path"].startswith((":", "file:")):
        return None
    return Path(unquote(match["path"]))  # as SQLAlchemy does


def find_base(database: Path) -> Path:
    """Return the folder that the relative locations in an SQLite file start from.

    It is the repository of its mlruns/mlflow.db, and the file's own folder elsewhere.
    """
    folder = database.absolute().parent
    return folder.parent if folder.name == "mlruns" else folder


def open_artifacts(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> Any:
    """Return MLflow's repository of a `file:` location, made absolute by its store.

    In a server's process the store is the one that it serves.
    """
    from mlflow import get_tracking_uri
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    path = artifact_uri.removeprefix("file:")
    if not path.startswith("/"):
        store = tracking_uri or os.environ.get("_MLFLOW_SERVER_FILE_STORE") or get_tracking_uri()
        database = parse_sqlite(store)
        # A server's client finds the files if it works in the repository of the server's store.
        home = Path(os.environ.get("DVC_ROOT", ".")).absolute()
        base = home if database is None else find_base(database)
        artifact_uri = (base / url2pathname(path)).as_uri()
    return LocalArtifactRepository(artifact_uri, tracking_uri, registry_uri)
