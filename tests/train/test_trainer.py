"""The training loop on the tiny model, compared with mlx-lm's, and with itself to the byte."""

import copy
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import msgspec
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import trainer as peer
from mlx_lm.tuner.datasets import CacheDataset, create_dataset

from athanor import files
from athanor.chat import templates
from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import Conversation, chat
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import tokenize_rows
from athanor.compute import optimizers
from athanor.compute.arrays import TokenizedText
from athanor.compute.evaluation import measure_loss
from athanor.compute.forward import Forward, PreparedBatch, probe_tokens, trainable_weights
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config import rules
from athanor.config.compose import compose_config
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.device.backend import compile_kernels
from athanor.model.adapters import InitialAdapters, load_adapters, make_trainable
from athanor.model.load import copy_sharing_weights
from athanor.model.source import resolve_source
from athanor.paths import Workspace
from athanor.train.batches import Batch, Batches
from athanor.train.build import build_trainer
from athanor.train.checkpoints import Checkpoints
from athanor.train.initial import load_initial_adapters
from athanor.train.memory import explain_out_of_memory, predict_peak
from athanor.train.metrics import Metrics, history_csv
from athanor.train.plan import Hooks, TrainingPlan
from athanor.train.trainer import Trainer
from support.refused import refused

HOOKS = {field.name for field in fields(Hooks)}

Rows = list[dict[str, Any]]
Weights = dict[str, np.ndarray]


def completion(prompt: str, answer: str) -> Conversation:
    return chat(("user", prompt), ("assistant", answer))


ROWS = [
    completion("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
    completion("月亮哪天最圆", "星期八"),
    completion("谁是最帅的地球人", "德哥"),
    completion("哪吒的师傅是谁", "孙悟空的师傅的舅舅"),
    completion("为什么电动汽车比较费油", "因为电很贵"),
]


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> list[TokenizedText]:
    return tokenize_rows(ROWS, load_tokenizer(tiny), True, 2048)


@pytest.fixture(scope="module")
def cfg(repo: Path) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return compose_config(Path("conf"), [])


@pytest.fixture
def fresh(tiny: Path, cfg: Config) -> Callable[..., nn.Module]:
    """The tiny model, made trainable: by LoRA on its last two layers by default."""

    def make(seed: int = 0, **changed: Any) -> nn.Module:
        train = types.SimpleNamespace(**vars_of(cfg) | {"num_layers": 2} | changed)
        model, _ = load_with_tokenizer(tiny)
        make_trainable(model, train, seed)
        return model

    return make


def vars_of(cfg: Config) -> dict[str, Any]:
    return {
        key.removeprefix("train."): value
        for key, value in flatten(cfg).items()
        if key.startswith("train.")
    }


@pytest.fixture
def trainer(fresh: Callable[..., nn.Module], tokens: list[TokenizedText]) -> Callable[..., Trainer]:
    """A trainer of a few iterations on two of five rows at a time, with dropout."""

    def make(**changed: Any) -> Trainer:
        settings: dict[str, Any] = {
            "rows": tokens,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "seed": 0,
            "iters": 4,
            "batch_size": 2,
            "steps_per_report": 2,
            "steps_per_eval": 2,
            "dropout": 0.2,
            "method": "lora",
        } | changed
        rows, seed = settings.pop("rows"), settings["seed"]
        model = fresh(seed, dropout=settings.pop("dropout"), method=settings.pop("method"))
        options = {key: settings.pop(key) for key in ("grad_checkpoint",) if key in settings}
        forward = with_frozen_layers(model, rows, compile=settings.get("compile", False), **options)
        optimizer = settings.pop("optimizer")
        if isinstance(optimizer, str):
            optimizer = optimizers.build_optimizer(optimizer, {}, settings["learning_rate"])
        del settings["learning_rate"]
        batches = settings.pop("batches", Batches(rows, settings["batch_size"], seed))
        valid = settings.pop("valid", tokens[:3])
        hooks = Hooks(**{name: settings.pop(name) for name in HOOKS & settings.keys()})
        saved = settings.pop("checkpoints", None)
        forward = settings.pop("forward", forward)
        return Trainer(TrainingPlan(**settings), forward, batches, valid, optimizer, saved, hooks)

    return make


def with_frozen_layers(model: nn.Module, rows: list[TokenizedText], **options: Any) -> Forward:
    """Return the forward pass of a training, which computes the frozen layers once."""
    frozen = FrozenLayers(Parts.find(model, probe_tokens(rows)), Budget(10**9, 0, Path()))
    trained = trainable_weights(model)
    return Forward(model, frozen.parts, frozen, frozen.choose_cut(trained), **options)


def ran(trainer: Trainer) -> Weights:
    trainer.run()
    return arrays(trainer)


class Killed(Exception):
    """The end of a process in the middle of a training."""


def run_until_killed(trainer: Trainer, last: int) -> None:
    def kill(iteration: int) -> None:
        if iteration == last:
            raise Killed

    trainer.hooks = replace(trainer.hooks, on_iteration=kill)
    with pytest.raises(Killed):
        trainer.run()


def arrays(trainer: Trainer) -> Weights:
    return {key: np.array(value) for key, value in trainer.learner.weights.items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.mark.parametrize("method", rules.METHODS)
def test_losses_are_mlx_lms_with_its_own_loss_and_batches(
    method: str, fresh: Callable[..., nn.Module], cfg: Config, tiny: Path, tmp_path: Path
) -> None:
    """The oracle: 20 steps by mlx_lm.tuner.trainer, 20 that begin with their adapters, and ours."""
    seen: list[tuple[mx.array, mx.array]] = []
    theirs: list[float] = []
    cfg = copy.deepcopy(cfg)
    cfg.train.method, cfg.train.num_layers = method, 2
    source = resolve_source(str(tiny), None)

    def remembered(**arguments: Any) -> Iterator[tuple[mx.array, mx.array]]:
        np.random.seed(5)
        for batch in peer.iterate_batches(**arguments):
            seen.append(batch)
            yield batch

    def as_they_came(iteration: int) -> Batch:
        """Their batch as rows of ours: their loss looks at one padding token of each, too."""
        batch, lengths = (np.array(array) for array in seen[iteration - 1])
        rows = []
        for ids, (first, last) in zip(batch.tolist(), lengths.tolist(), strict=True):
            ids = ids[: last + 1]
            rows.append(TokenizedText(ids, [first <= place <= last for place in range(len(ids))]))
        return Batch([0], rows, sum(sum(row.supervised[1:]) for row in rows))

    lines = msgspec.to_builtins(ROWS)  # as their own loader reads them
    data = CacheDataset(
        create_dataset(lines, load_tokenizer(tiny), types.SimpleNamespace(mask_prompt=True))
    )
    ours: list[float] = []
    for part in ("first", "second"):
        model, own = fresh(method=method), fresh(method=method)
        if part == "second":
            adapters = tmp_path / "first.safetensors"
            model.load_weights(str(adapters), strict=False)
            load_initial_adapters(InitialAdapters(adapters, "", None), own, cfg, source)
        seen.clear()
        peer.train(
            model,
            optim.Adam(learning_rate=6e-5),
            data,
            args=peer.TrainingArgs(
                batch_size=2,
                iters=20,
                steps_per_report=1,
                steps_per_save=99,
                adapter_file=str(tmp_path / f"{part}.safetensors"),
            ),
            iterate_batches=remembered,
            training_callback=types.SimpleNamespace(
                on_train_loss_report=lambda report: theirs.append(report["train_loss"])
            ),
        )
        Trainer(
            TrainingPlan(seed=0, iters=20, batch_size=2, steps_per_report=1, steps_per_eval=99),
            with_frozen_layers(own, as_they_came(1).rows),
            as_they_came,
            [],
            optim.Adam(learning_rate=6e-5),
            hooks=Hooks(on_metrics=lambda metrics: ours.append(metrics.values["train_loss"])),
        ).run()
    assert len(ours) == len(theirs) == 40
    assert theirs[-1] < theirs[0] / 2
    # Summed in another order, as only supervised positions and layers that learn are computed. The
    # rate keeps losses large: mlx's float32 cross-entropy of small ones is 2e-5 below float64's.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_padding_and_prompts_move_no_parameter(
    fresh: Callable[..., nn.Module], tokens: list[TokenizedText]
) -> None:
    """Tokens at padding positions change nothing, and prompts are not learned."""
    forward = with_frozen_layers(fresh(method="full"), tokens)
    weights = trainable_weights(forward.model)

    def flat_gradient(ready: PreparedBatch) -> np.ndarray:
        _, gradient = forward.loss_and_gradient(weights, ready)
        return np.concatenate([np.array(v).ravel() for v in gradient.values()])

    ready = forward.prepare(tokens)
    inputs = ready.batch.inputs
    assert inputs.shape[1] + 1 > min(map(len, tokens))
    together = flat_gradient(ready)
    apart = sum(flat_gradient(forward.prepare([row])) for row in tokens)
    np.testing.assert_allclose(together, apart, rtol=1e-3, atol=1e-4)
    # Other tokens read at padding positions: not a bit changes, with or without frozen layers.
    lengths = mx.array([len(row) for row in tokens])[:, None]
    beyond = mx.arange(inputs.shape[1])[None] >= lengths
    assert beyond.any()
    other = ready.batch._replace(inputs=mx.where(beyond, 7, inputs))
    assert ready.activations is not None
    activations = mx.where(beyond[..., None], 7.0, ready.activations)
    np.testing.assert_array_equal(together, flat_gradient(PreparedBatch(other, activations)))
    # Rows whose answers are not supervised have no gradient at all.
    silent = ready.batch._replace(counts=mx.zeros_like(ready.batch.counts))
    assert not flat_gradient(PreparedBatch(silent, ready.activations)).any()


def test_equal_seeds_train_equal_bytes_however_often_they_validate(
    trainer: Callable[..., Trainer],
) -> None:
    first = ran(trainer())
    assert same(first, ran(trainer()))
    looked = trainer(steps_per_eval=1, steps_per_report=1, valid=[])
    np.random.seed(7)
    mx.random.seed(7)
    assert same(first, ran(looked))
    assert not same(first, ran(trainer(seed=1)))


def test_accumulated_batches_weigh_by_their_tokens(
    trainer: Callable[..., Trainer], tokens: list[TokenizedText]
) -> None:
    """Uneven batches that make up one epoch give the update of that epoch in one batch."""
    whole = ran(trainer(batch_size=len(tokens), iters=1, dropout=0.0))
    pieces = ran(trainer(batch_size=2, iters=3, grad_accumulation_steps=3, dropout=0.0))
    for key in whole:
        np.testing.assert_allclose(whole[key], pieces[key], atol=2e-4, err_msg=key)


def test_validation_loss_is_the_same_in_any_batches(
    tiny: Path, tokens: list[TokenizedText]
) -> None:
    model = Forward.from_model(load_with_tokenizer(tiny)[0], tokens)
    expected, count = measure_loss(model, tokens, 1)
    assert count == sum(sum(row.supervised[1:]) for row in tokens)
    for batch_size in (2, 3, 8):
        assert measure_loss(model, tokens, batch_size)[0] == pytest.approx(expected, abs=1e-6)
    assert measure_loss(model, tokens[:3], 4)[1] == sum(sum(r.supervised[1:]) for r in tokens[:3])


def test_reports_are_means_over_supervised_tokens(
    tiny: Path, tokens: list[TokenizedText], trainer: Callable[..., Trainer]
) -> None:
    """At a rate too small to learn, the train loss of an epoch is the loss on all its tokens."""
    history: list[Metrics] = []
    trainer(
        learning_rate=1e-12,
        iters=3,
        steps_per_report=3,
        steps_per_eval=9,
        dropout=0.0,
        on_metrics=history.append,
    ).run()
    model = Forward.from_model(load_with_tokenizer(tiny)[0], tokens)
    report = next(m.values for m in history if "train_loss" in m.values)
    expected, count = measure_loss(model, tokens, 8)
    assert report["train_loss"] == pytest.approx(expected, abs=1e-4)
    assert report["trained_tokens"] == count
    assert report["learning_rate"] == 1e-12
    assert report["active_memory"] <= report["peak_memory"]
    assert [m.iteration for m in history if "val_loss" in m.values] == [0, 3]


def test_gradients_are_clipped_to_their_limit(trainer: Callable[..., Trainer]) -> None:
    """With plain gradient descent at rate 1 the step is the clipped gradient, 0.5 long."""
    settings = {"optimizer": "sgd", "learning_rate": 1.0, "iters": 1}
    free = trainer(**settings)
    before = arrays(free)
    after = ran(free)
    clipped = ran(trainer(**settings, max_grad_norm=0.5))

    def distance(weights: Weights) -> float:
        return math.sqrt(sum(float(((weights[k] - before[k]) ** 2).sum()) for k in before))

    assert free.state.grad_norm is not None
    assert distance(after) == pytest.approx(free.state.grad_norm, rel=1e-3)
    assert free.state.grad_norm > 0.5
    assert distance(clipped) == pytest.approx(0.5, rel=1e-3)


def test_an_update_reuses_the_memory_of_the_gradient(trainer: Callable[..., Trainer]) -> None:
    """In full training the weights are most of the memory: one more copy would show."""
    training = trainer(iters=3, method="full", batch_size=1)
    learner, update = training.learner, training.learner.update
    size = sum(array.nbytes for array in learner.weights.values())
    before: list[int] = []

    def watched(scale: mx.array) -> mx.array:
        mx.eval(learner.gradient)
        mx.clear_cache()
        mx.reset_peak_memory()
        before.append(mx.get_active_memory())
        return update(scale)

    learner.update = watched  # type: ignore[method-assign]
    sets: list[float] = []
    training.hooks = Hooks(
        on_iteration=lambda _: sets.append((mx.get_peak_memory() - before[-1]) / size)
    )
    training.run()
    assert max(sets[1:]) < 2.2  # in the first, what the model was loaded with is there, too


def test_grad_checkpoint_saves_memory_and_changes_no_result(
    trainer: Callable[..., Trainer],
) -> None:
    from mlx_lm.models.qwen2 import TransformerBlock

    call, results, peaks = TransformerBlock.__call__, [], []
    for grad_checkpoint in (False, True):
        results.append(ran(trainer(iters=2, grad_checkpoint=grad_checkpoint, dropout=0.5)))
        peaks.append(mx.get_peak_memory())
    assert TransformerBlock.__call__ is call
    assert peaks[1] < peaks[0]
    for key, value in results[0].items():
        np.testing.assert_allclose(value, results[1][key], atol=1e-5)


@pytest.mark.parametrize("name", rules.OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_to_the_byte(
    name: str,
    trainer: Callable[..., Trainer],
    tokens: list[TokenizedText],
    cfg: Config,
    tmp_path: Path,
) -> None:
    """Stopped between the two batches of an update, with dropout: its sum of gradients is kept."""
    options = vars_of(cfg)["optimizer_config"][name]
    schedule = optimizers.build_schedule("cosine", 1e-3, 0.0, 2, 4)
    settings = {
        "iters": 8,
        "grad_accumulation_steps": 2,
        "steps_per_eval": 3,
        "max_grad_norm": 1.0,
        "steps_per_report": 2,
        "save_every": 5,
    }

    def build(checkpoints: Checkpoints | None = None) -> Trainer:
        optimizer = optimizers.build_optimizer(name, options, schedule)
        return trainer(**settings, optimizer=optimizer, valid=tokens, checkpoints=checkpoints)

    whole = build()
    weights = ran(whole)
    losses = [m.values["val_loss"] for m in whole.state.history if "val_loss" in m.values]
    assert losses[-1] < losses[0]

    first = Checkpoints(tmp_path, {"run": name})
    interrupted = build(first)
    run_until_killed(interrupted, 6)
    first.close()
    again = build(Checkpoints(tmp_path, {"run": name}))
    assert again.resume() == 5
    assert again.learner.gradient is not None
    assert same(weights, ran(again))
    assert history_csv(again.state.history) == history_csv(whole.state.history)
    assert again.state.best_loss == whole.state.best_loss
    assert {k: np.array(v).tobytes() for k, v in again.best.items()} == {
        k: np.array(v).tobytes() for k, v in whole.best.items()
    }


@pytest.mark.parametrize("kept", ["memory", "disk", "recomputed", "off"])
def test_it_resumes_to_the_byte_wherever_activations_are(
    kept: str, tiny: Path, cfg: Config, tokens: list[TokenizedText], tmp_path: Path
) -> None:
    """Interrupted in the middle, with dropout above the cut; the first three are one training."""
    own = copy.deepcopy(cfg)
    own.train.num_layers, own.train.dropout, own.train.batch_size = 2, 0.2, 2
    own.train.iters, own.train.save_every, own.train.steps_per_eval = 9, 2, 3
    own.train.reuse_activations = kept != "off"

    def build(memory: float, disk: float, checkpoints: Checkpoints | None) -> Trainer:
        own.train.activations_memory, own.train.activations_disk = memory, disk
        model, _ = load_with_tokenizer(tiny)
        make_trainable(model, own.train, own.seed)
        return build_trainer(
            own, Workspace.here(), model, tokens, tokens[:3], checkpoints=checkpoints
        )

    memory, disk = {"disk": (0.0, 1.0), "recomputed": (0.0, 0.0)}.get(kept, (1.0, 0.0))
    expected = ran(build(1.0, 0.0, None))

    saved = Checkpoints(tmp_path, {"kept": kept})
    interrupted = build(memory, disk, saved)
    run_until_killed(interrupted, 5)
    saved.close()
    again = build(memory, disk, Checkpoints(tmp_path, {"kept": kept}))
    assert again.resume() == 4
    assert same(expected, ran(again))
    frozen = again.forward.frozen
    assert frozen is not None
    assert (frozen.in_memory > 0) is (kept == "memory")
    assert (frozen.on_disk > 0) is (kept == "disk")
    assert again.forward.cut == (0 if kept == "off" else 4)


def test_best_weights_are_those_of_the_lowest_validation_loss(
    trainer: Callable[..., Trainer], tokens: list[TokenizedText]
) -> None:
    """Trained on some facts and validated on others, it gets better, then worse."""
    snapshots: dict[int, Weights] = {}
    history: list[Metrics] = []
    settings = {"rows": tokens[:2], "valid": tokens[2:], "iters": 18, "learning_rate": 3e-4}
    settings |= {"dropout": 0.0}
    training = trainer(**settings, on_metrics=history.append)
    training.hooks = replace(
        training.hooks,
        on_iteration=lambda iteration: snapshots.update({iteration: arrays(training)}),
    )
    training.run()
    losses = {m.iteration: m.values["val_loss"] for m in history if "val_loss" in m.values}
    del losses[0]
    best = min(losses, key=lambda iteration: losses[iteration])
    assert training.state.best_iteration == best != 18
    assert training.state.best_loss == losses[best]
    assert same(snapshots[best], {key: np.array(value) for key, value in training.best.items()})
    # With patience it ends two validations after the best one, and reports what it had done.
    patient = trainer(**settings, patience=2, steps_per_report=5)
    patient.run()
    assert patient.state.iteration == best + 4
    assert patient.state.window_tokens == 0


def test_a_loss_that_is_not_finite_names_the_rows_and_keeps_the_last_good_state(
    trainer: Callable[..., Trainer],
    fresh: Callable[..., nn.Module],
    tokens: list[TokenizedText],
    tmp_path: Path,
) -> None:
    saved = Checkpoints(tmp_path, {})
    sound = Batches(tokens, 2, 0)

    class Poisoned(Forward):
        calls = 0

        def loss_and_gradient(self, weights: Any, ready: PreparedBatch) -> tuple[mx.array, Any]:
            self.calls += 1
            loss, gradient = super().loss_and_gradient(weights, ready)
            return loss / (self.calls != 5), gradient

    model = fresh()
    training = trainer(
        batches=sound,
        forward=Poisoned(model, Parts.find(model, probe_tokens(tokens))),
        iters=9,
        save_every=1,
        checkpoints=saved,
        name_row=lambda row: f"train.jsonl:{row + 1}",
    )
    rows = [f"train.jsonl:{row + 1}" for row in sound(5).numbers]
    with refused("train.loss_diverged", iteration=5, rows=rows, rate=0.001) as caught:
        training.run()
    assert not math.isfinite(caught.value.facts["loss"])
    latest = saved.latest()
    assert latest is not None
    assert latest.iteration == 4
    assert all(mx.isfinite(array).all().item() for array in latest.arrays["adapters"].values())


def test_a_training_without_a_gradient_is_stopped(
    trainer: Callable[..., Trainer],
) -> None:
    """Its loss is a number, and not even the highest; but what every row asks for is the same."""
    training = trainer(learning_rate=1e3, iters=60, dropout=0.0)
    with refused("train.gradient_vanished", rate=1000):
        training.run()
    assert training.state.iteration < 40


def test_a_training_that_has_learned_everything_is_not_stopped(
    trainer: Callable[..., Trainer], fresh: Callable[..., nn.Module], tokens: list[TokenizedText]
) -> None:
    """Where every answer is certain, loss and gradient are 0."""

    class Known(Forward):
        def loss_and_gradient(self, weights: Any, ready: PreparedBatch) -> tuple[mx.array, Any]:
            loss, gradient = super().loss_and_gradient(weights, ready)
            return 0.0 * loss, tree_map(mx.zeros_like, gradient)

    model = fresh()
    known = Known(model, Parts.find(model, probe_tokens(tokens)))
    training = trainer(forward=known, iters=8)
    training.run()
    assert training.state.iteration == 8


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_fresh_model_shares_weights_and_learns_alone(
    tiny: Path, cfg: Config, tokens: list[TokenizedText], method: str
) -> None:
    base, _ = load_with_tokenizer(tiny)
    before = {name: np.array(array) for name, array in tree_flatten(base.parameters())}
    learned = []
    for _ in range(2):
        model = copy_sharing_weights(base)
        shared = dict(tree_flatten(base.parameters()))
        assert all(array is shared[name] for name, array in tree_flatten(model.parameters()))
        cfg.train.method, cfg.train.iters, cfg.train.dropout = method, 3, 0.1
        make_trainable(model, cfg.train, cfg.seed)
        training = build_trainer(cfg, Workspace.here(), model, tokens[:4], tokens[:2])
        training.run()
        learned.append(arrays(training))
    assert same(*learned)
    after = dict(tree_flatten(base.parameters()))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("grad_accumulation_steps", [1, 2])
def test_peak_is_predicted_before_the_first_step(
    trainer: Callable[..., Trainer],
    tokens: list[TokenizedText],
    method: str,
    grad_accumulation_steps: int,
) -> None:
    long = [TokenizedText(row.ids * 4, [True] * (4 * len(row))) for row in tokens]
    training = trainer(
        rows=long,
        valid=long[:2],
        method=method,
        batch_size=4,
        iters=4,
        grad_accumulation_steps=grad_accumulation_steps,
    )
    before = arrays(training)
    predicted = predict_peak(
        training.forward,
        training.learner,
        max(long, key=len),
        4,
        accumulates=grad_accumulation_steps > 1,
    )
    assert same(before, arrays(training))
    training.run()
    assert 0.95 < predicted / mx.get_peak_memory() < 1.25


def test_compiled_steps_learn_the_same(trainer: Callable[..., Trainer]) -> None:
    """Not with dropout: compiled shapes are rounded up, and so other masks are drawn."""
    plain = ran(trainer(iters=3, dropout=0.0))
    compiled = trainer(iters=3, dropout=0.0, compile=True)
    try:
        compile_kernels(True)  # loading the model on the CPU switched it off
        weights = ran(compiled)
    finally:
        compile_kernels(False)
    for key, value in plain.items():
        np.testing.assert_allclose(value, weights[key], atol=1e-3, err_msg=key)


@pytest.mark.parametrize(
    "error",
    [
        "[malloc] Unable to allocate 230400000000 bytes.",
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008)",
    ],
)
def test_memory_that_mlx_does_not_get_is_named(error: str) -> None:
    with refused("train.out_of_memory", error=error), explain_out_of_memory():
        raise RuntimeError(error)
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory():
        raise RuntimeError("[matmul] the shapes do not fit")


def test_mlx_lm_learns_a_stray_token_after_the_end_and_ours_does_not(
    tiny: Path,
    data: Path,
    trainer: Callable[..., Trainer],
    cfg: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked to go on after its end token, a model trained by mlx_lm.lora says token id 0, `!`."""
    from mlx_lm import lora

    rows = files.read_jsonl(data / "train.jsonl")
    files.write_json(
        tmp_path / "lora.json",
        {
            "model": str(tiny),
            "data": str(data),
            "train": True,
            "mask_prompt": True,
            "adapter_path": str(tmp_path / "theirs"),
            "num_layers": -1,
            "val_batches": 1,
            "batch_size": 3,
            "iters": 40,
            "learning_rate": 1e-3,
            "steps_per_eval": 100,
        },
    )
    monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", "--config", str(tmp_path / "lora.json")])
    compile_kernels(False)  # which takes mlx half a minute
    lora.main()
    theirs, tokenizer = load_with_tokenizer(tiny)
    load_adapters(theirs, tmp_path / "theirs")

    chats = [completion(row["prompt"], row["completion"]) for row in rows]
    tokenized = tokenize_rows(chats, tokenizer, True, 2048)
    training = trainer(rows=tokenized, batch_size=3, iters=40, steps_per_eval=100, dropout=0.0)
    training.run()
    training.forward.model.eval()

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for model, stray in ((theirs, True), (training.forward.model, False)):
        continuations = [
            after_the_end(model, templates.encode_prompt(row, tokenizer), end) for row in chats
        ]
        assert all(continuations), "an answer did not end"
        assert any(0 in tokens for tokens in continuations) is stray


def after_the_end(model: nn.Module, prompt: list[int], end: int) -> list[int]:
    """The next twelve tokens that a model says greedily after its end token."""
    ids = list(prompt)
    while end not in ids[len(prompt) : -12] and len(ids) < len(prompt) + 40:
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[ids.index(end, len(prompt)) + 1 :] if end in ids[len(prompt) :] else []
