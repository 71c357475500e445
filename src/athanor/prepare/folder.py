"""The files of a folder of data: regular files inside it, or in DVC's cache of its repository.

A link is followed inside the folder, and to a file of the cache, which DVC links files from where
its setting cache.type says so.
"""

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from athanor.errors import UserError

MOST_FILES = 100_000
KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def list_files(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Return the regular files below a folder that are not hidden, and all else with the reason.

    Raises:
        UserError: for a folder that is missing, can't be read, contains the project, or has more
            files than any folder of data.
    """
    root = _root(folder)
    listed: list[Path] = []
    left: list[tuple[Path, str]] = []
    for path, reason in _walk(folder, root):
        if reason is None:
            listed.append(path)
        else:
            left.append((path, reason))
        if len(listed) + len(left) > MOST_FILES:
            raise UserError("prepare.too_many_files", folder=folder, most=MOST_FILES)
    return sorted(listed), sorted(left)


def _root(folder: Path) -> Path:
    try:
        root = folder.resolve(strict=True)
        is_folder = root.is_dir()
    except FileNotFoundError:
        raise UserError("prepare.no_folder", folder=folder) from None
    except (OSError, RuntimeError) as error:  # links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("prepare.unreadable", path=folder, reason=reason) from None
    if not is_folder:
        raise UserError("prepare.not_a_folder", folder=folder)
    if Path.cwd().resolve().is_relative_to(root):
        raise UserError("prepare.project_in_data", folder=folder, root=root)
    return root


def _walk(top: Path, root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the files below a folder; those that are not read come with a reason."""
    seen, folders = {root}, [top]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError("prepare.unreadable", path=folder, reason=error.strerror) from error
        for entry in entries:
            if entry.name.startswith((".", "~")):
                continue
            path = folder / entry.name
            if entry.is_symlink() and (reason := _link_reason(path, root)) is not None:
                yield path, reason
            elif entry.is_dir():
                if (target := path.resolve()) not in seen:  # a link that leads back
                    seen.add(target)
                    folders.append(path)
            elif entry.is_file():
                yield path, None
            else:
                mode = entry.stat().st_mode
                kind = next((name for is_kind, name in KINDS.items() if is_kind(mode)), "no file")
                yield path, f"{kind}; only regular files are read"


def _link_reason(path: Path, root: Path) -> str | None:
    """Return why a link is not followed; None where it is."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        return f"a link to {path.readlink()}, which does not exist"
    except (OSError, RuntimeError) as error:  # links in a circle
        return f"a link that can't be followed: {getattr(error, 'strerror', None) or error}"
    if target.is_relative_to(root):
        return None
    caches = _caches(path.absolute().parent)
    if target.is_file() and any(target.is_relative_to(cache) for cache in caches):
        return None
    return f"a link that leaves the folder, to {target}; copy it into the folder to read it"


@lru_cache(maxsize=64)
def _caches(folder: Path) -> list[Path]:
    """Return the cache of the DVC repository that a folder is in, as a list of one or none."""
    place = next((above for above in (folder, *folder.parents) if (above / ".dvc").is_dir()), None)
    if place is None:
        return []
    from dvc.config import Config, ConfigError

    try:
        configured = Config(str(place / ".dvc"))["cache"].get("dir")
    except ConfigError:
        configured = None
    cache = Path(configured) if configured else place / ".dvc/cache"
    return [cache.resolve()]
