"""Rows of a classification through the stages."""

import csv
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from athanor import files, synthesize
from athanor.paths import Workspace
from athanor.test.predictions import OTHER
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


def counted(lines: list[dict[str, Any]], model: str) -> dict[str, float]:
    """Accuracy and macro F1 by hand, from predictions.jsonl."""
    right, expected, answered = Counter[str](), Counter[str](), Counter[str]()
    for line in lines:
        answer = line[model]["text"].strip() if line[model]["stopped"] else None
        expected[line["label"]] += 1
        if answer in LABELS:
            answered[answer] += 1
        right[line["label"]] += answer == line["label"]
    f1 = [2 * right[label] / (expected[label] + answered[label]) for label in expected]
    return {"accuracy": right.total() / expected.total(), "macro_f1": sum(f1) / len(f1)}


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
        for model, infix in (("base", "base_"), ("tuned", "")):
            named = {figure: metrics[f"{prefix}{infix}{figure}"] for figure in FIGURES}
            assert named == pytest.approx(counted(part, model)), (split, model)
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
        for model in ("base", "tuned"):
            answer = line[model]["text"].strip()
            label = answer if line[model]["stopped"] and answer in LABELS else OTHER
            assert row[model] == label

    run_id = files.read_json(Path("artifacts/train/run.json"))["run_id"]
    last = mlflow_store.connect(store).get_run(run_id)
    assert last.data.metrics["test_macro_f1"] == pytest.approx(metrics["test_macro_f1"])
    kept = mlflow_store.fetch_artifact(store, run_id, "test")
    assert (kept / "labels.csv").read_bytes() == (
        Workspace.here().tested / "labels.csv"
    ).read_bytes()
    pairs = Counter((row["expected"], row["tuned"]) for row in table if row["split"] == "test")
    confusion = {
        (row["expected"], answer): int(row[answer])
        for row in rows_of_csv(kept / "confusion.csv")
        for answer in (*LABELS, OTHER)
    }
    assert confusion == {
        (label, answer): pairs[label, answer] for label in LABELS for answer in (*LABELS, OTHER)
    }
    printed = capfd.readouterr().out
    assert "answers of the tuned model to the test rows" in printed
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
