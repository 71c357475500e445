"""The file of an SQLite store, read and repaired without MLflow, which takes seconds to import."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote

from athanor.errors import UserError

# Columns that tell where files are.
LOCATIONS = (
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("logged_models", "artifact_location"), ("trace_tags", "value")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)
# As a store of Athanor's or MLflow's own default names them: in the folder mlruns of a repository.
INSIDE = re.compile(r"(?:file:(?://(?:localhost)?)?)?(?P<home>/.*)/(?P<tail>mlruns(?:/.*)?)")
SECONDS_FOR_A_LOCK = 5


@dataclass(frozen=True)
class RunSummary:
    """A line of a list of runs.

    `restore` has the arguments of MLflow's command that restores a deleted one.
    """

    id: str
    name: str
    status: str
    restore: str = ""

    def __str__(self) -> str:
        return f"{self.id}  {self.name} ({self.status})"


def restore_command(run: str, experiment: int | str, run_deleted: bool, deleted: bool) -> str:
    """Return the arguments that restore a run, or its experiment with all runs if `deleted`."""
    if deleted:
        return f"experiments restore --experiment-id {experiment}"
    return f"runs restore --run-id {run}" if run_deleted else ""


def exists(path: Path) -> bool:
    """Return whether there is a database; an empty file is one that nobody has created yet."""
    return path.is_dir() or (path.exists() and path.stat().st_size > 0)


def check(path: Path) -> None:
    """Refuse a file that MLflow cannot use: a folder, damaged, locked, of a newer MLflow.

    Raises:
        UserError: with the remedy.
    """
    if path.is_dir():
        raise UserError("runs.store_is_a_folder", path=path)
    with read(path) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if "alembic_version" not in tables:
            return  # of something else; MLflow adds its tables
        [version] = database.execute("SELECT version_num FROM alembic_version").fetchone() or [""]
    spec = find_spec("mlflow")
    if version and spec is not None and spec.submodule_search_locations:
        migrations = Path(spec.submodule_search_locations[0], "store/db_migrations/versions")
        if not any(migrations.glob(f"{version}_*.py")):
            raise UserError("runs.newer_store", path=path, version=version)


@contextmanager
def read(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection that only reads.

    Raises:
        UserError: if the file is damaged or locked, or cannot be read.
    """
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=SECONDS_FOR_A_LOCK)
        with closing(connection) as database:
            yield database
    except sqlite3.Error as error:
        raise explain(error, path) or UserError(
            "runs.unreadable_store", path=path, error=error
        ) from None


def explain(error: BaseException, path: Path) -> UserError | None:
    """Return what a person can do about an error of SQLite's or MLflow's; None if it is other."""
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return UserError("runs.damaged_store", path=path)
    if "is locked" in text:
        return UserError("runs.locked_store", path=path)
    if "out-of-date database schema" in text:
        return UserError("runs.older_store", path=path)
    if "readonly database" in text:
        return UserError("runs.read_only_store", path=path)
    return None


def find_runs(path: Path, prefix: str, limit: int) -> list[RunSummary]:
    """Return the latest runs whose ids begin with `prefix`, deleted ones last."""
    query = (
        "SELECT run_uuid, runs.name, status, experiment_id, runs.lifecycle_stage = 'deleted', "
        "experiments.lifecycle_stage = 'deleted' FROM runs JOIN experiments USING (experiment_id) "
        "WHERE substr(run_uuid, 1, ?) = ? ORDER BY start_time DESC"
    )
    with read(path) as database:
        try:
            rows = database.execute(query, (len(prefix), prefix)).fetchall()
        except sqlite3.OperationalError as error:
            if "no such" not in str(error):
                raise
            return []  # a database without MLflow's tables, or with those of a very old one
    runs = [
        RunSummary(run, name or "", status, restore_command(run, *place))
        for run, name, status, *place in rows
    ]
    return sorted(runs, key=lambda run: bool(run.restore))[:limit]


def make_locations_relative(path: Path, base: Path) -> None:
    """Make the locations below the folder `base` relative to it.

    Those of the place that the store was moved or copied from become this place's, except of files
    that are there and not here, and of a place that is absent and of which no file is here, such as
    a disk that is not mounted. A database that cannot be written stays as it is.
    """
    locations: list[tuple[str, int, str, Path]] = []  # with the former home and the rest
    with read(path) as database:
        for table, column in LOCATIONS:
            for row, location in _list_absolute(database, table, column):
                if match := INSIDE.fullmatch(location):
                    encoded = location.startswith("file:")
                    home, tail = (
                        unquote(match[name]) if encoded else match[name]
                        for name in ("home", "tail")
                    )
                    locations.append((f"{table}.{column}", row, tail, Path(home)))
    of_files = [place for place in locations if not place[0].startswith("experiments.")]
    moved = {home for _, _, tail, home in of_files if _exists(base / tail)}
    former = {home: _is_former(home, base, path) for *_, home in locations}
    changes: list[tuple[str, str, int]] = []
    for column, row, tail, home in locations:
        if column.startswith("experiments.") or _exists(base / tail):
            follows = former[home] or not _exists(home / "mlruns")
        else:
            follows = not _exists(home / tail) and (former[home] or home in moved)
        if follows:
            changes.append((column, f"file:{quote(tail)}", row))
    if changes:
        with suppress(sqlite3.OperationalError):
            _write(path, changes)


def keep_files_here(path: Path, experiment: str) -> None:
    """Give an experiment that was created on a page of `mlflow ui` a place that needs no server.

    Its earlier runs stay where they are.
    """
    change = (
        "UPDATE experiments SET artifact_location = 'file:mlruns/artifacts' "
        "WHERE name = ? AND artifact_location LIKE 'mlflow-artifacts:%'"
    )
    with closing(sqlite3.connect(path, timeout=SECONDS_FOR_A_LOCK)) as database, database:
        database.execute(change, (experiment,))


def _list_absolute(database: sqlite3.Connection, table: str, column: str) -> list[tuple[int, str]]:
    where = "AND key = 'mlflow.artifactLocation'" if table == "trace_tags" else ""
    try:
        return database.execute(
            f"SELECT rowid, {column} FROM {table} "
            f"WHERE ({column} LIKE '/%' OR {column} LIKE 'file:/%') {where}"
        ).fetchall()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):
            raise
        return []  # an older MLflow has no such table


def _is_former(home: Path, base: Path, path: Path) -> bool:
    """Return whether `home` is the repository itself, or has a store with this file as well.

    A folder of another disk that a person chose for artifacts has no database.
    """
    return home.resolve() == base.resolve() or _exists(home / path.relative_to(base))


def _exists(path: Path) -> bool:
    """Return whether a path exists; False where nobody can see that, as in another user's home."""
    try:
        return path.exists()
    except OSError:
        return False


def _write(path: Path, changes: list[tuple[str, str, int]]) -> None:
    with closing(sqlite3.connect(path, timeout=SECONDS_FOR_A_LOCK)) as database, database:
        for place, location, row in changes:
            table, _, column = place.partition(".")
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (location, row))
