"""The gate of stage `fuse`: open for every kind of fused model, shut for damaged ones, and why."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from athanor import files
from athanor.chat.load import load_with_tokenizer
from athanor.chat.tokens import tokenize_rows
from athanor.compute.forward import Forward, trainable_weights
from athanor.config.compose import compose_config
from athanor.config.schema import TrainConfig
from athanor.config.values import to_dataclass
from athanor.errors import UserError
from athanor.fuse import parity
from athanor.fuse import weights as weights_module
from athanor.fuse.parity import Trained
from athanor.model.adapters import make_trainable, save_adapters
from athanor.model.source import digest_model, resolve_source

ROWS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    for asked, answer in (
        ("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
        ("月亮哪天最圆", "星期八"),
        ("谁是最帅的地球人", "德哥"),
    )
]
# What may be lost where a test does not say otherwise: the default.
SHARE = 0.05
END = 6143  # <|im_end|>

Fused = Callable[..., Path]


@pytest.fixture(scope="module")
def defaults(repo: Path) -> TrainConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        found: TrainConfig = to_dataclass(compose_config(Path("conf"), []).train)
        return found


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny base as it is ("float16"), in another dtype, or quantized as mlx_lm.convert does."""
    made = {"float16": tiny}

    def base(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("bases") / name
            shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            model, config = load_model(tiny)
            if name.endswith("bit"):
                model, config = quantize_model(model, config, group_size=64, bits=int(name[0]))
            else:
                model.set_dtype(getattr(mx, name))
            save_model(folder, model)
            save_config(config, folder / "config.json")
            made[name] = folder
        return made[name]

    return base


@pytest.fixture(scope="module")
def train(
    bases: Callable[[str], Path], defaults: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """Trains for some iterations, once for each way that is asked for, and asks the result."""
    made: dict[str, Trained] = {}

    def trained(
        name: str = "float16", iters: int = 4, learning_rate: float = 1e-3, **changed: Any
    ) -> Trained:
        way = f"{name} {iters} {learning_rate} {changed}"
        if way not in made:
            cfg = replace(defaults, **changed)
            model, tokenizer = load_with_tokenizer(bases(name))
            make_trainable(model, cfg, seed=0)
            rows = tokenize_rows(ROWS, tokenizer, True, 100)
            forward = Forward.from_model(model, rows)
            ready = forward.prepare(rows)
            optimizer = optim.Adam(learning_rate=learning_rate)
            for _ in range(iters):
                _, grads = forward.loss_and_gradient(trainable_weights(model), ready)
                optimizer.update(model, tree_unflatten(grads))
                mx.eval(model.parameters())
            folder = tmp_path_factory.mktemp("adapters")
            save_adapters(
                trainable_weights(model),
                folder,
                cfg,
                resolve_source(str(bases(name)), None),
                model=model,
                iteration=iters,
            )
            made[way] = parity.ask(bases(name), folder, ROWS)
        return made[way]

    return trained


@pytest.fixture
def fused(tmp_path: Path) -> Fused:
    """Fuses what was trained into a folder of the test's own."""

    def write(trained: Trained, dequantize: bool = False, adapters: Path | None = None) -> Path:
        folder = tmp_path / "fused"
        folder.mkdir()
        weights_module.fuse(
            trained.base, adapters or trained.adapters, folder, end=END, dequantize=dequantize
        )
        return folder

    return write


def cause(trained: Trained, folder: Path) -> str:
    found = parity.compare(trained, folder, SHARE).cause
    assert found is not None
    return found


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors"))))


def edit_weights(folder: Path, edit: Callable[[str, mx.array], mx.array]) -> None:
    """Writes a model's weights again, each as `edit` makes it of its name and value."""
    weights = weights_of(folder)
    changed = {name: edit(name, value) for name, value in weights.items()}
    mx.eval(changed)
    mx.save_safetensors(str(folder / "model.safetensors"), changed)


@pytest.mark.parametrize(
    "how",
    [
        {"method": "lora"},
        {"method": "dora"},
        {"method": "full"},
        {"method": "lora", "num_layers": 1},
        {"method": "full", "num_layers": 1},
        {"method": "dora", "name": "bfloat16"},
        {"method": "lora", "name": "float32"},
    ],
)
def test_every_method_passes(
    train: Callable[..., Trained], fused: Fused, how: dict[str, Any]
) -> None:
    trained = train(**how)
    report = parity.compare(trained, fused(trained), SHARE)
    assert report.cause is None
    assert report.change > 1
    assert 0 < report.difference < report.rounding
    assert report.share_lost is not None
    assert report.share_lost < 0.02
    assert len(report.answers) == len(parity.FIXED) + len(ROWS)
    assert all(answer.parts_at is None or answer.tie for answer in report.answers)


def test_adapters_that_learned_nothing_pass(train: Callable[..., Trained], fused: Fused) -> None:
    for how in ({"method": "lora"}, {"method": "dora"}, {"method": "full"}):
        trained = train(iters=0, **how)
        assert trained.change < 1e-3
        report = parity.compare(trained, folder := fused(trained), SHARE)
        assert report.cause is None
        assert report.share_lost is None
        shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_dropped_layer_is_named(train: Callable[..., Trained], fused: Fused, method: str) -> None:
    trained = train(method=method)
    folder = fused(trained)
    base = weights_of(trained.base)
    edit_weights(folder, lambda name, value: base[name] if "layers.2." in name else value)
    assert "the adapters of layer 2 (counted from 0) are not in" in cause(trained, folder)


def test_adapters_that_were_never_added_are_named(
    train: Callable[..., Trained], fused: Fused
) -> None:
    trained = train()
    folder = fused(trained)
    shutil.copyfile(trained.base / "model.safetensors", folder / "model.safetensors")
    assert "adapters of layer 0, 1, 2, 3, 4, 5 " in cause(trained, folder)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_wrong_scale_is_named(
    train: Callable[..., Trained], fused: Fused, tmp_path: Path, method: str
) -> None:
    trained = train(method=method)
    other = Path(shutil.copytree(trained.adapters, tmp_path / "other"))
    written = files.read_json(other / "adapter_config.json")
    written["lora_parameters"]["scale"] *= 2
    files.write_json(other / "adapter_config.json", written)
    said = cause(trained, fused(trained, adapters=other))
    assert said.startswith("the scale: the fused weights have ")
    times = float(said.split()[6])
    assert times == pytest.approx(2, abs=0.01 if method == "lora" else 0.3)


def test_half_of_a_full_training_is_named(train: Callable[..., Trained], fused: Fused) -> None:
    trained = train(method="full")
    folder = fused(trained)
    base = weights_of(trained.base)
    edit_weights(folder, lambda name, value: (value + base[name]) / 2)
    assert "the scale: the fused weights have 0.5 times" in cause(trained, folder)


def test_the_worst_weights_are_named(train: Callable[..., Trained], fused: Fused) -> None:
    trained = train(num_layers=2)
    folder = fused(trained)
    bad = ("layers.5.mlp.up_proj.weight", "layers.0.self_attn.o_proj.weight")
    edit_weights(folder, lambda name, value: value[::-1] if name.endswith(bad) else value)
    said = cause(trained, folder)
    assert said.startswith("2 weights are not the trained ones, worst ")
    assert "model.layers.5.mlp.up_proj.weight (" in said
    assert "model.layers.0.self_attn.o_proj.weight (not trained, and not the base's)" in said


def test_a_weight_that_lost_half_shuts_the_gate_where_no_question_shows_it(
    train: Callable[..., Trained], fused: Fused
) -> None:
    trained = train()
    folder = fused(trained)
    lost = "model.layers.5.self_attn.k_proj.weight"
    base = weights_of(trained.base)[lost]
    edit_weights(folder, lambda name, value: (value + base) / 2 if name == lost else value)
    report = parity.compare(trained, folder, SHARE)
    assert report.difference < report.tolerance
    assert report.cause is not None
    assert f"{lost} (50% of its change lost)" in report.cause


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("chat_template.jinja", "assistant", "model", "the chat template is not the base's"),
        ("tokenizer.json", '"?":30,"@":31', '"?":31,"@":30', "the tokenizer is not the base's"),
        ("config.json", "6143", "6142", "the stops: config.json has {"),
        ("generation_config.json", "6143", "6142", "the stops: generation_config.json has"),
        ("config.json", "10000.0", "20000.0", "config.json is not the base's: rope_theta differ"),
    ],
)
def test_what_is_no_weight_is_named(
    train: Callable[..., Trained], fused: Fused, file: str, old: str, new: str, said: str
) -> None:
    trained = train()
    folder = fused(trained)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    assert said in cause(trained, folder)


def test_a_wrong_template_is_shown_with_the_question(
    train: Callable[..., Trained], fused: Fused
) -> None:
    trained = train()
    folder = fused(trained)
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages[-1]['content'] }}", encoding="utf-8")
    said = cause(trained, folder)
    assert parity.FIXED[0][0]["content"] in said
    assert "expected '<|im_start|>user" in said
    template.unlink()
    assert "the chat template is not the base's" in cause(trained, folder)


def test_adapters_that_drown_in_four_bits_are_named(
    train: Callable[..., Trained], fused: Fused
) -> None:
    trained = train("4bit", iters=2)
    report = parity.compare(trained, fused(trained), SHARE)
    assert report.cause is not None
    assert report.cause.startswith("quantizing the fused weights lost ")
    assert report.share_lost is not None
    assert report.share_lost > 2 * SHARE


def test_a_dropped_layer_is_told_from_drowned_ones(
    train: Callable[..., Trained], fused: Fused
) -> None:
    trained = train("8bit", iters=2)
    folder = fused(trained)
    base = weights_of(trained.base)
    edit_weights(folder, lambda name, value: base[name] if "layers.2." in name else value)
    assert "the adapters of layer 2 " in cause(trained, folder)


def test_a_quantized_base_is_dequantized_where_much_would_be_lost(
    train: Callable[..., Trained], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = train("4bit", iters=2)
    out = tmp_path / "model"
    report, dequantized = weights_module.fuse_and_compare(
        trained.base, trained.adapters, out, ROWS, end=END, dequantize=None, max_difference=SHARE
    )
    assert dequantized
    assert report.cause is None
    assert report.share_lost is not None
    assert report.share_lost < 0.01
    assert "quantization" not in files.read_json(out / "config.json")
    said = " ".join(capfd.readouterr().err.split())
    assert "fused dequantized, because quantizing the fused weights lost" in said
    assert "largest logit difference" in said


def test_what_does_not_pass_leaves_what_was_there(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train("4bit", iters=2)
    out = Path(shutil.copytree(trained.base, tmp_path / "model"))
    before = digest_model(out)
    with pytest.raises(UserError, match=r"was not written: quantizing .*; fuse.dequantize=true"):
        weights_module.fuse_and_compare(
            trained.base,
            trained.adapters,
            out,
            ROWS,
            end=END,
            dequantize=False,
            max_difference=SHARE,
        )
    assert digest_model(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_adapters_without_numbers_are_named(
    train: Callable[..., Trained], tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(train().adapters, tmp_path / "adapters"))
    path = str(folder / "adapters.safetensors")
    weights = cast("dict[str, mx.array]", mx.load(path))
    mx.save_safetensors(path, {name: value * mx.nan for name, value in weights.items()})
    with pytest.raises(UserError, match=r"nan or inf; .* smaller train\.learning_rate"):
        parity.ask(tiny, folder, ROWS)


def test_weights_that_mlx_only_reads_are_not_fused_into(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "awq"))
    written = files.read_json(base / "config.json")
    files.write_json(
        base / "config.json", written | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    )
    with pytest.raises(UserError, match=r"fuse\.dequantize: .* expected null or true"):
        weights_module.fuse_and_compare(
            base, tmp_path, tmp_path / "out", [], end=END, dequantize=False, max_difference=SHARE
        )


def test_another_greedy_answer_passes_at_a_tie_only(
    train: Callable[..., Trained], fused: Fused
) -> None:
    """The trained model's two best tokens, exchanged where it prefers the first by little or much.

    The greedy answers then part there, while all weights are what they should be.
    """
    trained = train()
    folder = fused(trained)
    one = trained.said[len(parity.FIXED)]
    answered = len(one.ids) - one.asked + 1
    order = np.argsort(one.logits[-answered:], axis=-1)
    best, second = order[:, -1], order[:, -2]
    rows = np.arange(len(one.logits) - answered, len(one.logits))
    gaps = one.logits[rows, best] - one.logits[rows, second]
    for at, tie in ((int(gaps.argmin()), True), (int(gaps.argmax()), False)):
        logits = one.logits.copy()
        place = rows[at]
        logits[place, [best[at], second[at]]] = logits[place, [second[at], best[at]]]
        said = [replace(other, logits=logits) if other is one else other for other in trained.said]
        share = 1.01 * float(gaps[at]) / trained.change if tie else SHARE
        report = parity.compare(replace(trained, said=said), folder, share)
        answer = report.answers[len(parity.FIXED)]
        assert (answer.parts_at, answer.tie) == (at, tie)
        assert (report.cause is None) == tie


def test_plain_texts_and_long_questions_are_asked_for_what_they_are(
    tiny: Path, tmp_path: Path, train: Callable[..., Trained]
) -> None:
    long = {"messages": [{"role": "user", "content": "字" * 2000}, ROWS[0]["messages"][1]]}
    trained = parity.ask(tiny, train().adapters, [{"text": "春眠不觉晓" * 100}, long])
    assert len(trained.rows) == len(parity.FIXED) + 2
    assert len(trained.said) == len(parity.FIXED) + 1
    assert trained.said[-1].asked == parity.TEXT
    assert all(len(one.logits) <= parity.POSITIONS for one in trained.said)
