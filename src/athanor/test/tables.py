"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run, the answers also as a table. What the figures mean is in scores.py. The training
questions are asked too: whether they were learned by heart is what `test_train_*` say.
"""

from typing import Any

from rich.markup import escape

from athanor import console
from athanor.paths import SPLITS, Workspace
from athanor.test import scores
from athanor.test.figures import Line, confusion_table, metric_prefix, with_labels

# More of them make a table that no terminal is wide enough for.
LABELS_SHOWN = 20


# Figures in the closing tables: their heads, and how a value is written. `count` is a share's.
OF_ANSWERS = {
    "loss": ("loss", "{value:.4f}"),
    "perplexity": ("perplexity", "{value:.4g}"),
    "exact_match": ("exact", "{count:.0f}/{asked}"),
    "stop_rate": ("stopped", "{count:.0f}/{asked}"),
    "cer": ("CER", "{value:.3f}"),
    "chrf": ("chrF", "{value:.1f}"),
    "mean_length": ("tokens", "{value:.1f}"),
    "repetition_rate": ("repeats", "{value:.3f}"),
}


OF_LABELS = {"accuracy": ("accuracy", "{value:.4f}"), "macro_f1": ("macro F1", "{value:.4f}")}


NONE = "–"


def show(
    workspace: Workspace, metrics: dict[str, float], lines: list[Line], labels: list[str]
) -> None:
    console.print_table("test", *_table("rows, model", OF_ANSWERS, metrics, lines))
    console.print_table(
        "",
        ["asked", "expected", "base", "tuned"],
        [
            [
                _clip(line["prompt"][-1]["content"] or ""),
                _clip(line["reference"]),
                *(_clip(_shown(line[who])) for who in ("base", "tuned")),
            ]
            for line in lines[:12]
        ],
    )
    if with_labels(lines):
        _show_labels(metrics, lines, labels)
    console.print_facts(
        "", {"wrote": f"{workspace.tested}/: metrics.json, predictions.jsonl, labels.csv"}
    )


def _show_labels(metrics: dict[str, float], lines: list[Line], labels: list[str]) -> None:
    console.print_table("", *_table("labels of, model", OF_LABELS, metrics, lines))
    if len(labels) <= LABELS_SHOWN:
        split, head, counts = confusion_table(lines, labels, "tuned")
        title = f"what the tuned model said to the {split} rows"
        console.print_table(title, [escape(name) for name in head], counts)


def _table(
    first: str, columns: dict[str, tuple[str, str]], metrics: dict[str, float], lines: list[Line]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of figures, a row a split and model; what no row has is left out."""
    rows = []
    for name in SPLITS:
        asked = sum(line["split"] == name for line in lines)
        for who in ("base", "tuned"):
            prefix = metric_prefix(name, who)
            cells = [
                form.format(value=value, count=value * asked, asked=asked)
                if (value := metrics.get(prefix + figure)) is not None
                else NONE
                for figure, (_, form) in columns.items()
            ]
            if any(cell != NONE for cell in cells):
                rows.append([f"{name}, {who}", *cells])
    table = [[first, *(head for head, _ in columns.values())], *rows]
    kept = [column for column in zip(*table, strict=True) if set(column[1:]) != {NONE}]
    head, *rows = map(list, zip(*kept, strict=True))
    return head, rows


def _shown(said: dict[str, Any]) -> str:
    return (scores.compared(said["text"]) or said["text"]) + ("" if said["stopped"] else " …")


def _clip(text: str, width: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
