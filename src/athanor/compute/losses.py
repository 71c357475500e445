"""The cross-entropy of what a head says at some positions, and its gradient, a chunk at a time.

Logits are the largest thing in a training: a vocabulary for each position. They are made of the
positions that a loss looks at, of so many at once that they take CHUNK bytes, and are gone before
the next are made, since what is left of them is the gradient of what the head was given: their
gradient takes their place (on a CPU, where NumPy computes exponentials 20 times as fast as mlx, and
in mlx's memory), or is computed along with them (elsewhere, in one graph, as mx.compile wants it).
Exact either way. After "Cut Your Losses" (Wijmans et al. 2024) and Liger Kernel (Hsu et al. 2024),
which fuse the same in kernels of their own.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from athanor.compute.arrays import SupervisedBatch

# Bytes of float32 logits at a time.
CHUNK = 1 << 27

Head = Callable[..., mx.array]  # of hidden, n × width, and of the trained weights that it takes


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """The positions in pieces whose logits take CHUNK bytes."""
    size = max(CHUNK // (4 * vocabulary), 1)
    return (slice(start, start + size) for start in range(0, positions, size))


def token_losses(
    head: Head, hidden: mx.array, batch: SupervisedBatch, vocabulary: int
) -> np.ndarray:
    """The cross-entropy in nats of each target that counts, for hidden, n × width."""
    found, targets = [], batch.targets
    for piece in chunks(len(targets), vocabulary):
        logits = head(hidden[piece]).astype(mx.float32)
        if in_numpy():
            losses, _ = _in_place(logits, targets[piece])
        else:
            losses = np.array(nn.losses.cross_entropy(logits, targets[piece]))
        found.append(losses)
    return np.concatenate(found)[np.array(batch.counts) > 0]


def in_numpy() -> bool:
    """Whether NumPy can and should compute on mlx's memory: on a CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def loss_and_gradients(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    batch: SupervisedBatch,
    vocabulary: int,
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """On a CPU: the summed loss in nats, and its gradients by hidden and by the head's weights.

    Args:
        head: the logits of hidden and weights.
        hidden: n × width, evaluated.
    """
    targets, counts = batch.targets, batch.counts
    total, by_hidden = 0.0, []
    by_weights: list[mx.array] = [mx.zeros_like(weight) for weight in weights]
    for piece in chunks(len(targets), vocabulary):
        logits = head(hidden[piece], *weights)
        losses, gradient = _in_place(logits.astype(mx.float32), targets[piece])
        count = np.array(counts[piece])
        if not count.all():
            gradient = mx.where(counts[piece, None] > 0, gradient, 0.0)
        total += float(losses[count > 0].sum(dtype=np.float64))
        # Of a head that is linear nothing is computed again: mlx computes what is asked for.
        _, (one, *others) = mx.vjp(head, [hidden[piece], *weights], [gradient.astype(logits.dtype)])
        by_hidden.append(one)
        by_weights = [a + b for a, b in zip(by_weights, others, strict=True)]
        mx.eval(one, by_weights)
    return mx.array(total), mx.concatenate(by_hidden), by_weights


def _in_place(logits: mx.array, targets: mx.array) -> tuple[np.ndarray, mx.array]:
    """The loss of each target, and in the place of the logits, n × vocabulary, its gradient."""
    mx.eval(logits)
    values = np.array(logits, copy=False)
    said, rows = np.array(targets), np.arange(len(targets))
    with np.errstate(all="ignore"):  # what is no number is refused where it is met as a loss
        top = values.max(axis=-1, keepdims=True)
        score = (values[rows, said] - top[:, 0]).astype(np.float64)
        np.subtract(values, top, out=values)
        np.exp(values, out=values)
        # In float32 a model that is sure of itself loses what it is not sure of: mlx's own sum is
        # 11% off at a loss of 0.0002, and so is its gradient.
        total = values.sum(axis=-1, dtype=np.float64)
        others = total - values[rows, said]
        np.divide(values, total[:, None].astype(np.float32), out=values)
        values[rows, said] = -others / total
        losses = np.log(total) - score
    return losses, logits


def differentiable_loss(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    batch: SupervisedBatch,
    vocabulary: int,
) -> mx.array:
    """The summed loss in nats, to be differentiated by mlx; arguments as for `loss_and_gradients`.

    The gradients are computed with the loss, chunk after chunk, and only scaled when they are asked
    for. No second derivative.
    """
    targets, counts = batch.targets, batch.counts

    def of_piece(
        hidden: mx.array, weights: list[mx.array], targets: mx.array, counts: mx.array
    ) -> mx.array:
        logits = head(hidden, *weights).astype(mx.float32)
        return mx.where(counts > 0, nn.losses.cross_entropy(logits, targets), 0.0).sum()

    with_gradients = mx.value_and_grad(of_piece, argnums=(0, 1))

    @mx.custom_function
    def fused(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, by_hidden = mx.array(0.0), []
        by_weights = [mx.zeros_like(weight) for weight in weights]
        before: list[mx.array] = []
        for piece in chunks(len(targets), vocabulary):
            # One after the other: else all logits might be there at once.
            given = mx.depends([hidden[piece]], before)[0] if before else hidden[piece]
            loss, (one, others) = with_gradients(
                given, list(weights), targets[piece], counts[piece]
            )
            total = total + loss
            by_hidden.append(one)
            by_weights = [a + b for a, b in zip(by_weights, others, strict=True)]
            before = [total, one, *by_weights]
        return total, mx.concatenate(by_hidden), *by_weights

    @fused.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(cotangents[0] * gradient for gradient in outputs[1:])

    return cast("tuple[mx.array, ...]", fused(hidden, *weights))[0]
