"""Journals in mlruns/outbox/: entries and files that wait until MLflow has them.

A journal is a folder with a line for each entry and the files that entries name. One process at a
time writes it; it outlives that process, and is removed when the store has all of it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from athanor import console, files
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs.entries import AnyEntry, InvalidEntry


class Journal:
    """A folder of entries, a JSON object a line, which one process writes at a time.

    Files are kept as hard links where the disk has them, until the store has them.

    Raises:
        UserError: if the outbox cannot be written.
    """

    def __init__(self, name: str) -> None:
        self.folder = Workspace.here().outbox / name
        self._lock_file = self.folder.with_name(f"{name}.lock")
        try:
            self._lock = files.try_lock(self._lock_file)
        except OSError as error:
            raise UserError(
                "runs.outbox_unwritable", folder=self.folder.parent, error=error.strerror
            ) from None
        self._unwritten: list[str] = []

    def is_ours(self) -> bool:
        """Return whether this process may write it: no other living process does."""
        return self._lock is not None

    def append(self, entry: AnyEntry) -> None:
        """Write an entry, and those that a full disk had no room for before."""
        first = not self._unwritten
        # json, because msgspec would write a loss that is nan as null. The line break before the
        # entry ends a line that was cut off.
        text = json.dumps(msgspec.to_builtins(entry), ensure_ascii=False)
        self._unwritten.append(f"\n{text}\n")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if first:
                console.warn(f"cannot write {self.folder} ({error}); the training continues")
        else:
            self._unwritten = []

    def keep(self, path: Path) -> str:
        """Keep a file or a folder as it is now; return its path in the journal's folder."""
        kept = self.folder / "files" / uuid.uuid4().hex[:8] / path.name
        kept.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=link_or_copy)
        else:
            link_or_copy(str(path), str(kept))
        return str(kept.relative_to(self.folder))

    def set_aside(self) -> None:
        """Rename the journal, and leave it to a stage that uses its store."""
        if self.folder.exists():
            self.folder.rename(self.folder.with_name(unique_name(self.folder.name)))

    def remove(self) -> None:
        """Remove the journal: the store has all of it."""
        # The entries first, so that an interrupt leaves nothing to send.
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the journal to the next process."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def read_entries(folder: Path) -> Iterator[AnyEntry]:
    """Yield the entries in a journal's folder, without lines that a kill cut off."""
    path = folder / "journal.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield msgspec.convert(json.loads(line), AnyEntry)
        except msgspec.ValidationError as error:
            yield InvalidEntry(number, str(error))
        except ValueError:
            continue


def unique_name(name: str) -> str:
    """Return a journal's name that no other has; in an outbox it comes after `name` itself."""
    return f"{name.partition('.')[0]}.{uuid.uuid4().hex[:8]}"


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, or copy it where the disk cannot link."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)
