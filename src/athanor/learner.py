"""What one training changes, and how an update changes it."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map, tree_map_with_path

Arrays = dict[str, mx.array]


class Learner:
    """What one training changes: its weights, its optimizer's state, a sum of gradients.

    A step asks for the gradient by these weights and hands it back, and knows nothing else of them:
    several learners, each with a rate and an optimizer of its own, can take theirs from one batch.

    Args:
        weights: a tree of arrays.
        optimizer: one that has not been used yet.
        max_grad_norm: as Trainer's.
        compile: whether to run the update through mx.compile.
    """

    def __init__(
        self,
        weights: Any,
        optimizer: optim.Optimizer,
        max_grad_norm: float | None = None,
        *,
        compile: bool = False,
    ) -> None:
        self.weights, self.optimizer = weights, optimizer
        self.gradient: Any = None  # of the batches since the last update, summed
        self._limit = math.inf if max_grad_norm is None else max_grad_norm
        optimizer.init(weights)
        self._apply = self._applied
        if compile:
            state = [optimizer.state]
            self._apply = mx.compile(self._applied, inputs=state, outputs=state)

    def update(self, gradient: Any, scale: mx.array) -> mx.array:
        """Updates the weights by a summed gradient; returns the norm of the mean one."""
        self.weights, norm = self._apply(self.weights, gradient, scale)
        return norm

    def put_back(self, weights: Arrays, moments: Arrays) -> None:
        """Makes these, by their names, the weights and the optimizer's state."""
        self.weights = named(self.weights, weights)
        # In place: the compiled update holds on to this tree.
        self.optimizer.state.update(named(self.optimizer.state, moments))

    def _applied(self, weights: Any, gradient: Any, scale: mx.array) -> tuple[Any, mx.array]:
        # The mean over processes times their number is the sum over them.
        gradient = tree_map(lambda array: array * scale, average_gradients(gradient))
        gradient, norm = optim.clip_grad_norm(gradient, self._limit)
        return self.optimizer.apply_gradients(gradient, weights), norm


def named(tree: Any, arrays: Arrays) -> Any:
    """A tree of the same form with the arrays of these names."""
    return tree_map_with_path(lambda name, _: arrays[name], tree)
