"""Checkpoints: everything that a training needs to resume as if it had never been interrupted.

    artifacts/train/checkpoints/<key>/       a training that has not ended yet
        about.json                           the identity that the key is the digest of
        0000100/                             the checkpoint after iteration 100
            adapters.safetensors …           arrays, a file a group
            state.json                       the progress
            manifest.json                    sizes and sha256 of the other files; written last

The key is a digest of everything that decides the result, so a training resumes from its own
checkpoints and never from another's. A checkpoint gets its name when all of it is on the
disk; the two latest are kept; a damaged one is skipped. When the training's result is written, the
folder is removed.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from athanor import console, files, locks
from athanor.errors import UserError

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Arrays by group and name, and the progress as JSON, after an iteration."""

    iteration: int
    arrays: dict[str, dict[str, mx.array]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in a folder that only this process may use.

    Raises:
        UserError: while another process runs the same training.
    """

    def __init__(self, root: Path, identity: dict[str, Any]) -> None:
        self.folder = root / key(identity)
        lock = files.try_lock(self.folder / "lock")
        if lock is None:
            raise UserError("train.already_running", folder=self.folder)
        self._lock = lock
        locks.remove([*self.folder.glob(".*"), *root.glob(".*")])
        files.write_json(self.folder / "about.json", identity)

    def save(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint, and remove all but the latest two; return False if that failed.

        A disk that is full, or fails, costs this checkpoint and a warning; earlier ones stay.
        """
        name = f"{checkpoint.iteration:07d}"
        try:
            with files.whole_folder(self.folder / name) as folder:
                for group, arrays in checkpoint.arrays.items():
                    mx.save_safetensors(str(folder / f"{group}.safetensors"), arrays)
                files.write_json(folder / "state.json", checkpoint.state)
                files.write_json(folder / "manifest.json", _manifest(folder))
        except OSError as error:
            cause = "the disk is full" if error.errno in console.DISK_FULL else str(error)
            earlier = ", ".join(path.name for path in self._folders()) or "none"
            console.warn(
                f"no checkpoint after iteration {checkpoint.iteration} ({_size(checkpoint)}) in "
                f"{self.folder}: {cause}; earlier checkpoints stay ({earlier})"
            )
            return False
        for old in self._folders()[KEPT:]:
            shutil.rmtree(old)
        return True

    def latest(self) -> Checkpoint | None:
        """Return the latest whole checkpoint; warn of damaged later ones, and remove them."""
        for folder in self._folders():
            try:
                if files.read_json(folder / "manifest.json") != _manifest(folder):
                    raise ValueError("its files differ from its manifest")
                arrays = {
                    path.stem: cast("dict[str, mx.array]", mx.load(str(path)))
                    for path in folder.glob("*.safetensors")
                }
                mx.eval(arrays)  # now: this folder is removed when later ones are written
                return Checkpoint(int(folder.name), arrays, files.read_json(folder / "state.json"))
            except (OSError, ValueError, RuntimeError, UserError) as error:
                console.warn(f"checkpoint {folder} is damaged ({error}) and was removed")
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def clear(self) -> None:
        """Remove the folder: the training has ended, and its result is written."""
        # At once, by renaming: half a folder would look like a training's beginning.
        removed = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(removed, ignore_errors=True)
        self.folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let other processes resume this training."""
        self._lock.release()

    def _folders(self) -> list[Path]:
        """Return the checkpoints' folders, the latest first."""
        numbered = (path for path in self.folder.iterdir() if path.name.isdigit())
        return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def key(identity: dict[str, Any]) -> str:
    """Return the digest of an identity, or of another JSON object: 16 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unfinished(root: Path) -> list[Path]:
    """Return the folders of all trainings that have a checkpoint, and so have not ended."""
    return sorted({path.parent.parent for path in root.glob("[!.]*/[!.]*/manifest.json")})


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": files.digest([path])}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def _size(checkpoint: Checkpoint) -> str:
    size = sum(array.nbytes for group in checkpoint.arrays.values() for array in group.values())
    return f"{size / 1e6:.1f} MB"
