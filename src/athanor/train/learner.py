"""The weights and the optimizer of a training, and their updates."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_map_with_path

Arrays = dict[str, mx.array]

# Bytes of the arrays that are updated as one: enough that an operation is more than its start, and
# so few that they stay in a processor's cache, and that the sum of their squares is exact to 1e-5.
PACK = 1 << 18


class Learner:
    """Weights, an optimizer's state and a sum of gradients.

    A step computes the gradient by these weights and hands it over, and knows nothing else of them:
    several learners, each with its own rate and optimizer, can learn from one batch.

    Args:
        weights: by their names.
        optimizer: one that has not been used yet.
        max_grad_norm: the L2 norm that a gradient is scaled down to; None for no limit.
        compile: run the update through mx.compile.
    """

    def __init__(
        self,
        weights: Arrays,
        optimizer: optim.Optimizer,
        max_grad_norm: float | None = None,
        *,
        compile: bool = False,
    ) -> None:
        self.weights, self.optimizer = weights, optimizer
        self.gradient: Arrays | None = None  # of the batches since the last update, summed
        self._limit = math.inf if max_grad_norm is None else max_grad_norm
        # These update each number by itself, whatever array it is in.
        elementwise = isinstance(optimizer, optim.Adam | optim.SGD | optim.Lion)
        self._packs = packs(weights) if elementwise else [[name] for name in weights]
        self._packed = self._pack(weights)
        optimizer.init(self._packed)
        self._apply = self._applied
        if compile:
            state = [optimizer.state]
            self._apply = mx.compile(self._applied, inputs=state, outputs=state)

    def add(self, gradient: Arrays) -> None:
        """Add a batch's gradient to those since the last update."""
        total = self.gradient
        if total is not None:
            gradient = {name: array + total[name] for name, array in gradient.items()}
        self.gradient = gradient

    def update(self, scale: mx.array) -> mx.array:
        """Update the weights by the sum of gradients times `scale`; return the norm of that."""
        assert self.gradient is not None
        self._packed, norm = self._apply(self._packed, self._pack(self.gradient), scale)
        self.weights, self.gradient = self._unpack(self._packed), None
        return norm

    def put_back(self, weights: Arrays, moments: Arrays) -> None:
        """Make these arrays, by their names, the weights and the optimizer's state."""
        self._packed = self._pack(weights)
        self.weights = self._unpack(self._packed)  # as an update leaves them
        # In place: the compiled update holds on to this tree.
        state = self.optimizer.state
        state.update(tree_map_with_path(lambda name, _: moments[name], state))

    def _applied(self, weights: Any, gradient: Any, scale: mx.array) -> tuple[Any, mx.array]:
        gradient = tree_map(lambda array: array * scale, gradient)
        gradient, norm = optim.clip_grad_norm(gradient, self._limit)
        return self.optimizer.apply_gradients(gradient, weights), norm

    def _pack(self, arrays: Arrays) -> Arrays:
        """Return each pack's arrays as one, concatenated; a single array stays as it is."""
        return {
            names[0]: arrays[names[0]]
            if len(names) == 1
            else mx.concatenate([arrays[name].reshape(-1) for name in names])
            for names in self._packs
        }

    def _unpack(self, packed: Arrays) -> Arrays:
        """Return the arrays of the packs by their names, as views."""
        arrays: Arrays = {}
        for names in self._packs:
            whole = packed[names[0]]
            if len(names) == 1:
                arrays[names[0]] = whole
                continue
            shapes = [self.weights[name].shape for name in names]
            ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
            for name, shape, part in zip(names, shapes, mx.split(whole, ends), strict=True):
                arrays[name] = part.reshape(shape)
        return {name: arrays[name] for name in self.weights}


def packs(weights: Arrays) -> list[list[str]]:
    """Return the names of weights to update as one array: small ones of one dtype, up to PACK.

    Adapters are hundreds of small arrays, and an update has some 17 operations for each, of which
    every one costs a few µs on a CPU, or a kernel on a GPU, however few numbers it has.
    """
    result: list[list[str]] = []
    current: dict[mx.Dtype, list[str]] = {}
    for name, weight in weights.items():
        pack = current.get(weight.dtype)
        if pack is None or sum(weights[other].nbytes for other in pack) + weight.nbytes > PACK:
            pack = current[weight.dtype] = []
            result.append(pack)
        pack.append(name)
    return result
