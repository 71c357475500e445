"""The locks of stages: one process writes a stage's folder, and none while others read it.

They lie beside the folders, because DVC deletes a stage's outputs before it runs. The system frees
the locks of a process that ends, however it ends. A disk that has no locks is used without them.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from athanor.errors import UserError
from athanor.paths import Workspace

STAGES = ("prepare", "train", "test", "fuse")
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # some network disks


@contextmanager
def stage(name: str | None, *inputs: str) -> Iterator[None]:
    """Hold a stage's folder for writing, and those of its inputs for reading; decorates a main.

    Removes what stages that were killed left under temporary names.

    Args:
        name: the stage whose folder this process writes, None for a command beside the pipeline.
        inputs: the stages whose folders it reads.

    Raises:
        UserError: while another process uses them.
    """
    artifacts = Workspace.here().artifacts
    if name is None and not artifacts.exists():
        yield
        return
    artifacts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if name is not None:
            held.enter_context(_hold(artifacts, name, fcntl.LOCK_EX))
        for read in inputs:
            held.enter_context(_hold(artifacts, read, fcntl.LOCK_SH))
        _remove_leftovers(artifacts, name)
        yield


@contextmanager
def _hold(artifacts: Path, stage: str, kind: int) -> Iterator[None]:
    path = artifacts / ".locks" / stage
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (*HELD, *NO_LOCKS):
                raise
            if error.errno in HELD:
                file.seek(0)
                raise UserError(
                    "locks.in_use",
                    folder=artifacts / stage,
                    processes=_list_running(file.read()) or "an unknown one",
                ) from None
        if kind == fcntl.LOCK_EX:
            file.truncate(0)
        command = " ".join(" ".join(sys.orig_argv).split())
        file.write(f"{os.getpid()} {command.partition(' -m ')[2] or command}\n")
        file.flush()
        yield


def _list_running(users: str) -> list[str]:
    """Return the processes of a lock's file that run, without lines that a crash spoilt."""
    matches = re.findall(r"^(\d{1,9}) (.*)$", users, re.MULTILINE)
    return [f"{command} (process {pid})" for pid, command in matches if _runs(int(pid))]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another person's
        pass
    return True


def _remove_leftovers(artifacts: Path, own: str | None) -> None:
    """Remove temporary files and folders of stages that no process writes."""
    for name in STAGES:
        left = _list_leftovers(artifacts, name)
        if left and name != own:
            # Names of leftovers are never used again, so that the stage can start meanwhile.
            try:
                with _hold(artifacts, name, fcntl.LOCK_SH):
                    left = _list_leftovers(artifacts, name)
            except UserError:
                continue  # in use
        remove(left)


def _list_leftovers(artifacts: Path, stage: str) -> list[Path]:
    """Return what has a temporary name of ours, and not what a file system or a person hides."""
    return [*artifacts.glob(f".{stage}.*"), *artifacts.glob(f"{stage}/.*.*")]


def remove(paths: list[Path]) -> None:
    """Remove files and folders, as far as that is possible."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
