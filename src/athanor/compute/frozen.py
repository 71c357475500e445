"""A cache of the activations that the frozen layers of a base model compute.

A frozen layer gives the same activations for a row in every epoch, every validation and every
trial of a sweep. So the inputs of the first trained layer are cached, a row at a time and without
padding: in memory up to a budget, then in an unnamed file that disappears with this process; beyond
both they are computed again. Each row is computed alone, so no byte depends on the other rows of a
batch or on where the activations were cached.
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

Key = tuple[int, bytes]  # a cut, and the tokens of a row as int32


@dataclass(frozen=True)
class Budget:
    """The bytes of activations that are cached in memory, and those in a file in `folder`."""

    memory: int
    disk: int
    folder: Path


@dataclass(frozen=True)
class _Entry:
    """Activations [positions, width] of a row: an array, or an offset in the file.

    NumPy has no bfloat16, so they are stored as unsigned integers; `dtype` is mlx's own.
    """

    dtype: mx.Dtype
    storage: np.ndarray | int
    shape: tuple[int, ...]
    stored_as: np.dtype


class FrozenLayers:
    """The layers of a base model that no training changes, and their cached activations.

    A cut is the number of the first layer that is computed each time; those below it are cached.

    Args:
        parts: the base model's; nothing below a requested cut may ever change.
        budget: None to compute all layers every time.
        cuts: cuts that will be requested later: activations at these are cached on the way.
    """

    def __init__(self, parts: Parts, budget: Budget | None, cuts: Iterable[int] = ()) -> None:
        self.parts, self.budget, self.cuts = parts, budget, set(cuts)
        self.in_memory = self.on_disk = 0  # bytes
        self._entries: dict[Key, _Entry] = {}
        self._file: IO[bytes] | None = None
        self._full = False

    def can_start_at(self, cut: int) -> bool:
        """Return whether the layers from `cut` on can be computed from cached activations."""
        return self.budget is not None and cut > 0 and self.parts.can_cut_at(cut)

    def choose_cut(self, names: Iterable[str]) -> int:
        """Return the first layer with one of these parameters, or 0 and warn if none can be cut."""
        cut = self.parts.first_layer(names)
        if self.can_start_at(cut):
            return cut
        if reason := self.parts.uncut_reasons.get(cut):
            console.warn(
                f"all layers are computed every time, because those from layer {cut} on can't be "
                f"computed alone: {reason}"
            )
        return 0

    def activations(self, rows: list[TokenizedText], cut: int, width: int) -> mx.array:
        """Return the inputs [rows, width, hidden] of the layer `cut`.

        `width` is at least the number of tokens read of the longest row; a row is padded with its
        last activation.
        """
        self.cuts.add(cut)
        keys = [(cut, np.array(row.ids[:-1], np.int32).tobytes()) for row in rows]
        computed = {
            key: self._compute(*key) for key in sorted(set(keys)) if key not in self._entries
        }
        entries = [computed[key] if key in computed else self._entries[key] for key in keys]
        values = [self._read(entry) for entry in entries]
        padded = np.empty((len(rows), width, values[0].shape[-1]), values[0].dtype)
        for i, value in enumerate(values):
            padded[i, : len(value)] = value
            padded[i, len(value) :] = value[-1]  # not 0, which a norm could turn into NaN
        return mx.array(padded).view(entries[0].dtype)

    def _compute(self, cut: int, ids: bytes) -> _Entry:
        """Compute and cache a row's activations at a cut, and at known cuts on the way to it."""
        usable = {c for c in self.cuts if c == cut or (c < cut and self.can_start_at(c))}
        start = max((c for c in usable if (c, ids) in self._entries), default=0)
        wanted = sorted(c for c in usable if c > start)
        tokens = mx.array(np.frombuffer(ids, np.int32))[None]
        below = None
        if start:
            entry = self._entries[(start, ids)]
            below = mx.array(self._read(entry))[None].view(entry.dtype)
        with eval_mode(self.parts.model):
            inputs = self.parts.layer_inputs(tokens, wanted, start, below)
        mx.eval(list(inputs.values()))
        for c in wanted:
            array = inputs[c][0]
            value = np.array(array.view(mx.uint32 if array.itemsize == 4 else mx.uint16))
            entry = _Entry(array.dtype, value, value.shape, value.dtype)
            self._store((c, ids), entry, value)
        return entry  # of `cut`, the last

    def _store(self, key: Key, entry: _Entry, value: np.ndarray) -> None:
        assert self.budget is not None
        if self.in_memory + value.nbytes <= self.budget.memory:
            self._entries[key] = entry
            self.in_memory += value.nbytes
        elif not self._full and self.on_disk + value.nbytes <= self.budget.disk:
            try:
                self._write(value)
            except OSError as error:
                self._warn_full(str(error))
                return
            self._entries[key] = replace(entry, storage=self.on_disk)
            self.on_disk += value.nbytes
        else:
            self._warn_full("both budgets are used up")

    def _write(self, value: np.ndarray) -> None:
        assert self.budget is not None
        folder = self.budget.folder
        if self._file is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        if value.nbytes > shutil.disk_usage(folder).free / 2:
            raise OSError(
                errno.ENOSPC, "the rest of the disk is reserved for checkpoints and records"
            )
        self._file.seek(self.on_disk)
        if self._file.write(value.tobytes()) != value.nbytes:
            raise OSError(errno.ENOSPC, "the disk is full")

    def _read(self, entry: _Entry) -> np.ndarray:
        if isinstance(entry.storage, np.ndarray):
            return entry.storage
        assert self._file is not None
        return np.memmap(self._file, entry.stored_as, "r", entry.storage, entry.shape)

    def _warn_full(self, reason: str) -> None:
        assert self.budget is not None
        if not self._full and self.budget.memory + self.budget.disk:
            console.warn(
                f"the activations of the frozen layers are cached up to "
                f"{(self.in_memory + self.on_disk) / 1e9:.2f} GB ({reason}), and the rest is "
                "computed again each time; raise train.activations_memory or "
                "train.activations_disk to cache more"
            )
        self._full = True
