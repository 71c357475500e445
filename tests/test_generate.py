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
def store(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copyfile(empty_store, tmp_path / 'runs.db')}"


def run_main(*arguments: str, questions: str = "") -> None:
    """Run the command in this process, with questions on standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(questions))
        generate.main()


def read_answers(printed: str) -> dict[str, list[str]]:
    """Return the lines of both models by question."""
    answers: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if line.startswith("  "):
            answers[next(reversed(answers))].append(line.strip())
        else:
            answers[line] = []
    return answers


def test_both_models_answer_as_in_the_stage_test(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*arguments: str, questions: str = "") -> dict[str, list[str]]:
        capsys.readouterr()
        run_main(*arguments, questions=questions)
        return read_answers(capsys.readouterr().out)

    stages("config", overrides=("train.iters=16",))
    stages("prepare", "train", "test")
    lines = files.read_jsonl(Path("artifacts/test/predictions.jsonl"))
    questions = {line["prompt"][0]["content"]: line for line in lines if line["split"] == "train"}
    moon, *others = questions
    done = subprocess.run(
        [sys.executable, "-m", "athanor.generate", moon],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    [answers] = read_answers(done.stdout).values()
    base, tuned = (questions[moon][who]["text"] for who in ("base", "tuned"))
    assert tuned == questions[moon]["reference"]
    assert answers == [f"base:  {base}  (stopped)", f"tuned: {tuned}  (stopped)"]

    # A question a line from a pipe; answers that are cut off; a system message.
    by_question = ask("--max-tokens", "1", questions=f"{moon}\n\n  {others[0]}\n")
    assert list(by_question) == [moon, others[0]]
    for _, tuned in by_question.values():
        assert re.fullmatch(r"tuned: .+  \(cut off after 1 tokens\)", tuned)
    assert ask("-", "--system", "请用英文回答", questions=moon)[moon][0] != answers[0]
    sampled = [ask("--temp", "1.5", "--seed", seed, moon) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]

    record = Path("artifacts/prepare/model.json")
    files.write_json(record, files.read_json(record) | {"digest": "0" * 64})
    with refused("generate.other_base", record=record):
        generate.read_base(Workspace.here())
    with refused_keys(("config.too_small", "test.max_tokens")):
        run_main("--max-tokens", "0", moon)


def test_a_model_of_plain_texts_continues_them(
    stages: Stages, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, "bare", ignore=shutil.ignore_patterns("chat_template*"))
    shutil.rmtree("data")
    Path("data").mkdir()
    text = "春眠不觉晓，处处闻啼鸟"
    for split in ("train", "valid"):
        row = json.dumps({"text": text}, ensure_ascii=False)
        Path(f"data/{split}.jsonl").write_text(row + "\n", encoding="utf-8")
    checks = ("data.checks.leak=warn", "data.checks.near_leak=warn")
    stages("config", overrides=("model.path=bare", "train.iters=20", *checks))
    stages("prepare", "train")
    contract = Contract.read(Path("artifacts/prepare/chat.json"))
    assert contract.end == load_tokenizer(tiny).eos_token_id  # what texts were ended with
    capsys.readouterr()
    run_main(text[:5])
    [answers] = read_answers(capsys.readouterr().out).values()
    assert answers[1] == f"tuned: {text[5:]}  (stopped)"


def test_missing_files_are_named(stages: Stages) -> None:
    with refused("config.no_params", params=Path("params.yaml")):
        run_main("月亮哪天最圆")
    stages("config")
    with refused("generate.not_trained", path=Path("artifacts/prepare/model.json")):
        run_main("月亮哪天最圆")
    with refused("generate.no_question_on_input"):
        run_main(questions="\n")
