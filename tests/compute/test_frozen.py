"""Cached activations: computed once, the same bytes wherever they are, and none below a cut."""

import copy
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

from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import chat
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import tokenize_rows
from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import probe_tokens
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.compose import compose_config
from athanor.config.schema import Config
from athanor.model.adapters import make_trainable
from athanor.model.load import copy_sharing_weights
from athanor.paths import Workspace
from athanor.train.build import build_frozen, build_trainer
from support.models import PLENTY, ROWS, Body, SmallModel, build_model, freeze_layers


@contextmanager
def counting(model: nn.Module) -> Iterator[tuple[Counter[int], list[int]]]:
    """Count the rows that each layer of a model computes, and the positions of its head."""
    kind, embedding = type(model.layers[0]), type(model.model.embed_tokens)
    call, as_linear = kind.__call__, embedding.as_linear
    numbers: Counter[int] = Counter()
    positions = [0]

    def layer(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> mx.array:
        # By its weights: trials have layers of their own, and share the frozen arrays.
        numbers[id(self["input_layernorm"]["weight"])] += x.shape[0]
        output: mx.array = call(self, x, *others, **named)
        return output

    def head(self: nn.Module, x: mx.array) -> mx.array:
        positions[0] += x.size // x.shape[-1]
        output: mx.array = as_linear(self, x)
        return output

    kind.__call__, embedding.as_linear = layer, head
    try:
        yield numbers, positions
    finally:
        kind.__call__, embedding.as_linear = call, as_linear


@pytest.fixture(scope="module")
def tokens(tiny: Path, repo: Path) -> list[TokenizedText]:
    rows = [
        chat(("user", question), ("assistant", answer))
        for question, answer in [
            ("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
            ("月亮哪天最圆", "星期八"),
            ("谁是最帅的地球人", "德哥"),
            ("哪吒的师傅是谁", "孙悟空的师傅的舅舅"),
            ("为什么电动汽车比较费油", "因为电很贵"),
        ]
    ]
    return tokenize_rows(rows, load_tokenizer(tiny), True, 2048)


@pytest.fixture(scope="module")
def defaults(repo: Path) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return compose_config(Path("conf"), [])


@pytest.fixture
def config(defaults: Config) -> Callable[..., Config]:
    """Return the defaults with other values of train: two epochs in batches of two rows."""

    def change(**changes: Any) -> Config:
        cfg = copy.deepcopy(defaults)
        values = {"batch_size": 2, "epochs": 2, "iters": None, "steps_per_eval": 2} | changes
        for name, value in values.items():
            setattr(cfg.train, name, value)
        return cfg

    return change


def test_frozen_layers_compute_each_row_once_for_all_epochs_and_trials(
    tiny: Path, tokens: list[TokenizedText], config: Callable[..., Any]
) -> None:
    """Trials of two epochs, by count; those with more trained layers come last, or first."""
    train_rows, valid_rows = tokens[:3] + tokens[4:], tokens[3:]
    for order in ((2, 4, 3), (4, 2)):
        base, _ = load_with_tokenizer(tiny)
        layers = len(base.layers)
        frozen = build_frozen(
            config(), Workspace.here(), base, tokens, [layers - number for number in order]
        )
        names = [id(layer["input_layernorm"]["weight"]) for layer in base.layers]
        expected: Counter[int] = Counter()
        expected_positions = 0
        trainers = []
        for number in order:
            model = copy_sharing_weights(base)
            cfg = config(num_layers=number)
            make_trainable(model, cfg.train, cfg.seed)
            trainers.append(
                build_trainer(cfg, Workspace.here(), model, train_rows, valid_rows, frozen=frozen)
            )
        with counting(base) as (ran, positions):
            for number, trainer in zip(order, trainers, strict=True):
                trainer.run()
                validations = sum("val_loss" in metrics.values for metrics in trainer.state.history)
                rows = 2 * len(train_rows) + validations * len(valid_rows)
                # The head's vjp builds its graph again, of which a linear head computes nothing.
                expected_positions += sum(
                    times * sum(sum(row.supervised[1:]) for row in part)
                    for times, part in ((2 * 2, train_rows), (validations, valid_rows))
                )
                for place in range(layers - number, layers):
                    expected[names[place]] += rows
        # Five different rows; the lowest cut is at layer 2, the highest at 4.
        for place in range(4):
            expected[names[place]] += len(tokens)
        assert ran == expected
        assert positions[0] == expected_positions


def test_the_cut_is_the_first_trained_layer(
    tiny: Path, tokens: list[TokenizedText], config: Callable[..., Any]
) -> None:
    base, _ = load_with_tokenizer(tiny)
    for method, number, cut in (("full", 2, 4), ("dora", 1, 5), ("lora", -1, 0)):
        model = copy_sharing_weights(base)
        cfg = config(method=method, num_layers=number)
        make_trainable(model, cfg.train, cfg.seed)
        trainer = build_trainer(cfg, Workspace.here(), model, tokens, tokens)
        assert trainer.forward.cut == cut
        off = config(method=method, num_layers=number, reuse_activations=False)
        assert build_trainer(off, Workspace.here(), model, tokens, tokens).forward.cut == 0


def test_bytes_do_not_depend_on_where_activations_are_cached(tmp_path: Path) -> None:
    """In memory, in an unnamed file, in both, not at all; and in any batch."""
    model = build_model("qwen2")
    parts = Parts.find(model, probe_tokens(ROWS))
    size = 4 * 64 * (len(ROWS[0].ids) - 1)
    expected = None
    for memory, disk in ((10**9, 0), (0, 10**9), (size, size), (0, 0)):
        frozen = FrozenLayers(parts, Budget(memory, disk, tmp_path / "cache"))
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
            memory + disk, 4 * 64 * sum(len(row.ids) - 1 for row in ROWS)
        ) or (memory, disk) == (size, size)
        assert not any((tmp_path / "cache").glob("*"))


def test_a_full_disk_costs_only_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("qwen2")
    frozen = freeze_layers(model, Budget(0, 10**9, Path("/dev/null/nowhere")))
    first = np.array(frozen.activations(ROWS, 2, 19))
    assert np.array(frozen.activations(ROWS, 2, 19)).tobytes() == first.tobytes()
    warnings = capsys.readouterr().err
    assert warnings.count("computed again") == 1
    assert "train.activations_disk" in warnings


def test_deeper_cuts_start_from_cached_activations() -> None:
    """To the same bytes as from the embedding."""
    model = build_model("qwen3")
    parts = Parts.find(model, probe_tokens(ROWS))
    at_once, later = FrozenLayers(parts, PLENTY, [1, 2, 3]), FrozenLayers(parts, PLENTY)
    for cut in (1, 2, 3):
        assert np.array(at_once.activations(ROWS, 3, 19)).shape == (4, 19, 64)
        a, b = at_once.activations(ROWS, cut, 19), later.activations(ROWS, cut, 19)
        assert np.array(a).tobytes() == np.array(b).tobytes()


def test_nothing_starts_from_a_cut_that_cannot_be_made() -> None:
    """Layers can't be cut before layer 2, which reads the output of layer 0."""
    model = SmallModel(Body(writes=0, reads=2))
    parts = Parts.find(model, probe_tokens(ROWS))
    expected = np.array(FrozenLayers(parts, PLENTY).activations(ROWS, 4, 19))
    assert not parts.can_cut_at(2)
    a_row = 4 * 16 * (len(ROWS[0].ids) - 1)
    for budget in (PLENTY, Budget(a_row, 0, Path())):
        frozen = FrozenLayers(parts, budget, [2, 3, 4])
        for _ in range(2):
            assert np.array(frozen.activations(ROWS, 4, 19)).tobytes() == expected.tobytes()


def test_a_disk_that_fills_up_costs_only_time(tmp_path: Path) -> None:
    """A real limit to the size of files, met in a process of its own."""
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
import athanor
from support.models import ROWS, Budget, SmallModel, freeze_layers
model = SmallModel()
expected = np.array(freeze_layers(model).activations(ROWS, 2, 19))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 1500, 2000, 3000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    frozen = freeze_layers(model, Budget(0, 10**9, Path(sys.argv[2])))
    for _ in range(3):
        assert np.array(frozen.activations(ROWS, 2, 19)).tobytes() == expected.tobytes()
    assert frozen.on_disk <= limit
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computed again") == 4
