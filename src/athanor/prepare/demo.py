"""The demo's files among the files of a person's own: they would stay the validation and the test.

The remote `demo` of this repository holds the demo's rows and nothing else.
"""

import hashlib
import json
import shlex
from contextlib import suppress
from pathlib import Path

from athanor import console

REMOTE = ".dvc/demo-remote/files/md5"


def demo_note(folder: Path, paths: list[str]) -> tuple[str, str] | None:
    """Return the first of the demo's files, and a sentence with all and how to remove them.

    None where none is, or all are.
    """
    listed: set[tuple[str, str]] = set()
    for listing in (folder.parent / REMOTE).glob("*/*.dir"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            entries = json.loads(listing.read_text(encoding="utf-8"))
            listed |= {(entry["relpath"], entry["md5"]) for entry in entries}
    names = {name for name, _ in listed}
    demo = []
    for path in paths:
        with suppress(OSError, ValueError):
            name = Path(path).relative_to(folder).as_posix()
            # The demo's file of that name is small, and so only a small one is read.
            if name in names and (file := Path(path)).stat().st_size < 10_000:
                digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
                demo += [path] * ((name, digest) in listed)
    if not demo or len(demo) == len(paths):
        return None
    verb = "is the demo's" if len(demo) == 1 else "are the demo's"
    return demo[0], (
        f"{', '.join(demo)} {verb}, beside {console.counted(len(paths) - len(demo), 'file')} of "
        f"your own; to train without: `rm {shlex.join(demo)}`"
    )
