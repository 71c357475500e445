"""Rows of a classification through the stages, and the figures of their answers."""

import csv
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from athanor import files, synthesize
from athanor.paths import Workspace
from athanor.test import scores, tables
from athanor.test.examine import Outcome
from athanor.test.figures import (
    OTHER,
    confusion_table,
    figures,
    label_of,
    labels_csv,
    numbered,
)
from support import mlflow_store
from support.stages import Stages

LABELS = ["negative", "neutral", "positive"]
FIGURES = ("accuracy", "macro_f1")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/runs.db"


def rows_of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def counted(lines: list[dict[str, Any]], who: str) -> dict[str, float]:
    """Accuracy and macro F1 by hand, from predictions.jsonl."""
    right, asked, given = Counter[str](), Counter[str](), Counter[str]()
    for line in lines:
        said = line[who]["text"].strip() if line[who]["stopped"] else None
        asked[line["label"]] += 1
        if said in LABELS:
            given[said] += 1
        right[line["label"]] += said == line["label"]
    f1 = [2 * right[label] / (asked[label] + given[label]) for label in asked]
    return {"accuracy": right.total() / asked.total(), "macro_f1": sum(f1) / len(f1)}


def answered(label: str, text: str, stopped: bool = True, split: str = "test") -> dict[str, Any]:
    """A line of predictions.jsonl: what the base said; the tuned model is right."""
    return {
        "split": split,
        "reference": label,
        "label": label,
        "base": {"text": text, "stopped": stopped},
        "tuned": {"text": label, "stopped": True},
    }


def test_a_classification_gets_its_figures(
    stages: Stages, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("data")
    parts: dict[str, list[list[str]]] = {"train": [], "valid": [], "test": []}
    for language in synthesize.LANGUAGES.values():
        for label, opinions in language.opinions.items():
            for place, opinion in enumerate(opinions):
                split = {4: "valid", 5: "test"}.get(place, "train")
                parts[split].append([opinion, label])
    for split, rows in parts.items():
        files.write_text(Path(f"data/{split}.csv"), files.csv_text(["text", "label"], rows))
    stages("config", overrides=("train.iters=60", "train.keep=last", "test.max_tokens=16"))
    stages("prepare", "train", "test")

    lines = files.read_jsonl(Workspace.here().tested / "predictions.jsonl")
    assert Counter(line["split"] for line in lines) == {"train": 24, "valid": 6, "test": 6}
    metrics = files.read_json(Workspace.here().tested / "metrics.json")
    for split, prefix in (("test", "test_"), ("valid", "test_valid_"), ("train", "test_train_")):
        part = [line for line in lines if line["split"] == split]
        assert [line["label"] for line in part] == [label for _, label in parts[split]]
        for who, infix in (("base", "base_"), ("tuned", "")):
            named = {figure: metrics[f"{prefix}{infix}{figure}"] for figure in FIGURES}
            assert named == pytest.approx(counted(part, who)), (split, who)
    # A label is right or wrong: how near an answer comes to it is not asked.
    assert not [key for key in metrics if key.endswith(("cer", "chrf"))]
    assert {"test_exact_match", "test_mean_length", "test_repetition_rate"} <= set(metrics)
    assert metrics["test_train_base_accuracy"] == 0
    assert metrics["test_train_accuracy"] > 0.5

    table = rows_of_csv(Workspace.here().tested / "labels.csv")
    assert [(row["split"], row["expected"]) for row in table] == [
        (line["split"], line["label"]) for line in lines
    ]
    for row, line in zip(table, lines, strict=True):
        for who in ("base", "tuned"):
            said = line[who]["text"].strip()
            label = said if line[who]["stopped"] and said in LABELS else OTHER
            assert row[who] == label

    run_id = files.read_json(Path("artifacts/train/run.json"))["run_id"]
    last = mlflow_store.connect(store).get_run(run_id)
    assert last.data.metrics["test_macro_f1"] == pytest.approx(metrics["test_macro_f1"])
    kept = mlflow_store.fetch_artifact(store, run_id, "test")
    assert (kept / "labels.csv").read_bytes() == (
        Workspace.here().tested / "labels.csv"
    ).read_bytes()
    pairs = Counter((row["expected"], row["tuned"]) for row in table if row["split"] == "test")
    confusion = {
        (row["expected"], said): int(row[said])
        for row in rows_of_csv(kept / "confusion.csv")
        for said in (*LABELS, OTHER)
    }
    assert confusion == {
        (label, said): pairs[label, said] for label in LABELS for said in (*LABELS, OTHER)
    }
    printed = capfd.readouterr().out
    assert "what the tuned model said to the test rows" in printed
    assert "macro F1" in printed


def test_other_rows_have_nothing_of_it(
    stages: Stages, store: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any import of it would fail.
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    stages("config", overrides=("train.iters=1",))
    stages("prepare", "train", "test")
    metrics = files.read_json(Workspace.here().tested / "metrics.json")
    assert not [key for key in metrics if key.endswith(FIGURES)]
    assert not [
        line
        for line in files.read_jsonl(Workspace.here().tested / "predictions.jsonl")
        if "label" in line
    ]
    text = (Workspace.here().tested / "labels.csv").read_text(encoding="utf-8")
    assert text == "split,expected,base,tuned\n"
    run = files.read_json(Path("artifacts/train/run.json"))["run_id"]
    kept = mlflow_store.connect(store).list_artifacts(run, "test")
    names = {Path(file.path).name for file in kept}
    assert names == {"predictions.jsonl", "answers.json", "params.yaml"}
    assert "macro F1" not in capfd.readouterr().out


def test_what_is_no_label_is_other_and_wrong() -> None:
    lines = [
        answered("positive", " positive\n"),
        answered("positive", "negative"),
        answered("negative", "Negative"),
        answered("negative", "negative\nbecause"),
        answered("negative", "negative", stopped=False),
        answered("negative", "<think>\npositive?\n</think>\n\nnegative"),
    ]
    given, expected = numbered(lines, LABELS, "base")
    assert (given, expected) == ([2, 0, 3, 3, 3, 0], [2, 2, 0, 0, 0, 0])
    assert scores.confusion(given, expected, 3) == [[1, 0, 0, 3], [0, 0, 0, 0], [1, 0, 1, 0]]
    found = scores.label_figures(given, expected)
    # negative: 1 of 2 said, 1 of 4 there; positive: 1 of 1 said, 1 of 2 there.
    assert found == pytest.approx({"accuracy": 2 / 6, "macro_f1": (2 / 6 + 2 / 3) / 2})
    assert found == pytest.approx(counted([*lines[:5], answered("negative", "negative")], "base"))
    # The tuned model is right; that no row is neutral takes nothing from it.
    right = scores.label_figures(*numbered(lines, LABELS, "tuned"))
    assert right == {"accuracy": 1, "macro_f1": 1}
    assert labels_csv(lines, LABELS).splitlines()[1:4] == [
        "test,positive,positive,positive",
        "test,positive,negative,positive",
        "test,negative,(other),negative",
    ]


def test_figures_are_named_by_split_and_model() -> None:
    lines = [answered("positive", "negative"), answered("positive", "", split="valid")]
    outcomes = {name: Outcome(1.0, []) for name in ("train", "valid", "test")}
    found = figures(outcomes, lines, "base", LABELS)
    found |= figures(outcomes, lines, "tuned", LABELS)
    assert {key for key in found if key.endswith(FIGURES)} == {
        f"test_{split}{who}{figure}"
        for split in ("", "valid_")
        for who in ("", "base_")
        for figure in FIGURES
    }
    assert found["test_base_accuracy"] == found["test_valid_base_macro_f1"] == 0
    assert found["test_accuracy"] == found["test_valid_macro_f1"] == 1


def test_table_is_of_the_test_rows_else_of_the_valid_ones() -> None:
    valid = answered("[b]", "x", split="valid")
    lines = [valid, answered("c", "c", split="train")]
    assert confusion_table(lines, ["[b]", "c"], "base") == (
        "valid",
        ["expected", "[b]", "c", OTHER],
        [["[b]", "0", "0", "1"], ["c", "0", "0", "0"]],
    )


@pytest.mark.parametrize(("many", "shown"), [(20, True), (21, False)])
def test_table_of_many_labels_is_not_printed(
    many: int, shown: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = [f"[/{number}]" for number in range(many)]
    lines = [answered(label, "x") for label in labels]
    tables._show_labels(figures({}, lines, "tuned", labels), lines, labels)
    assert ("said to the test rows" in capfd.readouterr().out) == shown


def test_label_is_what_is_learned_after_cleaning() -> None:
    row = {"messages": [{"role": "assistant", "content": "A 1"}], "label": "Ａ 1"}
    assert label_of(row) == "A 1"
    row["messages"] = [{"role": "assistant", "content": "<think>\nA or B\n</think>\n\nA"}]
    assert label_of(row) == "A"
