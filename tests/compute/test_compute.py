"""A model taken apart: the same loss and gradient as the whole, and nothing computed twice."""

import dataclasses
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers

from athanor.chat.load import load_tokenizer, load_with_tokenizer
from athanor.chat.tokens import tokenize_rows
from athanor.compute import losses, parts
from athanor.compute.arrays import SupervisedBatch, TokenizedText
from athanor.compute.forward import Forward, probe_tokens, trainable_weights
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.compose import compose_config
from athanor.device.silu import silu
from athanor.model import adapters
from athanor.model.adapters import make_trainable
from athanor.model.load import copy_sharing_weights
from athanor.paths import Workspace
from athanor.train import shared
from athanor.train.build import build_frozen, build_trainer
from athanor.train.memory import predict_peak
from athanor.train.shared import SharedBase

PLENTY = Budget(10**9, 0, Path())


def row(length: int, seed: int = 0) -> TokenizedText:
    """Random tokens of which the second half is learned."""
    ids = np.random.default_rng([length, seed]).integers(0, 150, length).tolist()
    return TokenizedText(ids, [place >= length // 2 for place in range(length)], seed)


ROWS = [row(20), row(13), row(9), row(17)]

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# By mlx-lm's modules; mistral is llama there. The last three can't be taken apart whole.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "cohere": {"logit_scale": 0.0625},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt2": {"n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5, "layer_norm_eps": 1e-5},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}
WHOLE = {"gpt_neox", "mamba"}


def made(name: str) -> nn.Module:
    """A small model of random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    given = {"model_type": name, "layer_norm_epsilon": 1e-5} | COMMON | ARCHITECTURES[name]
    mx.random.seed(0)
    model = module.Model(
        module.ModelArgs(**{key: value for key, value in given.items() if key in known})
    )
    mx.eval(model.parameters())
    found: nn.Module = model
    return found


def adapted(model: nn.Module, layers: int = 2) -> nn.Module:
    """With LoRA that has moved on its last layers."""
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    moved = tree_map(lambda one: mx.random.normal(one.shape) * 0.1, model.trainable_parameters())
    model.update(moved)
    mx.eval(model.parameters())
    return model


def plain(model: nn.Module, rows: list[TokenizedText] = ROWS) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradient of whole rows, one by one, by mlx's own functions."""

    def loss(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for one in rows:
            logits = model(mx.array([one.ids[:-1]]))[0].astype(mx.float32)
            each = nn.losses.cross_entropy(logits, mx.array(one.ids[1:]))
            total = total + (each * mx.array(one.supervised[1:])).sum()
        return total

    found, gradient = nn.value_and_grad(model, loss)(model)
    return found.item(), dict(tree_flatten(gradient))


def assert_same(
    found: tuple[mx.array, Any], expected: tuple[float, dict[str, mx.array]], rel: float = 1e-5
) -> None:
    assert found[0].item() == pytest.approx(expected[0], rel=rel)
    gradient = found[1]
    assert gradient.keys() == expected[1].keys()
    size = max(float(mx.abs(one).max()) for one in expected[1].values())
    assert size > 0
    for name, one in gradient.items():
        assert float(mx.abs(one - expected[1][name]).max()) <= rel * size, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_what_the_whole_model_gives(name: str) -> None:
    """Loss, gradient and token losses; by NumPy's side of the loss, and in one graph."""
    model = adapted(made(name))
    frozen = FrozenLayers(Parts.find(model, probe_tokens(ROWS)), PLENTY)
    assert (frozen.parts.unsplit_reason is not None) is (name in WHOLE), frozen.parts.unsplit_reason
    assert frozen.choose_cut(trainable_weights(model)) == 2, frozen.parts.uncut_reasons
    forward = Forward(model, frozen.parts, frozen, 2)
    expected = plain(model)
    weights, ready = trainable_weights(model), forward.prepare(ROWS)
    assert_same(forward.loss_and_gradient(weights, ready), expected)
    assert forward.token_losses(ready).sum() == pytest.approx(expected[0], rel=1e-5)
    assert ready.activations is not None
    loss, found = forward._graph(list(weights.values()), list(ready.batch), [ready.activations])
    forward.set_weights(weights)
    assert_same((loss, dict(zip(weights, found, strict=True))), expected)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    """Of an end that the base can't say, rows of embedding and head are trained: tied and not."""
    for name in ("qwen2", "llama"):
        model = adapted(made(name))
        fine = dataclasses.make_dataclass("Fine", ["rank", "scale"])(4, 2.0)
        ends = adapters._ends_of_model(model)
        adapters._make_row_trainable(model, fine, 7)
        for part in ends:
            layer: Any = dict(model.named_modules())[part]
            layer.lora_a, layer.lora_b = layer.lora_a + 0.01, layer.lora_b + 0.01
        frozen = FrozenLayers(Parts.find(model, probe_tokens(ROWS)), PLENTY)
        assert frozen.choose_cut(trainable_weights(model)) == 0
        forward = Forward(model, frozen.parts)
        weights, ready = trainable_weights(model), forward.prepare(ROWS)
        assert len(forward._beside) == (1 if name == "qwen2" else 2)
        expected = plain(model)
        assert_same(forward.loss_and_gradient(weights, ready), expected)
        loss, found = forward._graph(list(weights.values()), list(ready.batch), [])
        forward.set_weights(weights)
        assert_same((loss, dict(zip(weights, found, strict=True))), expected)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 16)

    def __call__(self, h: mx.array) -> mx.array:
        return h + nn.relu(self.map(h))


class Body(nn.Module):
    """Layers of which the last looks past those between, at what the first made."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 16)
        self.layers = [Layer() for _ in range(4)]
        self.skips = skips

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h = first = self.embed(ids)
        for place, layer in enumerate(self.layers):
            h = layer(h)
            first = h if place == 0 else first
        return h + first if self.skips else h


class Small(nn.Module):
    """A model whose head may look at its neighbours, or drop out below its layers."""

    def __init__(self, skips: bool = False, mixes: bool = False, drops: float = 0.0) -> None:
        super().__init__()
        self.body = Body(skips)
        self.head = nn.Linear(16, 160)
        self.mixes = mixes
        self.drop = nn.Dropout(drops)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h = self.body(ids, cache)
        logits: mx.array = self.head(mx.cumsum(h, axis=1) if self.mixes else h)
        return logits

    @property
    def layers(self) -> list[nn.Module]:
        return self.body.layers


@pytest.mark.parametrize(
    ("given", "whole", "uncut"),
    [
        ({}, None, None),
        ({"skips": True}, None, "the layers above the cut need more"),
        ({"mixes": True}, "head", None),
        ({"drops": 0.1}, None, "it drops out below the cut"),
    ],
)
def test_what_can_t_be_taken_apart_is_computed_whole_and_said(
    given: dict[str, Any], whole: str | None, uncut: str | None, capsys: Any
) -> None:
    model = Small(**given)
    model.freeze()
    model.layers[-1].unfreeze()
    frozen = FrozenLayers(Parts.find(model, probe_tokens(ROWS)), PLENTY)
    cut = frozen.choose_cut(trainable_weights(model))
    said = capsys.readouterr().err
    assert (frozen.parts.unsplit_reason is None) is (whole is None)
    assert whole is None or whole in str(frozen.parts.unsplit_reason)
    assert cut == (0 if uncut else 3)
    assert uncut is None or ("all layers are computed every time" in said and uncut in said)
    forward = Forward(model, frozen.parts, frozen, cut)
    assert_same(
        forward.loss_and_gradient(trainable_weights(model), forward.prepare(ROWS)), plain(model)
    )


@contextmanager
def counted(model: nn.Module) -> Iterator[tuple[Counter[int], list[int]]]:
    """Counts the rows that each layer of a model computes, and the positions that the head does."""
    kind, embedding = type(model.layers[0]), type(model.model.embed_tokens)
    call, as_linear = kind.__call__, embedding.as_linear
    numbers: Counter[int] = Counter()
    positions = [0]

    def layer(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> mx.array:
        # By its weights: points of a sweep have layers of their own, and share the frozen arrays.
        numbers[id(self["input_layernorm"]["weight"])] += x.shape[0]
        found: mx.array = call(self, x, *others, **named)
        return found

    def head(self: nn.Module, x: mx.array) -> mx.array:
        positions[0] += x.size // x.shape[-1]
        found: mx.array = as_linear(self, x)
        return found

    kind.__call__, embedding.as_linear = layer, head
    try:
        yield numbers, positions
    finally:
        kind.__call__, embedding.as_linear = call, as_linear


@pytest.fixture(scope="module")
def tokens(tiny: Path, repo: Path) -> list[TokenizedText]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in [
            ("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
            ("月亮哪天最圆", "星期八"),
            ("谁是最帅的地球人", "德哥"),
            ("哪吒的师傅是谁", "孙悟空的师傅的舅舅"),
            ("为什么电动汽车比较费油", "因为电很贵"),
        ]
    ]
    return tokenize_rows(rows, load_tokenizer(tiny), True, 2048)


@pytest.fixture
def config(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def composed(**changed: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.chdir(repo)
            given = {"batch_size": 2, "epochs": 3, "iters": "null", "steps_per_eval": 2} | changed
            return compose_config(
                Path("conf"), [f"train.{key}={value}" for key, value in given.items()]
            )

    return composed


def test_a_frozen_layer_runs_once_a_row_whatever_epochs_and_points(
    tiny: Path, tokens: list[TokenizedText], config: Callable[..., Any]
) -> None:
    """Three points of a sweep, three epochs each, five validations: by count, in either order."""
    known, supervised = tokens[:3] + tokens[4:], tokens[3:]
    for order in ((2, 4, 3), (4, 3, 2)):
        base, _ = load_with_tokenizer(tiny)
        layers = len(base.layers)
        frozen = build_frozen(
            config(), Workspace.here(), base, tokens, [layers - number for number in order]
        )
        names = [id(layer["input_layernorm"]["weight"]) for layer in base.layers]
        expected: Counter[int] = Counter()
        asked = 0
        trainers = []
        for number in order:
            model = copy_sharing_weights(base)
            cfg = config(num_layers=number)
            make_trainable(model, cfg.train, cfg.seed)
            trainers.append(
                build_trainer(cfg, Workspace.here(), model, known, supervised, frozen=frozen)
            )
        with counted(base) as (ran, positions):
            for number, trainer in zip(order, trainers, strict=True):
                trainer.run()
                validations = sum("val_loss" in metrics for metrics in trainer.state.history)
                rows = 3 * len(known) + validations * len(supervised)
                # For the way back mlx asks for the head's graph again; of a linear head, that is
                # all: nothing of it is computed.
                asked += sum(
                    times * sum(sum(row.supervised[1:]) for row in part)
                    for times, part in ((2 * 3, known), (validations, supervised))
                )
                for place in range(layers - number, layers):
                    expected[names[place]] += rows
        # All five rows are different ones; the lowest cut is at layer 2, the highest at 4.
        for place in range(4):
            expected[names[place]] += len(tokens)
        assert ran == expected
        assert positions[0] == asked


def test_the_memory_of_a_training_is_predicted_once_a_shape(
    tiny: Path,
    tokens: list[TokenizedText],
    config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of six trials, three numbers of layers by two rates."""
    base, _ = load_with_tokenizer(tiny)
    computed: list[int] = []

    def counted(*args: Any, **options: Any) -> int:
        computed.append(predict_peak(*args, **options))
        return computed[-1]

    monkeypatch.setattr(shared, "predict_peak", counted)
    base_of_all = SharedBase()
    peaks: list[int] = []
    for rate in (1e-4, 1e-3):
        for number in (1, 3, 6):
            cfg = config(num_layers=number, learning_rate=rate)
            model = copy_sharing_weights(base)
            make_trainable(model, cfg.train, cfg.seed)
            trainer = build_trainer(cfg, Workspace.here(), model, tokens, tokens)
            peaks.append(base_of_all.predict_peak(cfg, trainer, tokens))
    assert len(computed) == 3
    assert computed[0] < computed[1] < computed[2]
    assert peaks == computed * 2


class Wide(nn.Module):
    """Another kind of layer than Layer."""

    ran = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def __call__(self, h: mx.array) -> mx.array:
        Wide.ran += 1
        return h + self.down(nn.relu(self.up(h)))


def test_layers_of_every_kind_are_computed_again_with_grad_checkpoint() -> None:
    model = Small()
    model.body.layers[1], model.body.layers[3] = Wide(), Wide()
    model.freeze()
    for layer in model.layers[1:]:
        layer.unfreeze()
    frozen = FrozenLayers(Parts.find(model, probe_tokens(ROWS)), PLENTY)
    expected = plain(model)
    before: list[Any] = [Layer.__call__, Wide.__call__]
    counts = []
    for again in (False, True):
        forward = Forward(model, frozen.parts, frozen, 1, grad_checkpoint=again)
        ready = forward.prepare(ROWS)
        Wide.ran = 0
        assert_same(forward.loss_and_gradient(trainable_weights(model), ready), expected)
        counts.append(Wide.ran)
    assert counts == [2, 4]
    after: list[Any] = [Layer.__call__, Wide.__call__]
    assert after == before


def test_nothing_is_kept_below_a_first_layer_that_learns(
    tiny: Path, tokens: list[TokenizedText], config: Callable[..., Any]
) -> None:
    base, _ = load_with_tokenizer(tiny)
    for method, number, cut in (("full", 2, 4), ("dora", 1, 5), ("lora", -1, 0)):
        model = copy_sharing_weights(base)
        cfg = config(method=method, num_layers=number)
        make_trainable(model, cfg.train, cfg.seed)
        trainer = build_trainer(cfg, Workspace.here(), model, tokens, tokens)
        assert trainer.forward.cut == cut
        off = config(method=method, num_layers=number, reuse_activations="false")
        assert build_trainer(off, Workspace.here(), model, tokens, tokens).forward.cut == 0


def test_where_activations_are_kept_changes_no_byte(tmp_path: Path) -> None:
    """In memory, in a file without a name, in both, not at all; and in any company."""
    model = made("qwen2")
    found = Parts.find(model, probe_tokens(ROWS))
    size = 4 * 64 * (len(ROWS[0].ids) - 1)
    expected = None
    for memory, disk in ((10**9, 0), (0, 10**9), (size, size), (0, 0)):
        frozen = FrozenLayers(found, Budget(memory, disk, tmp_path / "kept"))
        for _ in range(2):
            together = np.array(frozen.activations(ROWS, 2, 19))
            expected = together if expected is None else expected
            assert together.tobytes() == expected.tobytes()
            alone = np.array(frozen.activations(ROWS[2:3], 2, 8))
            assert alone[0].tobytes() == expected[2, :8].tobytes()
            assert (expected[2, 8:] == expected[2, 7]).all()
        assert frozen.in_memory <= memory
        assert frozen.on_disk <= disk
        assert frozen.in_memory + frozen.on_disk == min(
            memory + disk, 4 * 64 * sum(len(one.ids) - 1 for one in ROWS)
        ) or (memory, disk) == (size, size)
        assert not any((tmp_path / "kept").glob("*"))


def test_a_disk_that_is_full_costs_time_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("qwen2")
    frozen = FrozenLayers(
        Parts.find(model, probe_tokens(ROWS)), Budget(0, 10**9, Path("/dev/null/nowhere"))
    )
    first = np.array(frozen.activations(ROWS, 2, 19))
    assert np.array(frozen.activations(ROWS, 2, 19)).tobytes() == first.tobytes()
    said = capsys.readouterr().err
    assert said.count("and no more") == 1
    assert "train.activations_disk" in said


def test_deeper_cuts_go_on_from_what_is_kept() -> None:
    """To the same bytes as from the embedding."""
    model = made("qwen3")
    found = Parts.find(model, probe_tokens(ROWS))
    at_once, later = FrozenLayers(found, PLENTY, [1, 2, 3]), FrozenLayers(found, PLENTY)
    for cut in (1, 2, 3):
        assert np.array(at_once.activations(ROWS, 3, 19)).shape == (4, 19, 64)
        a, b = at_once.activations(ROWS, cut, 19), later.activations(ROWS, cut, 19)
        assert np.array(a).tobytes() == np.array(b).tobytes()


def in_half(model: nn.Module) -> None:
    """Makes a base bfloat16, and what is learned float32, as models.make_trainable does."""
    learned = set(trainable_weights(model))
    model.update(
        tree_map_with_path(
            lambda name, one: one.astype(mx.float32 if name in learned else mx.bfloat16),
            model.parameters(),
        )
    )


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_half_precision_computes_in_half_and_learns_in_float32(method: str) -> None:
    """The base in bfloat16; what is learned, and gradients, in float32; close to all in float32."""
    model = made("qwen2")
    model.freeze()
    if method == "full":
        for layer in model.layers[-2:]:
            layer.unfreeze()
    else:
        given = {"rank": 4, "scale": 2.0, "dropout": 0.0}
        linear_to_lora_layers(model, 2, given, use_dora=method == "dora")
    expected = plain(model)
    in_half(model)
    weights = trainable_weights(model)
    assert {one.dtype for one in weights.values()} == {mx.float32}
    frozen = FrozenLayers(Parts.find(model, probe_tokens(ROWS)), PLENTY)
    assert frozen.parts.unsplit_reason is None
    forward = Forward(model, frozen.parts, frozen, frozen.choose_cut(trainable_weights(model)))
    assert forward.cut == 2
    assert forward.dtype == mx.bfloat16
    ready = forward.prepare(ROWS)
    assert ready.activations is not None
    assert ready.activations.dtype == mx.bfloat16
    loss, gradient = forward.loss_and_gradient(weights, ready)
    assert loss.dtype == mx.float32
    assert {one.dtype for one in gradient.values()} == {mx.float32}
    computed = {one.dtype for one in trainable_weights(model).values()}
    assert computed == {mx.bfloat16 if method == "full" else mx.float32}
    assert forward._hidden(ready.batch, ready.activations).dtype == mx.bfloat16
    assert loss.item() == pytest.approx(expected[0], rel=2e-3)
    size = max(float(mx.abs(one).max()) for one in expected[1].values())
    for name, one in gradient.items():
        assert float(mx.abs(one - expected[1][name]).mean()) <= 0.01 * size, name


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_compute_as_mlx_lm_has_them_in_half_precision(dora: bool) -> None:
    """Magnitudes of DoRA are divided by norms: rounded by themselves they would not be 1."""
    model = made("qwen2")
    model.set_dtype(mx.bfloat16)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0}, use_dora=dora)
    in_half(model)
    forward = Forward.from_model(model, ROWS)
    batch = forward.prepare(ROWS).batch
    before = forward._hidden(batch, None)
    forward.set_weights(trainable_weights(model))
    assert mx.array_equal(before, forward._hidden(batch, None))


class Handed(nn.Module):
    """Layers of which one looks at what another made, without being handed it."""

    def __init__(self, writes: int, reads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 16)
        self.layers = [Layer() for _ in range(5)]
        self.writes, self.reads = writes, reads

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h, noted = self.embed(ids), mx.zeros(16)
        for place, layer in enumerate(self.layers):
            h = layer(h + noted if place == self.reads else h)
            noted = h if place == self.writes else noted
        return h


class Stateful(Layer):
    """A layer that keeps what it is given, or adds what another kept."""

    kept: list[mx.array] = []  # noqa: RUF012  # shared, as a state in the model would be

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def __call__(self, h: mx.array) -> mx.array:
        if self.reads:
            return super().__call__(h + Stateful.kept[-1])
        Stateful.kept.append(h)
        return super().__call__(h)


class Whole(nn.Module):
    """Any body with a head."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(16, 160)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.head(self.body(ids, cache))
        return logits

    @property
    def layers(self) -> list[nn.Module]:
        found: list[nn.Module] = self.body.layers
        return found


def test_nothing_goes_on_from_a_cut_that_is_none() -> None:
    """Before layer 2 they can't be parted, as that looks at what layer 0 made."""
    model = Whole(Handed(writes=0, reads=2))
    found = Parts.find(model, probe_tokens(ROWS))
    right = np.array(FrozenLayers(found, PLENTY).activations(ROWS, 4, 19))
    assert not found.can_cut_at(2)
    a_row = 4 * 16 * (len(ROWS[0].ids) - 1)
    for budget in (PLENTY, Budget(a_row, 0, Path())):
        frozen = FrozenLayers(found, budget, [2, 3, 4])
        for _ in range(2):
            assert np.array(frozen.activations(ROWS, 4, 19)).tobytes() == right.tobytes()


def test_layers_that_remember_are_not_parted() -> None:
    body = Handed(writes=9, reads=9)
    body.layers[0], body.layers[2] = Stateful(reads=False), Stateful(reads=True)
    found = Parts.find(Whole(body), probe_tokens(ROWS))
    assert found.can_cut_at(3)
    assert not found.can_cut_at(2)


def test_a_disk_that_is_full_in_the_middle_costs_time_only(tmp_path: Path) -> None:
    """A real limit to the size of files, met in a process of its own."""
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_compute import ROWS, Budget, FrozenLayers, Parts, made, probe_tokens
found = Parts.find(made("qwen2"), probe_tokens(ROWS))
expected = np.array(FrozenLayers(found, Budget(10**9, 0, Path())).activations(ROWS, 2, 19))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 5000, 7000, 9000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    frozen = FrozenLayers(found, Budget(0, 10**9, Path(sys.argv[2])))
    for _ in range(3):
        assert np.array(frozen.activations(ROWS, 2, 19)).tobytes() == expected.tobytes()
    assert frozen.on_disk <= limit
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("and no more") == 4


@pytest.mark.parametrize("scale", [1.0, 8.0, 1e4])
def test_loss_and_gradient_are_those_of_float64(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk; where a model is sure of itself, where logits are huge, or -inf as a mask."""
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

    given, places = mx.array(logits), mx.arange(10)
    batch = SupervisedBatch(places, places, mx.array(targets), mx.array(counts))
    total, gradient, _ = losses.loss_and_gradients(head, given, [], batch, 31)
    in_graph, other = mx.value_and_grad(
        lambda hidden: losses.differentiable_loss(head, hidden, [], batch, 31)
    )(given)
    assert np.array(total) == pytest.approx((expected * counts).sum(), rel=1e-6)
    assert np.array(in_graph) == pytest.approx(np.array(total), rel=1e-2 if scale == 8.0 else 1e-6)
    for found in (gradient, other):
        np.testing.assert_allclose(found, softmax * counts[:, None], atol=1e-6)
    each = losses.token_losses(head, given, batch, 31)
    np.testing.assert_allclose(each, expected[counts > 0], rtol=1e-6, atol=1e-9)


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 rows of 128 positions, 20,000 tokens: they would take 41 MB, and gradients as much."""
    monkeypatch.setitem(ARCHITECTURES, "qwen2", {"vocab_size": 20000})
    model = adapted(made("qwen2"))
    rows = [row(129, seed) for seed in range(8)]
    forward = Forward.from_model(model, rows)
    weights, ready = trainable_weights(model), forward.prepare(rows)
    values = list(weights.values())
    mx.eval(*ready.batch)
    monkeypatch.setattr(losses, "CHUNK", 2**20)
    peaks = []
    for step in (
        lambda: forward.loss_and_gradient(weights, ready),
        lambda: forward._graph(values, list(ready.batch), []),
        lambda: plain(model, rows),
    ):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step())
        peaks.append(mx.get_peak_memory() - before)
        forward.set_weights(weights)
    mine, graph, whole = peaks
    assert mine < 25e6
    assert graph < 30e6
    assert whole > 41e6


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


def test_parts_name_what_misfits() -> None:
    with pytest.raises(parts.Misfit, match=r"other \(1 of 1\)"):
        parts._refuse_other(mx.zeros((2, 2)), mx.ones((2, 2)), parts.OTHER_SHAPE, "other")
    with pytest.raises(parts.Misfit, match="other"):
        parts._refuse_other(mx.ones((2, 2)) * mx.nan, mx.ones((2, 2)), parts.OTHER_SHAPE, "other")
