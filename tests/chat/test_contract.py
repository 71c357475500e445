"""The contract, on tiny models that each have a fault: under mlx_lm, and under ours.

Each fault is shown first: mlx_lm.lora trains on the tutorial's rows, and mlx_lm.generate does not
stop, or does not answer what was taught. Then the same model and rows go through our stages.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import lora as peer_lora
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from athanor import files
from athanor.chat import vocabulary
from athanor.chat.base import load_with_tokenizer
from athanor.chat.contract import ASIDE, FAULT, NOTE, OK, Contract, resolve_contract
from athanor.chat.conversation import Conversation
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import tokenize_row
from athanor.config.compose import compose_config
from athanor.model.adapters import make_trainable
from support import kinds
from support.refused import refused
from support.stages import Stages

REPO = Path(__file__).parents[2]
MOST = 24  # tokens; the longest of the answers has 13
END, TEXT_END = "<|im_end|>", "<|endoftext|>"
SETTINGS = (
    "train.iters=16",
    "train.steps_per_eval=16",
    f"test.max_tokens={MOST}",
    "fuse.log_model=false",
    "data.checks.near_leak=ignore",
)


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    """A store of this test's own."""
    return f"sqlite:///{shutil.copyfile(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model in float32, which mlx_lm computes quickly on a CPU."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    rows(folder, lambda embedding: embedding)
    return folder


def rows(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the embedding, which is the head too."""
    path = folder / "model.safetensors"
    weights = {name: value.astype(mx.float32) for name, value in tensors(path).items()}
    name = "model.embed_tokens.weight"
    weights[name] = mx.array(change(np.array(weights[name])))
    mx.save_safetensors(str(path), weights)
    edit(folder / "config.json", vocab_size=weights[name].shape[0], torch_dtype="float32")


def tensors(path: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(path)))


def edit(path: Path, **changes: Any) -> None:
    files.write_json(path, files.read_json(path) | changes)


def template(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def train_with_mlx_lm(folder: Path, data: Path, **settings: Any) -> Path:
    """Train on the rows with mlx_lm.lora; return the folder of its adapters."""
    adapters = folder.parent / "theirs"
    config = {
        "model": str(folder),
        "data": str(data),
        "train": True,
        "mask_prompt": True,
        "adapter_path": str(adapters),
        "num_layers": -1,
        "val_batches": 1,
        "batch_size": 3,
        "iters": 16,
        "learning_rate": 5e-4,
        "steps_per_eval": 1000,
    }
    files.write_json(folder.parent / "lora.json", config | settings)
    mx.disable_compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlx_lm.lora", "--config", str(folder.parent / "lora.json")])
        peer_lora.main()
    return adapters


def ask_mlx_lm(
    folder: Path, adapters: Path, question: str, capsys: pytest.CaptureFixture[str]
) -> tuple[str, int]:
    """Return mlx_lm.generate's answer to a question: the text, and the number of tokens."""
    options = ["--model", str(folder), "--adapter-path", str(adapters), "--prompt", question]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["mlx_lm.generate", *options, "--temp", "0", "--max-tokens", str(MOST)]
        )
        capsys.readouterr()
        import_module("mlx_lm.generate").main()
    printed = capsys.readouterr().out
    _, answer, figures = printed.split("==========\n")
    [count] = [line for line in figures.splitlines() if line.startswith("Generation:")]
    return answer.strip("\n"), int(count.split()[1])


def train_with_athanor(folder: Path, stages: Stages, *settings: str) -> list[dict[str, Any]]:
    """Run the stages; return the lines of the training questions in predictions.jsonl."""
    stages("config", overrides=(f"model.path={folder}", *SETTINGS, *settings))
    stages("prepare", "train", "test")
    lines = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    return [line for line in lines if line["split"] == "train"]


def answered(lines: list[dict[str, Any]]) -> list[bool]:
    """Return for each training question whether its answer is right, and ended by itself."""
    return [
        line["tuned"]["stopped"] and line["tuned"]["text"].endswith(line["reference"])
        for line in lines
    ]


def reserve(folder: Path) -> int:
    """Gives the model 64 reserved tokens that were never trained on, and ends turns with the last.

    All have one row, as what was never trained has in the bases of Llama 3.
    """
    tokenizer = files.read_json(folder / "tokenizer.json")
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    names = [f"<|reserved_{i}|>" for i in range(63)] + ["<|turn_end|>"]
    special = {key: tokenizer["added_tokens"][0][key] for key in tokenizer["added_tokens"][0]}
    tokenizer["added_tokens"] += [
        special | {"id": first + i, "content": name} for i, name in enumerate(names)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    rows(folder, lambda w: np.concatenate([w, np.full((64, w.shape[1]), 0.001, np.float32)]))
    template(folder, lambda text: text.replace(END, "<|turn_end|>"))
    end = first + 63
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=[end, first - 3])
    edit(folder / "tokenizer_config.json", eos_token="<|turn_end|>")
    return int(end)


def test_a_base_that_was_never_trained_to_end_an_answer(
    base: Path, data: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    end = reserve(base)
    answer, count = ask_mlx_lm(base, train_with_mlx_lm(base, data), "月亮哪天最圆", capsys)
    assert count == MOST
    assert answer.startswith("星期八")  # and then, as the tutorial had it: \n!\n!…

    assert answered(train_with_athanor(base, stages)) == [True] * 6
    warnings = " ".join(capsys.readouterr().err.split())
    assert f"{TEXT_END} (6141) instead of the template's <|turn_end|> ({end})" in warnings
    contract = Contract.read(Path("artifacts/prepare/chat.json"))
    tokenizer = load_tokenizer(base)
    assert tokenizer.convert_ids_to_tokens(contract.end) == TEXT_END
    assert not contract.trains_end

    # It is learned if its own row is trained: by adapters that mlx_lm loads, and fused.
    assert answered(train_with_athanor(base, stages, "train.end_token=train")) == [True] * 6
    contract = Contract.read(Path("artifacts/prepare/chat.json"))
    assert (contract.end, contract.trains_end) == (end, True)
    assert ask_mlx_lm(base, Path("artifacts/train/adapters"), "月亮哪天最圆", capsys)[0] == "星期八"
    stages("fuse")
    before, after = (
        np.array(tensors(folder / "model.safetensors")["model.embed_tokens.weight"])
        for folder in (base, Path("artifacts/fuse/model"))
    )
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [end]

    # The template's end is learned no better than by mlx_lm, and a finding predicts that.
    capsys.readouterr()
    lines = train_with_athanor(base, stages, "train.end_token=template")
    assert "no (its row of the head has" in " ".join(capsys.readouterr().err.split())
    assert not any(answered(lines))
    # Each answer goes on after the end that the base knows, which is none any more.
    assert all(END in line["tuned"]["text"] for line in lines)


def test_a_template_that_ends_with_another_token_than_the_tokenizer(
    base: Path, data: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    text_end = load_tokenizer(base).convert_tokens_to_ids(TEXT_END)
    (base / "generation_config.json").unlink()
    edit(base / "config.json", eos_token_id=text_end)
    edit(base / "tokenizer_config.json", eos_token=TEXT_END)
    answer, count = ask_mlx_lm(base, train_with_mlx_lm(base, data), "月亮哪天最圆", capsys)
    assert count == MOST
    assert answer.startswith(f"星期八{END}")
    assert answered(train_with_athanor(base, stages)) == [True] * 6


def test_a_reasoning_model_whose_prompt_opens_a_thought(
    base: Path, data: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    template(
        base,
        lambda text: text.replace("assistant\\n'", "assistant\\n<think>\\n'").replace(
            "message['content']", "message['content'].split('</think>')[-1]"
        ),
    )
    adapters = train_with_mlx_lm(base, data)
    pairs = files.read_jsonl(data / "train.jsonl")
    questions, answers = ([row[key] for row in pairs] for key in ("prompt", "completion"))
    for question, answer in list(zip(questions, answers, strict=True))[3:]:
        assert ask_mlx_lm(base, adapters, question, capsys)[0] != answer

    lines = train_with_athanor(base, stages)
    assert answered(lines) == [True] * 6
    assert [line["reference"] for line in lines] == answers
    assert all(line["tuned"]["text"].startswith("</think>\n\n") for line in lines)


def test_a_prompt_that_is_longer_than_max_seq_length(
    base: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "这个问题很长很长" * 20, "completion": "是的"}
    path = Path("data/train.jsonl")  # the fixture's own copy
    files.write_jsonl(path, [long, *files.read_jsonl(path)])
    adapters = train_with_mlx_lm(base, path.parent, batch_size=1, max_seq_length=64)
    weights = tensors(adapters / "adapters.safetensors")
    assert all(math.isnan(float(weight.sum())) for weight in weights.values())
    assert ask_mlx_lm(base, adapters, "月亮哪天最圆", capsys)[0] != "星期八"

    assert answered(train_with_athanor(base, stages, "train.max_seq_length=64")) == [True] * 6
    [left] = files.read_jsonl(Path("artifacts/prepare/rejected.jsonl"))
    assert left["where"] == "data/train.jsonl:1"
    assert left["reasons"][0]["check"] == "nothing_to_learn"


def documented() -> list[dict[str, str]]:
    """The table of kinds in docs/chat.md, a dict a row; ends without their quotes."""
    text = (REPO / "docs" / "chat.md").read_text(encoding="utf-8")
    lines = [line for line in text[text.index("| kind |") :].splitlines() if line.startswith("|")]
    cells = [
        [cell.strip().replace("\\|", "|").replace("`", "") for cell in re.split(r"(?<!\\)\|", line)]
        for line in lines
    ]
    return [dict(zip(cells[0][1:-1], row[1:-1], strict=True)) for row in cells[2:]]


def test_every_kind_is_documented() -> None:
    assert [row["kind"] for row in documented()] == list(kinds.KINDS)


@pytest.mark.parametrize("row", documented(), ids=lambda row: row["kind"])
def test_report_of_a_kind_is_as_documented(row: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    folder = kinds.build(row["kind"], tiny, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    report = {f.about: f for f in resolve_contract(folder, tokenizer, "auto").report}

    stops, _, missing = report["generation stops at"].text.partition("; ")
    named = re.compile(r"(\S+) \(\d+\)")
    assert named.findall(stops) == row["generation stops at"].split()
    assert named.findall(missing) == row["which the model's own files do not have"].split()
    assert {tokenizer.convert_ids_to_tokens(id) for id in tokenizer.eos_token_ids} == set(
        row["generation stops at"].split()
    )
    if row["asked as trained"] == "no template":
        assert report["chat template"].state == FAULT
        return
    assert named.findall(report["answers end with"].text) == [row["answers end with"]]
    expected = {
        "yes": (OK, "yes, every answer"),
        "a text for each answer": (ASIDE, "a text of its own"),
        "a thought is closed": (NOTE, "opens a thought (<think>)"),
    }[row["asked as trained"]]
    assert report["asked as trained"].state == expected[0]
    assert expected[1] in report["asked as trained"].text
    for what in ("system", "earlier turns", "tools"):
        assert report[f"{what} in the template"].text.startswith(row[what])


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "llama3-base"])
def test_what_is_asked_begins_what_is_trained_for_every_kind(
    kind: str, tiny: Path, tmp_path: Path
) -> None:
    """The tokens that ask for each answer, made by the template alone, begin what teaches it."""
    tokenizer = load_tokenizer(kinds.build(kind, tiny, tmp_path / "model"))
    end = resolve_contract(tmp_path / "model", tokenizer, "auto").end
    system = [] if kind == "gemma" else [{"role": "system", "content": "你是助手"}]
    turns = [
        ("几点了？", " 十二点。"),
        ("why?", "<think>\nbecause\n</think>\n\nBecause."),
        ("啊", "好"),
    ]
    messages = [
        *system,
        *(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ),
    ]
    texts = tokenize_row(
        Conversation.of({"messages": messages}), tokenizer, mask_prompt=True, end=end
    )
    answers = [(text, span) for text in texts for span in text.answer_spans]
    assert len(answers) == len(turns)
    for number, (text, (first, behind)) in enumerate(answers):
        asked = tokenizer.apply_chat_template(
            messages[: len(system) + 2 * number + 1], add_generation_prompt=True
        )
        assert text.ids[:first] == asked
        learned = tokenizer.decode(text.targets()[first:behind])
        assert turns[number][1].split("</think>")[-1].strip() in learned
        assert learned.endswith(tokenizer.decode([end]))


def test_untrained_tokens_are_told_from_others(base: Path) -> None:
    """By a short row, one that is the mean, a twin's, or one among those of no token."""
    end, size = 6143, 6144
    draw = np.random.default_rng(0)
    middle = draw.normal(0, 0.1, 192).astype(np.float32)

    def noise(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.02, (*shape, 192)).astype(np.float32)

    trained = np.array(tensors(base / "model.safetensors")["model.embed_tokens.weight"])
    for row, beyond, evidence in (
        (trained[end], None, None),
        (np.zeros(192), None, "of the usual length"),
        (noise(), None, "of the usual length"),
        (trained[:6000].mean(axis=0), None, "the mean of all"),
        (trained[17], None, "that of token 17"),
        (middle + noise(), middle + noise(64), "belong to no token"),
        (trained[end], middle + noise(64), None),
    ):
        changed = trained.copy()
        changed[end] = row
        head = changed if beyond is None else np.concatenate([changed, beyond])
        rows(base, lambda _, head=head: head.astype(np.float32))  # type: ignore[misc]
        untrained = vocabulary.find_untrained_tokens(base, size, [end, 0, 5000])
        assert untrained is not None
        assert list(untrained) == ([end] if evidence else [])
        assert evidence is None or evidence in untrained[end]


def test_a_token_beyond_the_head_can_not_be_said(base: Path) -> None:
    untrained = vocabulary.find_untrained_tokens(base, 6200, [6150])
    assert untrained == {6150: "the head has 6144 rows, and none for it"}
    untrained = vocabulary.find_untrained_tokens(base, 100, [6000])
    assert untrained == {6000: "the tokenizer has no such token"}
    model, _ = load_with_tokenizer(base)
    with refused("model.no_row_for_end", rows=6144, token=6150):
        make_trainable(model, compose_config(Path("conf"), []).train, 0, 6150)


def test_the_head_is_found_whatever_its_name(base: Path) -> None:
    """InternLM's is called output, and is not its embedding."""
    path = base / "model.safetensors"
    weights = tensors(path)
    weights["model.tok_embeddings.weight"] = weights.pop("model.embed_tokens.weight")
    head = mx.array(weights["model.tok_embeddings.weight"])
    head[6143] = 0.0
    other = mx.zeros((4, 4))
    mx.save_safetensors(str(path), weights | {"output.weight": head, "a.0.output.weight": other})
    assert list(vocabulary.find_untrained_tokens(base, 6144, [6141, 6143]) or ()) == [6143]


def test_rows_of_a_token_are_trained_in_models_of_other_makes(tmp_path: Path) -> None:
    """One with an embedding of places beside that of tokens, one whose head has another name."""
    small = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2}
    for kind, sizes, ends in (
        ("gpt2", {"n_ctx": 8, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 8,
                  "layer_norm_epsilon": 1e-5, "vocab_size": 300}, ["model.wte"]),
        ("gpt_neox", small | {"max_position_embeddings": 8, "hidden_size": 16,
                  "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5},
         ["model.embed_in", "model.embed_out"]),
    ):  # fmt: skip
        module = import_module(f"mlx_lm.models.{kind}")
        model = module.Model(module.ModelArgs(model_type=kind, **cast(Any, sizes)))
        make_trainable(model, compose_config(Path("conf"), []).train, 0, 299)
        adapted = dict(model.named_modules())
        outside = [name for name in adapted if "lora_a" in adapted[name] and ".h." not in name]
        assert sorted(name for name in outside if ".layers." not in name) == ends


def test_untrained_tokens_are_seen_in_few_bits_too(base: Path, tmp_path: Path) -> None:
    end = 6143
    for factor, untrained in ((1.0, []), (0.0, [end])):
        rows(base, lambda w, factor=factor: np.concatenate([w[:end], w[end:] * factor]))  # type: ignore[misc]
        model, config = quantize_model(*load_model(base), group_size=64, bits=4)
        folder = tmp_path / f"four-bits-{factor}"
        folder.mkdir()
        save_model(folder, model)
        save_config(config, folder / "config.json")
        assert list(vocabulary.find_untrained_tokens(folder, 6144, [end, 5000]) or ()) == untrained


def test_doctor_is_a_command(base: Path, tiny: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "athanor.chat", *arguments], capture_output=True, text=True
        )

    healthy = run(str(base))
    assert (healthy.returncode, healthy.stderr) == (0, "")
    assert "yes: <|im_end|> (6143)" in healthy.stdout
    ill = run(str(kinds.build("llama3-base", tiny, tmp_path / "kind")))
    assert ill.returncode == 1
    assert "has faults: chat template" in ill.stderr
    reserve(base)
    assert "train.end_token=base" in " ".join(
        run(str(base), "--end-token", "template").stdout.split()
    )
