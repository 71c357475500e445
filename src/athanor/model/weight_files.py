"""The files of a model's weights, and a weight as the header of its file describes it."""

from dataclasses import dataclass
from pathlib import Path

from athanor.errors import UserError

# The largest dimension of an array in mlx.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class StoredWeight:
    """The file, the format's name of the dtype, and the shape of a weight."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model, in the order of their names.

    Raises:
        UserError: where there are none.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise UserError("model.no_weights", folder=folder, files=list_names(folder) or "no files")
    return paths


def list_names(folder: Path) -> list[str]:
    """Return the names of a folder's files, for a message that lists them."""
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    return names if len(names) <= 12 else [*names[:12], f"and {len(names) - 12} others"]
