"""The SiLU of Linux's CPU."""

import mlx.core as mx
import numpy as np

from athanor.device.silu import silu


def test_silu_is_mlxs_own() -> None:
    x = mx.concatenate([mx.linspace(-30, 30, 4001), mx.array([-1e4, -200.0, -88.0, 200.0, 1e4])])
    wide = np.array(x, np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-wide))
    np.testing.assert_allclose(silu(x), wide * sigmoid, rtol=2e-6, atol=1e-6)
    slope = mx.grad(lambda x: silu(x).sum())(x)
    np.testing.assert_allclose(slope, sigmoid * (1 + wide * (1 - sigmoid)), rtol=1e-5, atol=2e-6)
    assert np.isnan(np.array(silu(mx.array([np.nan])))).all()
    half = x.astype(mx.bfloat16)
    assert silu(half).dtype == mx.bfloat16
