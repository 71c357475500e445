"""Checkpoints: all that a training needs to go on as if it had never been interrupted.

    artifacts/train/checkpoints/<key>/       a training that has not ended yet
        about.json                           what the key is made of
        0000100/                             the checkpoint after iteration 100
            adapters.safetensors …           arrays, a file a group
            state.json                       everything else
            manifest.json                    sizes and sha256 of the others; written last

The key is a digest of everything that decides the result, so a training goes on from its own
checkpoints and never from those of another. A checkpoint gets its name when all of it is on the
disk, the two latest are kept, and one that is not as its manifest says is passed over. When the
training's results are written, the folder is removed.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from athanor import console, files
from athanor.errors import UserError

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after an iteration: arrays by group and name, and a JSON value."""

    iteration: int
    arrays: dict[str, dict[str, mx.array]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, whose folder this process alone may use.

    `about` is what decides the result, as JSON.

    Raises:
        UserError: while another process runs the same training.
    """

    def __init__(self, root: Path, about: dict[str, Any]) -> None:
        self.folder = root / key(about)
        self._lock = files.try_lock(self.folder / "lock")
        if self._lock is None:
            raise UserError(
                f"another process is at this very training ({self.folder}): wait for it, or end it"
            )
        for left_behind in [*self.folder.glob(".*"), *root.glob(".*")]:
            if left_behind.is_dir():
                shutil.rmtree(left_behind, ignore_errors=True)
            else:
                left_behind.unlink(missing_ok=True)
        files.write_json(self.folder / "about.json", about)

    def save(self, found: Checkpoint) -> bool:
        """Writes a checkpoint and removes all but the latest two.

        A disk that is full, or fails, costs this checkpoint and a warning; earlier ones stay.
        """
        name = f"{found.iteration:07d}"
        try:
            with files.whole_folder(self.folder / name) as folder:
                for group, arrays in found.arrays.items():
                    mx.save_safetensors(str(folder / f"{group}.safetensors"), arrays)
                files.write_json(folder / "state.json", found.state)
                files.write_json(folder / "manifest.json", _manifest(folder))
        except OSError as error:
            why = "the disk is full" if error.errno in console.DISK_FULL else str(error)
            there = ", ".join(path.name for path in self._all()) or "none"
            console.warn(
                f"no checkpoint after iteration {found.iteration} ({_size(found)}) in "
                f"{self.folder}: {why}; earlier checkpoints stay ({there})"
            )
            return False
        for old in self._all()[KEPT:]:
            shutil.rmtree(old)
        return True

    def latest(self) -> Checkpoint | None:
        """The latest checkpoint that is whole; later ones that are not are named and removed."""
        for folder in self._all():
            try:
                if files.read_json(folder / "manifest.json") != _manifest(folder):
                    raise ValueError("its files are not those of its manifest")
                arrays = {
                    path.stem: cast("dict[str, mx.array]", mx.load(str(path)))
                    for path in folder.glob("*.safetensors")
                }
                mx.eval(arrays)  # now: this folder is removed when later ones are written
                return Checkpoint(int(folder.name), arrays, files.read_json(folder / "state.json"))
            except (OSError, ValueError, RuntimeError, UserError) as error:
                console.warn(f"checkpoint {folder} is damaged ({error}), and so is removed")
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def clear(self) -> None:
        """Removes the folder: the training has ended, and its results are written."""
        # All of it at once: half a folder would be taken for another training's beginning.
        gone = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets other processes go on with this training."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _all(self) -> list[Path]:
        """The checkpoints' folders, the latest first."""
        found = (path for path in self.folder.iterdir() if path.name.isdigit())
        return sorted(found, key=lambda path: int(path.name), reverse=True)


def key(about: dict[str, Any]) -> str:
    """The digest of what decides a training's result."""
    text = json.dumps(about, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unfinished(root: Path) -> list[Path]:
    """The folders of all trainings that have a checkpoint, and so have not ended."""
    return sorted({path.parent.parent for path in root.glob("[!.]*/[!.]*/manifest.json")})


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": files.digest([path])}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def _size(found: Checkpoint) -> str:
    size = sum(array.nbytes for arrays in found.arrays.values() for array in arrays.values())
    return f"{size / 1e6:.1f} MB"
