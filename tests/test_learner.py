"""An update: what mlx's optimizers make of each array, made of many at once."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from athanor import learner, optimizers
from athanor.learner import Learner, packs

OF_A_LAYER = {"lora_a": (24, 4), "lora_b": (4, 17), "m": (5,)}
SHAPES = {f"layers.{i}.{name}": shape for i in range(3) for name, shape in OF_A_LAYER.items()}


def arrays(seed: int) -> dict[str, mx.array]:
    draw = np.random.default_rng(seed)
    return {
        name: mx.array(draw.normal(size=shape).astype("f4")) for name, shape in SHAPES.items()
    } | {"norm": mx.array(draw.normal(size=6)).astype(mx.bfloat16)}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_an_update_is_mlx_s_own_to_the_byte(name: str, compile: bool) -> None:
    """Whatever arrays are updated as one; also where gradients of two batches are summed."""

    def options() -> dict[str, Any]:
        return {"weight_decay": 0.1} if name in ("adamw", "lion") else {}

    one = Learner(arrays(0), optimizers.build(name, options(), 0.01), compile=compile)
    plain = optimizers.build(name, options(), 0.01)
    expected = arrays(0)
    plain.init(expected)
    for step in range(3):
        first, second = arrays(2 * step + 1), arrays(2 * step + 2)
        one.add(first)
        one.add(second)
        norm = one.update(mx.array(0.5))
        # As Trainer has it, of which only the packing is tried here.
        gradient = {key: (first[key] + second[key]) * mx.array(0.5) for key in first}
        gradient, length = optim.clip_grad_norm(gradient, float("inf"))
        expected = plain.apply_gradients(gradient, expected)
        mx.eval(one.weights, expected)
        assert norm.item() == pytest.approx(length.item(), rel=1e-3)
        assert one.gradient is None
        assert list(one.weights) == list(expected)
        for key, value in expected.items():
            assert one.weights[key].dtype == value.dtype
            assert one.weights[key].shape == value.shape
            assert mx.array_equal(one.weights[key], value), key


def test_small_arrays_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their dtypes, the large ones alone, and never more at once than makes a pack."""
    given = arrays(0)
    names = list(SHAPES)
    assert packs(given) == [names, ["norm"]]
    assert len(Learner(given, optimizers.build("adam", {}, 0.1)).optimizer.state) == 2 + 2
    assert len(Learner(given, optimizers.build("muon", {}, 0.1)).optimizer.state) == 2 + len(given)
    monkeypatch.setattr(learner, "SMALL", 300)  # lora_a takes 384 bytes, lora_b 272, m 20
    monkeypatch.setattr(learner, "PACK", 600)
    alone = [[name] for name in names if name.endswith("lora_a")]
    found = packs(given)
    assert sorted(name for one in found for name in one) == sorted(given)
    assert all(one in found for one in alone)
    assert [len(one) for one in found if one not in alone] == [4, 2, 1]
    assert all(sum(given[name].nbytes for name in one) <= 600 for one in found)
