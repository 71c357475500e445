"""Questions from the shell: what base and tuned model say, and what is missing."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from athanor import files, generate
from athanor.chat.contract import Contract
from athanor.chat.load import load_tokenizer
from athanor.paths import Workspace
from support.refused import refused, refused_keys
from support.stages import Stages


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


def asked(*arguments: str, said: str = "") -> dict[str, list[str]]:
    """Runs the command; by question the lines that answer it."""
    done = subprocess.run(
        [sys.executable, "-m", "athanor.generate", *arguments],
        input=said,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            found[next(reversed(found))].append(line.strip())
        else:
            found[line] = []
    return found


def test_both_models_answer_as_in_the_stage_test(stages: Stages) -> None:
    stages("config", overrides=("train.iters=20",))
    stages("prepare", "train", "test")
    lines = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    questions = {line["prompt"][0]["content"]: line for line in lines if line["split"] == "train"}
    moon, *others = questions
    [answers] = asked(moon).values()
    base, tuned = (questions[moon][who]["text"] for who in ("base", "tuned"))
    assert tuned == questions[moon]["reference"]
    assert answers == [f"base:  {base}  (stopped)", f"tuned: {tuned}  (stopped)"]

    # From a pipe a question a line; an answer can be cut off, and a system message comes first.
    by_question = asked("--max-tokens", "1", said=f"{moon}\n\n  {others[0]}\n")
    assert list(by_question) == [moon, others[0]]
    for _, tuned in by_question.values():
        assert re.fullmatch(r"tuned: .+  \(cut off after 1 tokens\)", tuned)
    assert asked("-", "--system", "请用英文回答", said=moon)[moon][0] != answers[0]
    sampled = [asked("--temp", "1.5", "--seed", seed, moon) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]

    record = Path("artifacts/prepare/model.json")
    files.write_json(record, files.read_json(record) | {"digest": "0" * 64})
    with refused("generate.other_base", record=record):
        generate.read_base(Workspace.here())
    with refused_keys(("config.too_small", "test.max_tokens")):
        stages("generate", overrides=("--max-tokens", "0", moon))


def test_a_model_of_plain_texts_goes_on_with_one(stages: Stages, tiny: Path) -> None:
    shutil.copytree(tiny, "bare", ignore=shutil.ignore_patterns("chat_template*"))
    shutil.rmtree("data")
    Path("data").mkdir()
    text = "春眠不觉晓，处处闻啼鸟"
    for split in ("train", "valid"):
        row = json.dumps({"text": text}, ensure_ascii=False)
        Path(f"data/{split}.jsonl").write_text(row + "\n", encoding="utf-8")
    checks = ("data.checks.leak=warn", "data.checks.near_leak=warn")
    stages("config", overrides=("model.path=bare", "train.iters=30", *checks))
    stages("prepare", "train")
    contract = Contract.read(Path("artifacts/prepare/chat.json"))
    assert contract.end == load_tokenizer(tiny).eos_token_id  # what texts were ended with
    [answers] = asked(text[:5]).values()
    assert answers[1] == f"tuned: {text[5:]}  (stopped)"


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused("config.no_params", params=Path("params.yaml")):
        stages("generate", overrides=("月亮哪天最圆",))
    stages("config")
    with refused("generate.not_trained", path=Path("artifacts/prepare/model.json")):
        stages("generate", overrides=("月亮哪天最圆",))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with refused("generate.no_question_on_input"):
        stages("generate")
