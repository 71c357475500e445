"""The memory of a training: predicted before its first iteration, and errors where it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten

from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import Forward
from athanor.errors import UserError
from athanor.train.learner import Learner


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn mlx's errors about memory into one that names the keys that reduce it.

    Raises:
        UserError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error).lower() and "memory" not in str(error).lower():
            raise
        raise UserError("train.out_of_memory", error=str(error)) from error


def predict_peak(
    forward: Forward, learner: Learner, longest: TokenizedText, rows: int, *, accumulates: bool
) -> int:
    """Return the memory in bytes of an iteration on `rows` rows like the longest.

    A batch takes the same amount more for each row of one length, so one and two are computed; then
    an update is made and undone. Nothing is trained. `accumulates` tells if gradients of several
    batches are summed.

    Raises:
        UserError: where not even that fits.
    """
    weights, moments = dict(learner.weights), dict(tree_flatten(learner.optimizer.state))
    forward.model.train()
    mx.eval(moments)
    peaks: list[int] = []
    for count in range(1, min(rows, 2) + 1):
        mx.clear_cache()
        mx.reset_peak_memory()
        with explain_out_of_memory():
            ready = forward.prepare([longest] * count)
            _, gradient = forward.loss_and_gradient(learner.weights, ready)
            mx.eval(gradient)
        peaks.append(mx.get_peak_memory())
    learner.add(gradient)
    del gradient
    mx.reset_peak_memory()
    with explain_out_of_memory():
        learner.update(mx.array(0.0))
        mx.eval(learner.weights, learner.optimizer.state)
    learner.put_back(weights, moments)
    forward.set_weights(learner.weights)
    size = sum(array.nbytes for array in weights.values())
    # Both phases may hold two more sets of weights: the best so far, and a sum of gradients.
    held = size * (1 + accumulates)
    backward = peaks[0] + (rows - 1) * (peaks[-1] - peaks[0])
    return max(backward + held, mx.get_peak_memory())
