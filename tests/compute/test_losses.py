"""The loss in chunks, beside one in float64."""

import mlx.core as mx
import numpy as np
import pytest

from athanor.compute import losses
from athanor.compute.arrays import SupervisedBatch


@pytest.mark.parametrize("scale", [1.0, 8.0, 1e4])
def test_loss_and_gradient_are_those_of_float64(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks; of confident models, of huge logits, and of logits masked by -inf."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0, scale, (10, 31)).astype(np.float32)
    logits[:, 7] = -np.inf
    targets = np.array([1, 2, 3, 4, 5, 6, 8, 9, 10, 11])
    counts = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], np.float32)
    if scale == 8.0:
        logits[np.arange(10), targets] = logits.max(axis=1) + 12
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    score = wide[np.arange(10), targets] - wide.max(axis=1)
    expected = np.log(powers.sum(axis=1)) - score
    softmax[np.arange(10), targets] -= 1
    monkeypatch.setattr(losses, "CHUNK", 4 * 31 * 3)

    def head(hidden: mx.array) -> mx.array:
        return hidden * 1.0

    hidden, places = mx.array(logits), mx.arange(10)
    batch = SupervisedBatch(places, places, mx.array(targets), mx.array(counts))
    total, gradient, _ = losses.loss_and_gradients(head, hidden, [], batch, 31)
    graph_total, graph_gradient = mx.value_and_grad(
        lambda hidden: losses.differentiable_loss(head, hidden, [], batch, 31)
    )(hidden)
    assert np.array(total) == pytest.approx((expected * counts).sum(), rel=1e-6)
    assert np.array(graph_total) == pytest.approx(
        np.array(total), rel=1e-2 if scale == 8.0 else 1e-6
    )
    for array in (gradient, graph_gradient):
        np.testing.assert_allclose(array, softmax * counts[:, None], atol=1e-6)
    each = losses.token_losses(head, hidden, batch, 31)
    np.testing.assert_allclose(each, expected[counts > 0], rtol=1e-6, atol=1e-9)
