"""What was said to a run, on disk, until MLflow has it: mlruns/outbox/.

A journal is a folder with a line for each thing that was said and the files that it was said of. It
is written by one process at a time, outlives it, and is removed when the store has all of it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor import console, files
from athanor.paths import Workspace

Said = dict[str, Any]


class Journal:
    """What was said to a run, a JSON object a line, in a folder that one process writes at a time.

    Files are kept as hard links where the disk has them: the folder is the record until the store
    has it.
    """

    def __init__(self, name: str) -> None:
        self.folder = Workspace.here().outbox / name
        self._lock_file = self.folder.with_name(f"{name}.lock")
        self._lock = files.try_lock(self._lock_file)
        self._unwritten: list[str] = []

    def ours(self) -> bool:
        """Whether this process may write it: no other one that is alive does."""
        return self._lock is not None

    def append(self, said: Said) -> None:
        """Adds a line, and those that a full disk had no room for before."""
        first = not self._unwritten
        # A line of its own also after one that was cut off.
        self._unwritten.append("\n" + json.dumps(said, ensure_ascii=False) + "\n")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if first:
                console.warn(f"{self.folder} can't be written ({error}); the training goes on")
        else:
            self._unwritten = []

    def keep(self, path: Path) -> str:
        """Keeps a file or a folder as it is now; returns where, below this folder."""
        kept = self.folder / "files" / uuid.uuid4().hex[:8] / path.name
        kept.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=link)
        else:
            link(str(path), str(kept))
        return str(kept.relative_to(self.folder))

    def lines(self) -> Iterator[Said]:
        """What was said."""
        return said_in(self.folder)

    def set_aside(self) -> None:
        """Leaves what is in it to whoever speaks to its own store, under another name."""
        if self.folder.exists():
            self.folder.rename(self.folder.with_name(beside(self.folder.name)))

    def remove(self) -> None:
        """Removes it: the store has all of it."""
        # First what says that there is something to send.
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leaves it to the next process."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def said_in(folder: Path) -> Iterator[Said]:
    """What a journal's folder holds; a last line that a kill cut off was not said."""
    path = folder / "journal.jsonl"
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def beside(name: str) -> str:
    """A journal's name that no other has; in an outbox it comes after `name` itself."""
    return f"{name.partition('.')[0]}.{uuid.uuid4().hex[:8]}"


def link(source: str, target: str) -> None:
    """Makes a file a second name of another where the disk can do that, or else its copy."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
