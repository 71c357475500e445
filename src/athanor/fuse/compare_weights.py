"""Each weight of a fused model against the trained one's.

A stored form holds a weight only to its own precision, so each is compared with the trained weight
and with that weight in the same form. This sees damage that few questions show, and tells adapters
that are not there from adapters that the form is too coarse for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from athanor.errors import UserError
from athanor.model.adapters import load_adapters, merge_adapters

# Values that are compared at a time.
VALUES = 1 << 24
# Below float32's own epsilon the order of a sum decides.
EPSILON = 1e-5


@dataclass(frozen=True)
class WeightChange:
    """The change of one weight in training, and what fusing kept of it.

    Figures are Euclidean norms, but for `kept` and `storable`: of the trained weight (`size`), of
    its change (`wanted`), of the fused weight's distance from it (`lost`), and of the part of that
    which is due to the stored form (`unavoidable`). `kept` says how many times the fused weight has
    the change (its regression on it), `storable` how many times it has it at best: a change below
    the steps of a quantized weight drowns.
    """

    name: str
    quantized: bool
    wanted: float
    size: float
    lost: float
    unavoidable: float
    kept: float
    storable: float

    @property
    def share_lost(self) -> float:
        return self.lost / self.wanted if self.wanted else math.inf

    @property
    def is_damaged(self) -> bool:
        # Products of matrices are only so exact on some devices: hence 1% of the change.
        exact = 2 * self.unavoidable + 1e-2 * self.wanted + EPSILON * self.size
        return abs(self.kept - self.storable) > 0.05 or not self.lost <= exact

    @property
    def is_unchanged(self) -> bool:
        return self.storable > 0.5 and abs(self.kept) < 0.1


def compare_weights(base: Path, adapters: Path, fused: Path) -> Iterator[WeightChange]:
    """Yield the change of each weight that the base, the trained and the fused model have.

    Weights are read from the disk as they are compared, some rows at a time.
    """
    before, after = (_weights(load_model(folder, lazy=True)[0]) for folder in (base, fused))
    model, _ = load_model(base, lazy=True)
    load_adapters(model, adapters)
    goals = _weights(model)
    del model
    for name in [name for name in after if name in before and name in goals]:
        weights = [by_name.pop(name) for by_name in (before, goals, after)]
        stored = weights[-1]
        rows = max(1, VALUES // stored.values(slice(0, 1)).size)
        sums = np.zeros(6)
        for start in range(0, len(stored.array), rows):
            old, goal, new = (weight.values(slice(start, start + rows)) for weight in weights)
            best = stored.round(goal)
            change = goal - old
            squares = [(x * x).sum() for x in (change, goal, new - goal, best - goal)]
            products = [(x * change).sum() for x in (new - old, best - old)]
            sums += np.array(mx.stack([*squares, *products]))
        figures = (*np.sqrt(sums[:4]), *(sums[4:] / sums[0] if sums[0] > 0 else (0, 0)))
        yield WeightChange(name, stored.scales is not None, *map(float, figures))


def find_damage(changes: list[WeightChange]) -> UserError | None:
    """Return the error for weights that are not the trained ones; None where all are."""
    damaged = [change for change in changes if change.is_damaged]
    if not damaged:
        return None
    count = len(damaged)
    if all(change.is_unchanged for change in damaged):
        trained = sum(change.storable > 0.5 for change in changes)
        return UserError(
            "fuse.adapters_missing", count=count, trained=trained, name=damaged[0].name
        )
    worst = max(damaged, key=lambda change: change.share_lost)
    name, share, total = worst.name, worst.share_lost, len(changes)
    if not worst.wanted:
        return UserError("fuse.untrained_weight_differs", count=count, total=total, name=name)
    return UserError("fuse.weights_differ", count=count, total=total, name=name, share=share)


def explain_rounding(changes: list[WeightChange]) -> UserError:
    """Return the error for trained weights that their stored form is too coarse for."""
    trained = [change for change in changes if change.wanted]
    wanted = math.hypot(*(change.wanted for change in trained))
    rounded = math.hypot(*(change.unavoidable for change in trained))
    times = rounded / wanted if wanted else math.inf
    if any(change.quantized for change in trained):
        return UserError("fuse.lost_in_quantizing", times=times)
    return UserError("fuse.lost_in_rounding", times=times)


@dataclass(frozen=True)
class _Weight:
    """A weight in the form that it is stored in: an array, or one that mlx quantized."""

    array: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: dict[str, Any] = field(default_factory=dict)

    def values(self, rows: slice) -> mx.array:
        """Return some rows in float32."""
        if self.scales is None:
            return self.array[rows].astype(mx.float32)
        biases = None if self.biases is None else self.biases[rows]
        return self._unpack(self.array[rows], self.scales[rows], biases)

    def round(self, values: mx.array) -> mx.array:
        """Return what is left of float32 values in this form, in float32."""
        if self.scales is None:
            return values.astype(self.array.dtype).astype(mx.float32)
        packed, *scaling = mx.quantize(values, **self.quantization)
        return self._unpack(packed, *(part.astype(self.scales.dtype) for part in scaling))

    def _unpack(
        self, packed: mx.array, scales: mx.array, biases: mx.array | None = None
    ) -> mx.array:
        if biases is not None:  # else scales are whole numbers, as in mxfp4
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(packed, scales, biases, **self.quantization).astype(mx.float32)


def _weights(model: nn.Module) -> dict[str, _Weight]:
    """Return the weights by name, with the adapters in them; nothing is computed yet."""
    for module in model.modules():
        if hasattr(module, "fuse"):
            module.set_dtype(mx.float32)  # all others are converted as they are compared
    merge_adapters(model, dequantize=True)
    weights = {
        name: _Weight(value if value.ndim else value[None])
        for name, value in tree_flatten(model.parameters())
    }
    for name, module in model.named_modules():
        if "scales" in module:
            form = {key: getattr(module, key) for key in ("group_size", "bits", "mode")}
            packed = _Weight(module.weight, module.scales, module.get("biases"), form)
            weights[f"{name}.weight"] = packed
            for part in ("scales", "biases"):
                weights.pop(f"{name}.{part}", None)
    return weights
