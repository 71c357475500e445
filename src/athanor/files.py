"""Files that are either whole or absent, their locks and their digests."""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from athanor.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

# The permissions that new files lack; temporary ones have none for others.
UMASK = os.umask(0o077)
os.umask(UMASK)


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """Yield a file of UTF-8 text under a temporary name, and rename it to `path` at the end.

    The file is kept where the block ends with a UserError, which points at its lines. Any other
    exception leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    user_error: UserError | None = None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            try:
                yield file
            except UserError as error:
                user_error = error
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if user_error is not None:
        raise user_error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, flush it to the disk, and rename it to `path`."""
    with writing(path) as file:
        file.write(text)


def take(finished: Path, path: Path) -> None:
    """Flush a file that was written elsewhere on the same disk, and rename it to `path`."""
    _flush(finished)
    finished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, Chinese as Chinese."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON value on each line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a header and rows as CSV, with line feeds at the ends of its lines."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote."""
    return json.loads(_existing(path).read_text(encoding="utf-8"))


def read_jsonl(path: Path, decode: Callable[[str], Any] = json.loads) -> list[Any]:
    """Read a JSON Lines file that an earlier stage wrote."""
    return list(iterate_jsonl(path, decode))


def iterate_jsonl(path: Path, decode: Callable[[str], Any] = json.loads) -> Iterator[Any]:
    """Yield the values of such a file one at a time: memory may not hold all training rows."""
    with _existing(path).open(encoding="utf-8") as file:
        for line in file:
            yield decode(line)


def count_lines(path: Path) -> int:
    """Return the number of lines of such a file."""
    with _existing(path).open("rb") as file:
        return sum(1 for _ in file)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError("files.absent", path=path, stage=path.parent.name)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, and rename it to `path` when the block succeeds.

    Its files are flushed to the disk first, so that a folder of that name is whole.

    Raises:
        OSError: with errno.ENOSPC also where mlx could not write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o777 & ~UMASK)
    try:
        yield temporary
        for inside in [*temporary.iterdir(), temporary]:
            _flush(inside)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError):  # of files that nobody finds under their temporary name
            error.rename(temporary, path)
        if isinstance(error, RuntimeError) and "Unable to write" in str(error):
            # mlx's writer gives no other sign of a full disk.
            raise OSError(errno.ENOSPC, str(error), str(path)) from error
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path) -> "FileLock":
    """Return a lock for a `with` block: processes wait for each other, and a kill ends a lock."""
    from filelock import FileLock  # imports asyncio, which most commands need not

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False)


def try_lock(path: Path) -> "FileLock | None":
    """Take a lock and return it; None where another process has it.

    It ends with `release`, or with this process.
    """
    from filelock import Timeout

    try:
        return lock(path).acquire(blocking=False).lock
    except Timeout:
        return None


def digest(paths: Iterable[Path]) -> str:
    """Return the sha256 of the names and contents of files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()
