"""Updates: mlx's optimizers applied to many arrays at once."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from athanor.compute import optimizers
from athanor.device.backend import compile_kernels
from athanor.train import learner
from athanor.train.learner import Learner, packs

OF_A_LAYER = {"lora_a": (24, 4), "lora_b": (4, 17), "m": (5,)}
SHAPES = {f"layers.{i}.{name}": shape for i in range(3) for name, shape in OF_A_LAYER.items()}


def arrays(seed: int) -> dict[str, mx.array]:
    draw = np.random.default_rng(seed)
    return {
        name: mx.array(draw.normal(size=shape).astype("f4")) for name, shape in SHAPES.items()
    } | {"norm": mx.array(draw.normal(size=6)).astype(mx.bfloat16)}


@pytest.fixture(params=[False, True])
def compile(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Switch mlx's compiler on or off; loading a model on a CPU switches it off."""
    compile_kernels(request.param)
    yield request.param
    compile_kernels(False)


@pytest.mark.parametrize("limit", [None, 1e-3])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_an_update_is_mlx_s_own(name: str, compile: bool, limit: float | None) -> None:
    """To the byte, unless clipped: the norm is a sum in another order; with two batches added."""
    options = {"weight_decay": 0.1} if name in ("adamw", "lion") else {}
    learned = Learner(
        arrays(0), optimizers.build_optimizer(name, options, 0.01), limit, compile=compile
    )
    plain = optimizers.build_optimizer(name, options, 0.01)
    expected = arrays(0)
    plain.init(expected)
    for step in range(3):
        first, second = arrays(2 * step + 1), arrays(2 * step + 2)
        learned.add(first)
        learned.add(second)
        norm = learned.update(mx.array(0.5))
        gradient = {key: (first[key] + second[key]) * mx.array(0.5) for key in first}
        gradient, length = optim.clip_grad_norm(gradient, limit or float("inf"))
        expected = plain.apply_gradients(gradient, expected)
        mx.eval(learned.weights, expected)
        assert norm.item() == pytest.approx(length.item(), rel=1e-6)
        assert learned.gradient is None
        assert list(learned.weights) == list(expected)
        for key, value in expected.items():
            updated = learned.weights[key]
            assert (updated.dtype, updated.shape) == (value.dtype, value.shape)
            close = mx.allclose(updated, value, rtol=1e-2 if key == "norm" else 1e-5, atol=1e-7)
            assert mx.array_equal(updated, value) if limit is None else close, key


def test_small_arrays_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their dtypes, and never more at once than makes a pack."""
    weights, names = arrays(0), list(SHAPES)
    assert packs(weights) == [names, ["norm"]]
    assert (
        len(Learner(weights, optimizers.build_optimizer("adam", {}, 0.1)).optimizer.state) == 2 + 2
    )
    assert len(
        Learner(weights, optimizers.build_optimizer("muon", {}, 0.1)).optimizer.state
    ) == 2 + len(weights)
    monkeypatch.setattr(learner, "PACK", 300)  # lora_a takes 384 bytes, lora_b 272, m 20
    packed = packs(weights)
    assert sorted(name for pack in packed for name in pack) == sorted(weights)
    assert [len(pack) for pack in packed] == [1, 2, 1, 2, 1, 2, 1]


def test_the_norm_of_a_long_gradient_is_exact() -> None:
    """mlx sums float32 one after the other on a CPU: of 4 million in a row, 0.2% are lost."""
    draw = np.random.default_rng(0)
    many = {f"{i}": draw.normal(size=(32, 896)).astype("f4") for i in range(150)}
    learned = Learner({key: mx.zeros(value.shape) for key, value in many.items()}, optim.SGD(1.0))
    learned.add({key: mx.array(value) for key, value in many.items()})
    expected = np.sqrt(sum(np.square(value, dtype="f8").sum() for value in many.values()))
    assert learned.update(mx.array(1.0)).item() == pytest.approx(expected, rel=2e-5)
