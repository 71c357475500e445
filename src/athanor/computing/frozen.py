"""What the frozen layers of a base model make of rows: computed once, then kept.

A frozen layer gives the same for a row in every epoch, every validation and every training of a
sweep. So the inputs of the first trained layer are kept, a row at a time and without padding: in
memory up to a budget, beyond it in a file that has no name and so is gone with this process, and
beyond that they are computed again. Each row's are computed by itself, so that no byte of them
depends on the rows that it came with, or on where they were kept.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import mlx.core as mx
import numpy as np

from athanor import console
from athanor.computing.parts import Parts
from athanor.supervision import Tokens

Key = tuple[int, bytes]  # a cut, and the tokens that are read


@dataclass(frozen=True)
class Budget:
    """How many bytes of activations are kept in memory, and how many in a file in `folder`."""

    memory: int
    disk: int
    folder: Path


@dataclass(frozen=True)
class _Filed:
    """Where in the file something is."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Frozen:
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
        self._kept: dict[Key, np.ndarray | _Filed] = {}
        self._file: IO[bytes] | None = None
        self._full = False
        self._dtype = mx.float32

    def can_begin_at(self, cut: int) -> bool:
        """Whether the layers from `cut` on can be computed by themselves."""
        return self.budget is not None and cut > 0 and self.parts.cut_at(cut)

    def cut_below(self, names: Iterable[str]) -> int:
        """The first layer that has one of these parameters, 0 for computing all; says why not."""
        cut = self.parts.first_layer(names)
        if self.can_begin_at(cut):
            return cut
        if why := self.parts.uncut.get(cut):
            console.warn(
                f"all layers are computed every time, as those above the first {cut} can't be by "
                f"themselves: {why}"
            )
        return 0

    def given(self, rows: list[Tokens], cut: int, width: int) -> mx.array:
        """What the layer at `cut` is given for rows: rows × width × the model's, 0 where padded.

        `width` is the number of tokens that are read of the longest row, or more.
        """
        self.cuts.add(cut)
        keys = [(cut, np.array(row.ids[:-1], np.int32).tobytes()) for row in rows]
        dtype, made = self._computed({key for key in keys if key not in self._kept})
        found = [made[key] if key in made else self._read(key) for key in keys]
        padded = np.zeros((len(rows), width, found[0].shape[-1]), found[0].dtype)
        for place, one in enumerate(found):
            padded[place, : len(one)] = one
        return mx.array(padded).view(dtype)

    def _computed(self, keys: set[Key]) -> tuple[mx.Dtype, dict[Key, np.ndarray]]:
        """Computes what is missing, keeps it, and what is met on the way."""
        noted: dict[Key, mx.array] = {}
        for key in sorted(keys):
            cut, ids = key
            start = max((c for c in self.cuts if c < cut and (c, ids) in self._kept), default=0)
            wanted = [c for c in sorted(self.cuts) if start < c <= cut]
            below = mx.array(self._read((start, ids)))[None].view(self._dtype) if start else None
            tokens = mx.array(np.frombuffer(ids, np.int32))[None]
            lower = self.parts.lower(tokens, wanted, start, below)
            noted |= {(c, ids): lower[c][0] for c in wanted}
        mx.eval(list(noted.values()))
        made: dict[Key, np.ndarray] = {}
        for key, array in noted.items():
            self._dtype = array.dtype
            # NumPy has no bfloat16: what is kept are bytes.
            made[key] = np.array(array.view(mx.uint32 if array.itemsize == 4 else mx.uint16))
            self._keep(key, made[key])
        return self._dtype, made

    def _keep(self, key: Key, value: np.ndarray) -> None:
        assert self.budget is not None
        if self.in_memory + value.nbytes <= self.budget.memory:
            self._kept[key] = value
            self.in_memory += value.nbytes
        elif not self._full and self.on_disk + value.nbytes <= self.budget.disk:
            try:
                if self._file is None:
                    self.budget.folder.mkdir(parents=True, exist_ok=True)
                    self._file = tempfile.TemporaryFile(dir=self.budget.folder)  # noqa: SIM115
                self._file.seek(self.on_disk)
                self._file.write(value.tobytes())
                self._file.flush()
            except OSError as error:
                self._say_full(str(error))
                return
            self._kept[key] = _Filed(self.on_disk, value.shape, value.dtype)
            self.on_disk += value.nbytes
        else:
            self._say_full("both budgets are used up")

    def _read(self, key: Key) -> np.ndarray:
        found = self._kept[key]
        if isinstance(found, np.ndarray):
            return found
        assert self._file is not None
        return np.memmap(self._file, found.dtype, "r", found.offset, found.shape)

    def _say_full(self, why: str) -> None:
        assert self.budget is not None
        if not self._full and self.budget.memory + self.budget.disk:
            console.warn(
                f"{(self.in_memory + self.on_disk) / 1e9:.2f} GB of what the frozen layers made of "
                f"rows are kept, and no more ({why}): the rest is computed again each time; "
                "train.activations_memory and train.activations_disk say how much may be kept"
            )
        self._full = True
