"""Loss and gradient of a split model: those of the whole one, with less computed."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers

from athanor.compute import losses
from athanor.compute.forward import Forward, trainable_weights
from athanor.config.schema import TrainConfig
from athanor.device.backend import compile_kernels
from athanor.model.adapters import make_trainable
from support.models import (
    ARCHITECTURES,
    ROWS,
    UNSPLIT,
    Body,
    Layer,
    SmallModel,
    add_adapters,
    assert_same,
    build_model,
    freeze_layers,
    random_text,
    randomize,
    whole_loss_and_gradient,
)

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """Run what is compiled as it is: mlx's compiler takes seconds a shape on a CPU."""
    compile_kernels(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_what_the_whole_model_gives(name: str) -> None:
    """Loss, gradient and token losses; with the loss by NumPy, and in one graph."""
    model = add_adapters(build_model(name))
    frozen = freeze_layers(model)
    assert (frozen.parts.unsplit_reason is not None) is (name in UNSPLIT)
    assert frozen.choose_cut(trainable_weights(model)) == 2, frozen.parts.uncut_reasons
    expected = whole_loss_and_gradient(model)
    weights = trainable_weights(model)
    for compile in (False, True):
        forward = Forward(model, frozen.parts, frozen, 2, compile=compile)
        prepared = forward.prepare(ROWS)
        assert prepared.activations is not None
        assert_same(forward.loss_and_gradient(weights, prepared), expected)
        assert forward.token_losses(prepared).sum() == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(("name", "outside"), [("qwen2", 1), ("llama", 2)])
def test_a_trained_head_gets_its_gradient(name: str, outside: int) -> None:
    """Rows of embedding and head are trained for a new end token: tied in qwen2, two in llama."""
    model = build_model(name)
    make_trainable(model, TrainConfig(num_layers=2, rank=4, scale=2.0, dropout=0.0), 0, end=7)
    randomize(model)
    frozen = freeze_layers(model)
    assert frozen.choose_cut(trainable_weights(model)) == 0
    expected = whole_loss_and_gradient(model)
    assert sum(".layers." not in weight for weight in expected[1]) == outside
    for compile in (False, True):
        forward = Forward(model, frozen.parts, compile=compile)
        weights, prepared = trainable_weights(model), forward.prepare(ROWS)
        assert_same(forward.loss_and_gradient(weights, prepared), expected)


@pytest.mark.parametrize(
    ("model", "unsplit", "uncut"),
    [
        (SmallModel(), None, None),
        (SmallModel(Body(writes=0, reads=4)), None, "the layers above need more"),
        (SmallModel(mixes=True), "head", None),
        (SmallModel(drops=0.1), None, "there is dropout below the cut"),
    ],
    ids=["plain", "skips", "mixes", "drops"],
)
def test_models_that_cannot_be_split_are_computed_whole(
    model: SmallModel, unsplit: str | None, uncut: str | None, capsys: Any
) -> None:
    model.freeze()
    model.layers[-1].unfreeze()
    frozen = freeze_layers(model)
    cut = frozen.choose_cut(trainable_weights(model))
    warnings = capsys.readouterr().err
    assert (frozen.parts.unsplit_reason is None) is (unsplit is None)
    assert unsplit is None or unsplit in str(frozen.parts.unsplit_reason)
    assert cut == (0 if uncut else 4)
    if uncut:
        assert "all layers are computed every time" in warnings
        assert uncut in warnings
    forward = Forward(model, frozen.parts, frozen, cut)
    assert_same(
        forward.loss_and_gradient(trainable_weights(model), forward.prepare(ROWS)),
        whole_loss_and_gradient(model),
    )


class Wide(nn.Module):
    """Another kind of layer than Layer."""

    ran = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def __call__(self, h: mx.array) -> mx.array:
        Wide.ran += 1
        return h + self.down(nn.relu(self.up(h)))


def test_grad_checkpoint_recomputes_layers_of_every_class() -> None:
    model = SmallModel()
    model.body.layers[1], model.body.layers[3] = Wide(), Wide()
    model.freeze()
    for layer in model.layers[1:]:
        layer.unfreeze()
    frozen = freeze_layers(model)
    expected = whole_loss_and_gradient(model)
    before: list[Any] = [Layer.__call__, Wide.__call__]
    counts = []
    for grad_checkpoint in (False, True):
        forward = Forward(model, frozen.parts, frozen, 1, grad_checkpoint=grad_checkpoint)
        prepared = forward.prepare(ROWS)
        Wide.ran = 0
        assert_same(forward.loss_and_gradient(trainable_weights(model), prepared), expected)
        counts.append(Wide.ran)
    assert counts == [2, 4]
    after: list[Any] = [Layer.__call__, Wide.__call__]
    assert after == before


def to_half(model: nn.Module) -> None:
    """Make a base bfloat16, and its trainable weights float32, as make_trainable does."""
    trained = set(trainable_weights(model))
    model.update(
        tree_map_with_path(
            lambda name, array: array.astype(mx.float32 if name in trained else mx.bfloat16),
            model.parameters(),
        )
    )


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_half_precision_computes_in_half_and_trains_in_float32(method: str) -> None:
    """The base in bfloat16; trained weights and gradients in float32; close to all in float32."""
    model = build_model("qwen2")
    model.freeze()
    if method == "full":
        for layer in model.layers[-2:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, 2, LORA, use_dora=method == "dora")
    expected = whole_loss_and_gradient(model)
    to_half(model)
    weights = trainable_weights(model)
    assert {array.dtype for array in weights.values()} == {mx.float32}
    frozen = freeze_layers(model)
    assert frozen.parts.unsplit_reason is None
    forward = Forward(model, frozen.parts, frozen, frozen.choose_cut(trainable_weights(model)))
    assert forward.cut == 2
    assert forward.dtype == mx.bfloat16
    prepared = forward.prepare(ROWS)
    assert prepared.activations is not None
    assert prepared.activations.dtype == mx.bfloat16
    loss, gradient = forward.loss_and_gradient(weights, prepared)
    assert loss.dtype == mx.float32
    assert {array.dtype for array in gradient.values()} == {mx.float32}
    computed = {array.dtype for array in trainable_weights(model).values()}
    assert computed == {mx.bfloat16 if method == "full" else mx.float32}
    assert forward.hidden(prepared).dtype == mx.bfloat16
    assert loss.item() == pytest.approx(expected[0], rel=2e-3)
    size = max(float(mx.abs(array).max()) for array in expected[1].values())
    for name, array in gradient.items():
        assert float(mx.abs(array - expected[1][name]).mean()) <= 0.01 * size, name


@pytest.mark.parametrize("dora", [False, True])
def test_setting_adapters_in_half_precision_changes_nothing(dora: bool) -> None:
    """Magnitudes of DoRA are divided by norms: rounded by themselves they would not be 1."""
    model = build_model("qwen2")
    model.set_dtype(mx.bfloat16)
    model.freeze()
    linear_to_lora_layers(model, 2, LORA, use_dora=dora)
    to_half(model)
    forward = Forward.from_model(model, ROWS)
    prepared = forward.prepare(ROWS)
    before = forward.hidden(prepared)
    forward.set_weights(trainable_weights(model))
    assert mx.array_equal(before, forward.hidden(prepared))


def test_the_logits_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of half of 6 × 128 positions and 20,000 tokens take 31 MB, as do their gradients."""
    model = add_adapters(build_model("qwen2", vocab_size=20000))
    rows = [random_text(129, seed) for seed in range(6)]
    monkeypatch.setattr(losses, "CHUNK", 2**20)
    in_steps = Forward.from_model(model, rows)
    as_graph = Forward(model, in_steps.parts, compile=True)
    weights, prepared = trainable_weights(model), in_steps.prepare(rows)
    mx.eval(*prepared.batch)
    peaks = []
    for compute in (
        lambda: in_steps.loss_and_gradient(weights, prepared),
        lambda: as_graph.loss_and_gradient(weights, prepared),
        lambda: whole_loss_and_gradient(model, rows),
    ):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(compute())
        peaks.append(mx.get_peak_memory() - before)
        in_steps.set_weights(weights)
    steps, graph, whole = peaks
    assert steps < 19e6
    assert graph < 25e6
    assert whole > 31e6
