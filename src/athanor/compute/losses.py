"""The cross-entropy at some positions, and its gradient, computed without all logits at once.

Logits are the largest arrays of a training: a vocabulary for each position. They are computed at
supervised positions only, in chunks of CHUNK bytes, and each chunk is reduced to the gradient of
its hidden states before the next is computed. On a CPU NumPy, whose exponentials are 20 times as
fast as mlx's, overwrites them by their gradient; elsewhere both are one graph, as mx.compile needs
it. Both are exact. After "Cut Your Losses" (Wijmans et al. 2024) and Liger Kernel (Hsu et al.
2024), which fuse the same steps in kernels.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from athanor.compute.arrays import SupervisedBatch
from athanor.device.backend import on_cpu

# Bytes of float32 logits in a chunk.
CHUNK = 1 << 27

# Logits [n, vocabulary] of hidden states [n, width] and of the head's trained weights.
Head = Callable[..., mx.array]


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Return slices of the positions whose logits take CHUNK bytes."""
    size = max(CHUNK // (4 * vocabulary), 1)
    return (slice(start, start + size) for start in range(0, positions, size))


def token_losses(
    head: Head, hidden: mx.array, batch: SupervisedBatch, vocabulary: int
) -> np.ndarray:
    """Return the cross-entropy in nats of each target that counts, for hidden states [n, width]."""
    losses, targets = [], batch.targets
    for chunk in chunks(len(targets), vocabulary):
        logits = head(hidden[chunk]).astype(mx.float32)
        if on_cpu():
            losses.append(_overwrite_by_gradient(logits, targets[chunk])[0])
        else:
            losses.append(np.array(nn.losses.cross_entropy(logits, targets[chunk])))
    return np.concatenate(losses)[np.array(batch.counts) > 0]


def loss_and_gradients(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    batch: SupervisedBatch,
    vocabulary: int,
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Return the summed loss in nats, and its gradients by `hidden` and by the head's weights.

    For the CPU, where NumPy computes on mlx's memory.

    Args:
        hidden: evaluated hidden states [n, width].
        weights: the trained weights that the head takes.
    """
    targets, counts = batch.targets, batch.counts
    total, by_hidden = 0.0, []
    by_weights: list[mx.array] = [mx.zeros_like(weight) for weight in weights]
    for chunk in chunks(len(targets), vocabulary):
        logits = head(hidden[chunk], *weights)
        losses, gradient = _overwrite_by_gradient(logits.astype(mx.float32), targets[chunk])
        count = np.array(counts[chunk])
        if not count.all():
            gradient = mx.where(counts[chunk, None] > 0, gradient, 0.0)
        total += float(losses[count > 0].sum(dtype=np.float64))
        # A linear head is not computed again: mlx evaluates only what the gradients depend on.
        _, (chunk_by_hidden, *chunk_by_weights) = mx.vjp(
            head, [hidden[chunk], *weights], [gradient.astype(logits.dtype)]
        )
        by_hidden.append(chunk_by_hidden)
        by_weights = [a + b for a, b in zip(by_weights, chunk_by_weights, strict=True)]
        mx.eval(chunk_by_hidden, by_weights)
    return mx.array(total), mx.concatenate(by_hidden), by_weights


def _overwrite_by_gradient(logits: mx.array, targets: mx.array) -> tuple[np.ndarray, mx.array]:
    """Return the loss of each target, and its gradient in place of the logits [n, vocabulary]."""
    mx.eval(logits)
    values = np.array(logits, copy=False)
    columns, rows = np.array(targets), np.arange(len(targets))
    with np.errstate(all="ignore"):  # the trainer refuses a loss that is not finite
        top = values.max(axis=-1, keepdims=True)
        score = (values[rows, columns] - top[:, 0]).astype(np.float64)
        np.subtract(values, top, out=values)
        np.exp(values, out=values)
        # In float64: where one token has nearly all probability, a sum in float32 loses the rest.
        # mlx's own is 11% off at a loss of 0.0002, and so is its gradient.
        total = values.sum(axis=-1, dtype=np.float64)
        others = total - values[rows, columns]
        np.divide(values, total[:, None].astype(np.float32), out=values)
        values[rows, columns] = -others / total
        losses = np.log(total) - score
    return losses, logits


def differentiable_loss(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    batch: SupervisedBatch,
    vocabulary: int,
) -> mx.array:
    """Return the summed loss in nats as a graph; arguments as for `loss_and_gradients`.

    Its gradients are computed with the loss, chunk by chunk, and only scaled by its vjp. It has no
    second derivative.
    """
    targets, counts = batch.targets, batch.counts

    def chunk_loss(
        hidden: mx.array, weights: list[mx.array], targets: mx.array, counts: mx.array
    ) -> mx.array:
        logits = head(hidden, *weights).astype(mx.float32)
        return mx.where(counts > 0, nn.losses.cross_entropy(logits, targets), 0.0).sum()

    with_gradients = mx.value_and_grad(chunk_loss, argnums=(0, 1))

    @mx.custom_function
    def fused(hidden: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        total, by_hidden = mx.array(0.0), []
        by_weights = [mx.zeros_like(weight) for weight in weights]
        previous: list[mx.array] = []
        for chunk in chunks(len(targets), vocabulary):
            # In turn: else the logits of all chunks could be in memory at once.
            part = mx.depends([hidden[chunk]], previous)[0] if previous else hidden[chunk]
            loss, (chunk_by_hidden, chunk_by_weights) = with_gradients(
                part, list(weights), targets[chunk], counts[chunk]
            )
            total = total + loss
            by_hidden.append(chunk_by_hidden)
            by_weights = [a + b for a, b in zip(by_weights, chunk_by_weights, strict=True)]
            previous = [total, chunk_by_hidden, *by_weights]
        return total, mx.concatenate(by_hidden), *by_weights

    @fused.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(cotangents[0] * gradient for gradient in outputs[1:])

    return cast("tuple[mx.array, ...]", fused(hidden, *weights))[0]
