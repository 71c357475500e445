"""What the frozen layers of a base model make of rows: computed once, then kept.

A frozen layer gives the same for a row in every epoch, every validation and every training of a
sweep. So the inputs of the first trained layer are kept, a row at a time and without padding: in
memory up to a budget, beyond it in a file that has no name and so is gone with this process, and
beyond that they are computed again. Each row's are computed by itself, so that no byte of them
depends on the rows that it came with, or on where they were kept.
"""

import errno
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import mlx.core as mx
import numpy as np

from athanor import console
from athanor.compute.arrays import TokenizedText
from athanor.compute.parts import Parts, eval_mode

Key = tuple[int, bytes]  # a cut, and the tokens that are read


@dataclass(frozen=True)
class Budget:
    """How many bytes of activations are kept in memory, and how many in a file in `folder`."""

    memory: int
    disk: int
    folder: Path


@dataclass(frozen=True)
class _Kept:
    """What is kept, as bytes in memory or at a place in the file; NumPy has no bfloat16."""

    dtype: mx.Dtype
    there: np.ndarray | int
    shape: tuple[int, ...]
    kind: np.dtype


class FrozenLayers:
    """The layers of a base model that no training changes, and what they made of rows.

    Args:
        parts: of the base model; nothing below a cut that is asked for may ever change.
        budget: None for never parting the layers: all are computed every time.
        cuts: where trainings are known to begin: on the way to one of them, what the layer at
            another is given is kept, too.
    """

    def __init__(self, parts: Parts, budget: Budget | None, cuts: Iterable[int] = ()) -> None:
        self.parts, self.budget, self.cuts = parts, budget, set(cuts)
        self.in_memory = self.on_disk = 0  # bytes
        self._kept: dict[Key, _Kept] = {}
        self._file: IO[bytes] | None = None
        self._full = False

    def can_start_at(self, cut: int) -> bool:
        """Whether the layers from `cut` on can be computed by themselves."""
        return self.budget is not None and cut > 0 and self.parts.can_cut_at(cut)

    def choose_cut(self, names: Iterable[str]) -> int:
        """The first layer that has one of these parameters, 0 for computing all; says why not."""
        cut = self.parts.first_layer(names)
        if self.can_start_at(cut):
            return cut
        if why := self.parts.uncut_reasons.get(cut):
            console.warn(
                f"all layers are computed every time, as those above the first {cut} can't be by "
                f"themselves: {why}"
            )
        return 0

    def activations(self, rows: list[TokenizedText], cut: int, width: int) -> mx.array:
        """What the layer at `cut` is given for rows: rows × width × the model's own.

        `width` is the number of tokens that are read of the longest row, or more; a row is padded
        with its last.
        """
        self.cuts.add(cut)
        keys = [(cut, np.array(row.ids[:-1], np.int32).tobytes()) for row in rows]
        made = {key: self._computed(*key) for key in sorted(set(keys)) if key not in self._kept}
        found = [made[key] if key in made else self._kept[key] for key in keys]
        values = [self._read(one) for one in found]
        padded = np.empty((len(rows), width, values[0].shape[-1]), values[0].dtype)
        for place, one in enumerate(values):
            padded[place, : len(one)] = one
            padded[place, len(one) :] = one[-1]  # not 0, of which some norm may make no number
        return mx.array(padded).view(found[0].dtype)

    def _computed(self, cut: int, ids: bytes) -> _Kept:
        """Computes what is missing of a row, keeps it, and what is met on the way."""
        usable = {c for c in self.cuts if c == cut or (c < cut and self.can_start_at(c))}
        start = max((c for c in usable if (c, ids) in self._kept), default=0)
        wanted = sorted(c for c in usable if c > start)
        tokens = mx.array(np.frombuffer(ids, np.int32))[None]
        below = None
        if start:
            before = self._kept[(start, ids)]
            below = mx.array(self._read(before))[None].view(before.dtype)
        with eval_mode(self.parts.model):
            noted = self.parts.lower(tokens, wanted, start, below)
        mx.eval(list(noted.values()))
        for c in wanted:
            array = noted[c][0]
            value = np.array(array.view(mx.uint32 if array.itemsize == 4 else mx.uint16))
            one = _Kept(array.dtype, value, value.shape, value.dtype)
            self._keep((c, ids), one, value)
        return one  # of `cut`, the last

    def _keep(self, key: Key, one: _Kept, value: np.ndarray) -> None:
        assert self.budget is not None
        if self.in_memory + value.nbytes <= self.budget.memory:
            self._kept[key] = one
            self.in_memory += value.nbytes
        elif not self._full and self.on_disk + value.nbytes <= self.budget.disk:
            try:
                self._write(value)
            except OSError as error:
                self._say_full(str(error))
                return
            self._kept[key] = replace(one, there=self.on_disk)
            self.on_disk += value.nbytes
        else:
            self._say_full("both budgets are used up")

    def _write(self, value: np.ndarray) -> None:
        assert self.budget is not None
        folder = self.budget.folder
        if self._file is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        if value.nbytes > shutil.disk_usage(folder).free / 2:
            raise OSError(errno.ENOSPC, "the rest of the disk is left to checkpoints and records")
        self._file.seek(self.on_disk)
        if self._file.write(value.tobytes()) != value.nbytes:
            raise OSError(errno.ENOSPC, "the disk is full")

    def _read(self, found: _Kept) -> np.ndarray:
        if isinstance(found.there, np.ndarray):
            return found.there
        assert self._file is not None
        return np.memmap(self._file, found.kind, "r", found.there, found.shape)

    def _say_full(self, why: str) -> None:
        assert self.budget is not None
        if not self._full and self.budget.memory + self.budget.disk:
            console.warn(
                f"{(self.in_memory + self.on_disk) / 1e9:.2f} GB of what the frozen layers made of "
                f"rows are kept, and no more ({why}): the rest is computed again each time; "
                "train.activations_memory and train.activations_disk say how much may be kept"
            )
        self._full = True
