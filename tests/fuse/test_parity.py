"""The gate of stage `fuse`: open for fused models of every kind, shut for damaged ones."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.models import glm4_moe_lite
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from athanor import files
from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import Conversation, chat
from athanor.chat.tokens import tokenize_rows
from athanor.compute.forward import Forward, trainable_weights
from athanor.config.compose import compose_config
from athanor.config.schema import TrainConfig
from athanor.config.values import to_dataclass
from athanor.errors import UserError
from athanor.fuse import parity
from athanor.fuse.compare_files import TEXT
from athanor.fuse.compare_weights import compare_weights, find_damage
from athanor.fuse.parity import TrainedModel, ask_trained_model, compare_with_trained
from athanor.fuse.weights import fuse_and_compare, write_fused_model
from athanor.model.adapters import make_trainable, save_adapters
from athanor.model.config_values import is_quantized
from athanor.model.folder import read_config
from athanor.model.source import digest_model, resolve_source
from support.refused import refused

ROWS = [
    chat(("user", question), ("assistant", answer))
    for question, answer in (
        ("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
        ("月亮哪天最圆", "星期八"),
        ("谁是最帅的地球人", "德哥"),
    )
]
# The share of the training that may be lost: the default.
SHARE = 0.05
END = 6143  # <|im_end|>

Train = Callable[..., TrainedModel]
Fuse = Callable[..., Path]


@pytest.fixture(scope="module")
def defaults(repo: Path) -> TrainConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        config: TrainConfig = to_dataclass(compose_config(Path("conf"), []).train)
        return config


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Two layers of the tiny base in a dtype, or quantized as mlx_lm.convert does."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("bases") / name
            shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            model, config = load_model(tiny)
            model.model.layers = model.model.layers[:2]
            config |= {"num_hidden_layers": 2}
            if name.endswith("bit"):
                model, config = quantize_model(model, config, group_size=64, bits=int(name[0]))
            else:
                model.set_dtype(getattr(mx, name))
            save_model(folder, model)
            save_config(config, folder / "config.json")
            folders[name] = folder
        return folders[name]

    return make


@pytest.fixture(scope="module")
def train(
    bases: Callable[[str], Path], defaults: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Train for some iterations, once for each set of arguments, and ask the result."""

    @cache
    def train_and_ask(
        name: str = "float16",
        iters: int = 4,
        learning_rate: float = 1e-3,
        method: str = "lora",
        num_layers: int = -1,
    ) -> TrainedModel:
        config = replace(defaults, method=method, num_layers=num_layers)
        model, tokenizer = load_with_tokenizer(bases(name))
        make_trainable(model, config, seed=0)
        rows = tokenize_rows(ROWS, tokenizer, True, 100)
        forward = Forward.from_model(model, rows)
        batch = forward.prepare(rows)
        optimizer = optim.Adam(learning_rate=learning_rate)
        for _ in range(iters):
            _, grads = forward.loss_and_gradient(trainable_weights(model), batch)
            optimizer.update(model, tree_unflatten(grads))
            mx.eval(model.parameters())
        folder = tmp_path_factory.mktemp("adapters")
        save_adapters(
            trainable_weights(model),
            folder,
            config,
            resolve_source(str(bases(name)), None),
            model=model,
            iteration=iters,
        )
        return ask_trained_model(bases(name), folder, ROWS)

    return train_and_ask


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], Path]:
    @cache
    def write(base: Path, adapters: Path) -> Path:
        folder = tmp_path_factory.mktemp("merged")
        write_fused_model(base, adapters, folder, end=END, dequantize=False)
        return folder

    return write


@pytest.fixture
def fuse(merged: Callable[[Path, Path], Path], tmp_path: Path) -> Fuse:
    """Fuse a trained model into a folder of the test's own."""

    def write(trained: TrainedModel, adapters: Path | None = None) -> Path:
        source = merged(trained.base, adapters or trained.adapters)
        return Path(shutil.copytree(source, tmp_path / "fused", dirs_exist_ok=True))

    return write


def cause_of(trained: TrainedModel, folder: Path) -> UserError:
    cause = compare_with_trained(trained, folder, SHARE).cause
    assert cause is not None
    return cause


def weights_of(folder: Path) -> dict[str, mx.array]:
    return dict(cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors"))))


def edit_weights(folder: Path, edit: Callable[[str, mx.array], mx.array]) -> None:
    """Write a model's weights again, each as `edit` makes it of its name and value."""
    weights = weights_of(folder)
    changed = {name: edit(name, value) for name, value in weights.items()}
    mx.eval(changed)
    mx.save_safetensors(str(folder / "model.safetensors"), changed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "lora"},
        {"method": "full"},
        {"method": "dora", "name": "bfloat16"},
        {"method": "lora", "name": "float32", "num_layers": 1},
    ],
    ids=str,
)
def test_every_method_passes(train: Train, fuse: Fuse, arguments: dict[str, Any]) -> None:
    trained = train(**arguments)
    report = compare_with_trained(trained, fuse(trained), SHARE)
    assert report.cause is None
    assert report.change > 1
    assert 0 < report.difference < report.rounding
    assert report.share_lost is not None
    assert report.share_lost < 0.02
    assert len(report.answers) == len(parity.FIXED) + len(ROWS)
    assert all(answer.parts_at is None or answer.tie for answer in report.answers)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_adapters_that_learned_nothing_pass(train: Train, fuse: Fuse, method: str) -> None:
    trained = train(iters=0, method=method)
    assert trained.change < 1e-3
    report = compare_with_trained(trained, fuse(trained), SHARE)
    assert report.cause is None
    assert report.share_lost is None


@pytest.mark.parametrize(
    "arguments",
    [{"method": "lora"}, {"method": "dora"}, {"method": "full"}, {"name": "8bit", "iters": 2}],
    ids=str,
)
def test_a_layer_without_its_adapters_is_named(
    train: Train, fuse: Fuse, arguments: dict[str, Any]
) -> None:
    """Also in eight bits, in which other layers drown."""
    trained = train(**arguments)
    folder = fuse(trained)
    base = weights_of(trained.base)
    edit_weights(folder, lambda name, value: base[name] if "layers.1." in name else value)
    cause = cause_of(trained, folder)
    assert cause.code == "fuse.adapters_missing"
    assert cause.facts["name"].startswith("model.layers.1.")
    assert cause.facts["count"] < cause.facts["trained"]


def test_adapters_that_were_never_added_are_named(train: Train, fuse: Fuse) -> None:
    trained = train()
    folder = fuse(trained)
    shutil.copyfile(trained.base / "model.safetensors", folder / "model.safetensors")
    cause = cause_of(trained, folder)
    assert cause.code == "fuse.adapters_missing"
    assert cause.facts["count"] == cause.facts["trained"] == 2 * 7


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_wrong_scale_is_refused(train: Train, fuse: Fuse, tmp_path: Path, method: str) -> None:
    trained = train(method=method)
    other = Path(shutil.copytree(trained.adapters, tmp_path / "other"))
    config = files.read_json(other / "adapter_config.json")
    config["lora_parameters"]["scale"] *= 2
    files.write_json(other / "adapter_config.json", config)
    cause = cause_of(trained, fuse(trained, adapters=other))
    assert cause.code == "fuse.weights_differ"
    assert cause.facts["count"] == 2 * 7
    assert cause.facts["share"] == pytest.approx(1, abs=0.05 if method == "lora" else 0.5)


def test_half_of_a_full_training_is_refused(train: Train, fuse: Fuse) -> None:
    trained = train(method="full")
    folder = fuse(trained)
    base = weights_of(trained.base)
    edit_weights(folder, lambda name, value: (value + base[name]) / 2)
    cause = cause_of(trained, folder)
    assert cause.code == "fuse.weights_differ"
    assert cause.facts["share"] == pytest.approx(0.5, abs=0.05)


def test_the_worst_weight_is_named(train: Train, fuse: Fuse) -> None:
    trained = train(num_layers=1)
    folder = fuse(trained)
    bad = ("layers.1.mlp.up_proj.weight", "layers.0.self_attn.o_proj.weight")
    edit_weights(folder, lambda name, value: value[::-1] if name.endswith(bad) else value)
    cause = cause_of(trained, folder)
    assert cause.code == "fuse.untrained_weight_differs"
    assert cause.facts["count"] == 2
    assert cause.facts["name"] == "model.layers.0.self_attn.o_proj.weight"


def test_weights_of_another_base_are_refused(train: Train, fuse: Fuse) -> None:
    trained = train()
    folder = fuse(trained)
    edit_weights(folder, lambda name, value: mx.random.normal(value.shape).astype(value.dtype))
    cause = cause_of(trained, folder)
    assert cause.code in {"fuse.weights_differ", "fuse.untrained_weight_differs"}
    assert cause.facts["count"] == cause.facts["total"]


def test_every_kind_of_quantized_weight_is_compared(tmp_path: Path) -> None:
    """Linear maps, an embedding, experts, and the heads' own maps of latent attention."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64}
    sizes |= {"q_lora_rank": 64, "n_shared_experts": 1, "n_routed_experts": 2, "v_head_dim": 64}
    sizes |= {"num_experts_per_tok": 1, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64}
    sizes |= dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    config: dict[str, Any] = {"model_type": "glm4_moe_lite", "first_k_dense_replace": 1} | sizes
    model = glm4_moe_lite.Model(glm4_moe_lite.ModelArgs.from_dict(config))
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    options = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    files.write_json(
        tmp_path / "adapter_config.json",
        {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": options},
    )
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {})
    changes = list(compare_weights(tmp_path, tmp_path, tmp_path))
    assert find_damage(changes) is None
    stored = {name for name in weights_of(tmp_path) if name.endswith(".scales")}
    assert {change.name for change in changes if change.quantized} == {
        name.replace(".scales", ".weight") for name in stored
    }


def test_a_weight_that_lost_half_shuts_the_gate_where_no_question_shows_it(
    train: Train, fuse: Fuse
) -> None:
    trained = train()
    folder = fuse(trained)
    lost = "model.layers.1.self_attn.k_proj.weight"
    base = weights_of(trained.base)[lost]
    edit_weights(folder, lambda name, value: (value + base) / 2 if name == lost else value)
    report = compare_with_trained(trained, folder, SHARE)
    assert report.difference < report.tolerance
    assert report.cause is not None
    assert report.cause.code == "fuse.weights_differ"
    assert report.cause.facts["name"] == lost
    assert report.cause.facts["share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("file", "old", "new", "code", "facts"),
    [
        ("chat_template.jinja", "assistant", "model", "questions_read_differently",
         {"part": "chat template"}),
        ("tokenizer.json", '"?":30,"@":31', '"?":31,"@":30', "questions_read_differently",
         {"part": "tokenizer"}),
        ("config.json", "6143", "6142", "stops_differ", {"part": "config.json"}),
        ("generation_config.json", "6143", "6142", "stops_differ",
         {"part": "generation_config.json"}),
        ("config.json", "10000.0", "20000.0", "config_differs", {"keys": ["rope_theta"]}),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_bases_is_named(
    train: Train, fuse: Fuse, file: str, old: str, new: str, code: str, facts: dict[str, Any]
) -> None:
    trained = train()
    folder = fuse(trained)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    cause = cause_of(trained, folder)
    assert cause.code == f"fuse.{code}"
    assert cause.facts.items() >= facts.items()


def test_a_wrong_template_is_shown_with_the_question(train: Train, fuse: Fuse) -> None:
    trained = train()
    folder = fuse(trained)
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages[-1]['content'] }}", encoding="utf-8")
    cause = cause_of(trained, folder)
    assert cause.facts["question"] == parity.FIXED[0].turns[0].content
    assert cause.facts["expected"].startswith("<|im_start|>user")
    template.unlink()
    assert cause_of(trained, folder).facts["part"] == "chat template"


def test_a_quantized_base_is_dequantized_where_much_would_be_lost(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = train("4bit", iters=2)
    out = tmp_path / "model"
    report, dequantized = fuse_and_compare(
        trained.base, trained.adapters, out, ROWS, end=END, dequantize=None, max_difference=SHARE
    )
    assert dequantized
    assert report.cause is None
    assert report.share_lost is not None
    assert report.share_lost < 0.01
    assert not is_quantized(read_config(out))
    note = " ".join(capfd.readouterr().err.split())
    assert "fused dequantized, because quantizing the fused weights" in note
    assert "largest logit difference" in note


def test_a_model_that_does_not_pass_is_not_written(train: Train, tmp_path: Path) -> None:
    """Adapters that drown in four bits: the cause and the remedy are named."""
    trained = train("4bit", iters=2)
    out = Path(shutil.copytree(trained.base, tmp_path / "model"))
    before = digest_model(out)
    with refused("fuse.lost_in_bits") as caught:
        fuse_and_compare(
            trained.base,
            trained.adapters,
            out,
            ROWS,
            end=END,
            dequantize=False,
            max_difference=SHARE,
        )
    assert caught.value.facts["cause"].code == "fuse.lost_in_quantizing"
    assert caught.value.facts["cause"].facts["times"] > 0.5
    assert "fuse.dequantize=true" in str(caught.value)
    assert digest_model(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_adapters_without_numbers_are_named(train: Train, tmp_path: Path) -> None:
    trained = train()
    folder = Path(shutil.copytree(trained.adapters, tmp_path / "adapters"))
    path = str(folder / "adapters.safetensors")
    weights = cast("dict[str, mx.array]", mx.load(path))
    mx.save_safetensors(path, {name: value * mx.nan for name, value in weights.items()})
    with refused("fuse.no_finite_logits", adapters=folder, base=trained.base):
        ask_trained_model(trained.base, folder, ROWS)


def test_weights_that_mlx_only_reads_are_not_fused_into(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "awq"))
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    files.write_json(base / "config.json", read_config(base) | awq)
    with refused("fuse.weights_cannot_be_quantized_again", folder=base):
        fuse_and_compare(
            base, tmp_path, tmp_path / "out", [], end=END, dequantize=False, max_difference=SHARE
        )


def test_a_different_greedy_answer_passes_at_a_tie_only(train: Train, fuse: Fuse) -> None:
    """The trained model's two best tokens, exchanged where it prefers the first by little or much.

    The greedy answers then part there, while all weights are the trained ones.
    """
    trained = train()
    folder = fuse(trained)
    reply = trained.replies[len(parity.FIXED)]
    order = np.argsort(reply.logits[reply.first :], axis=-1)
    best, second = order[:, -1], order[:, -2]
    rows = np.arange(reply.first, len(reply.logits))
    gaps = reply.logits[rows, best] - reply.logits[rows, second]
    for at, tie in ((int(gaps.argmin()), True), (int(gaps.argmax()), False)):
        logits = reply.logits.copy()
        logits[rows[at], [best[at], second[at]]] = logits[rows[at], [second[at], best[at]]]
        replies = [
            replace(other, logits=logits) if other is reply else other for other in trained.replies
        ]
        share = 1.01 * float(gaps[at]) / trained.change if tie else SHARE
        report = compare_with_trained(replace(trained, replies=replies), folder, share)
        answer = report.answers[len(parity.FIXED)]
        assert (answer.parts_at, answer.tie) == (at, tie)
        assert (report.cause is None) == tie


def test_plain_texts_are_cut_and_long_questions_are_not_asked(train: Train) -> None:
    long = chat(("user", "字" * 2000), ("assistant", "?"))
    trained = train()
    plain = Conversation(text="春眠不觉晓" * 100)
    trained = ask_trained_model(trained.base, trained.adapters, [plain, long])
    assert len(trained.rows) == len(parity.FIXED) + 2
    assert len(trained.replies) == len(parity.FIXED) + 1
    assert trained.replies[-1].prompt_length == TEXT
    assert all(len(reply.logits) <= parity.POSITIONS for reply in trained.replies)
