"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run, the answers also as a table. What the figures mean is in scores.py. The training
questions are asked too: whether they were learned by heart is what `test_train_*` say.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from athanor import files
from athanor.compute.evaluation import Answer
from athanor.paths import SPLITS
from athanor.test import scores

Line = dict[str, Any]


# What every answer is that is none of the labels.
OTHER = "(other)"


@dataclass(frozen=True)
class Outcome:
    """What a model made of a split: its mean loss in nats a token, and an answer a question."""

    loss: float
    answers: list[Answer]


def figures(
    outcomes: dict[str, Outcome], lines: list[Line], who: str, labels: Sequence[str]
) -> dict[str, float]:
    """The metrics of one model: test_* for the test rows, test_valid_* and test_train_* beside.

    A classification's rows have accuracy and macro F1 where others have character error rate and
    chrF. What can't be said of a split, because it has no such rows, is left out.
    """
    found: dict[str, float] = {}
    for name, outcome in outcomes.items():
        asked = [line for line in lines if line["split"] == name]
        ids = [answer.ids for answer in outcome.answers]
        free = [line for line in asked if "label" not in line]
        values = {
            "loss": outcome.loss,
            "perplexity": math.exp(min(outcome.loss, 700)),
            "exact_match": scores.exact_match(
                texts(asked, who), references(asked), [line[who]["stopped"] for line in asked]
            ),
            "stop_rate": scores.stop_rate([line[who]["stopped"] for line in asked]),
            "cer": scores.character_error_rate(texts(free, who), references(free)),
            "chrf": scores.chrf(texts(free, who), references(free)),
            "mean_length": scores.mean_length(ids),
            "repetition_rate": scores.repetition_rate(ids),
            **scores.label_figures(*numbered(with_labels(asked), labels, who)),
        }
        prefix = metric_prefix(name, who)
        found |= {prefix + key: value for key, value in values.items() if not math.isnan(value)}
    return found


def metric_prefix(split: str, who: str) -> str:
    """What a metric's name begins with: test_ or test_<split>_, then base_ for the base model."""
    return ("test_" if split == "test" else f"test_{split}_") + ("base_" if who == "base" else "")


def texts(lines: list[Line], who: str) -> list[str]:
    """What a model said, as it is compared."""
    return [scores.compared(line[who]["text"]) for line in lines]


def references(lines: list[Line]) -> list[str]:
    """What was expected, as it is compared."""
    return [scores.compared(line["reference"]) for line in lines]


def label_of(row: dict[str, Any]) -> str:
    """The label of a classification's row, which is the answer that the model learned."""
    return scores.compared(str(row["messages"][-1]["content"])).strip()


def with_labels(lines: Iterable[Line], split: str | None = None) -> list[Line]:
    """The lines of a classification's rows; those of one split, where it is named."""
    return [line for line in lines if "label" in line and split in (None, line["split"])]


def numbered(lines: list[Line], labels: Sequence[str], who: str) -> tuple[list[int], list[int]]:
    """The given and the expected labels as places in `labels`; len(labels) for no label at all."""
    stopped = [line[who]["stopped"] for line in lines]
    given = scores.label_places(texts(lines, who), stopped, labels)
    return given, [labels.index(line["label"]) for line in lines]


def labels_csv(lines: list[Line], labels: Sequence[str]) -> str:
    """CSV of a classification's rows: their split, their label, what base and tuned said it is."""
    classified = with_labels(lines)
    names = [*labels, OTHER]
    base, tuned = (numbered(classified, labels, who)[0] for who in ("base", "tuned"))
    return files.csv_text(
        ["split", "expected", "base", "tuned"],
        (
            [line["split"], line["label"], names[by_base], names[by_tuned]]
            for line, by_base, by_tuned in zip(classified, base, tuned, strict=True)
        ),
    )


def confusion_table(
    lines: list[Line], labels: Sequence[str], who: str
) -> tuple[str, list[str], list[list[str]]]:
    """How often each label was answered with each, of the test rows (else valid, else train rows).

    Returns the split, the head and the rows. There has to be a row of a classification.
    """
    split = next(name for name in reversed(SPLITS) if with_labels(lines, name))
    counts = scores.confusion(*numbered(with_labels(lines, split), labels, who), len(labels))
    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    return split, ["expected", *labels, OTHER], rows


def as_columns(lines: list[Line]) -> dict[str, list[Any]]:
    """The lines as columns, for MLflow's table: each question in one text, its answers in a row."""
    return {
        "split": [line["split"] for line in lines],
        "prompt": [_in_one(line["prompt"]) for line in lines],
        "reference": [line["reference"] for line in lines],
        **{who: [line[who]["text"] for line in lines] for who in ("base", "tuned")},
        **{f"{who}_stopped": [line[who]["stopped"] for line in lines] for who in ("base", "tuned")},
    }


def _in_one(messages: list[dict[str, Any]]) -> str:
    """A single message as its text, a conversation with the roles' names."""
    said = [
        (message["role"], message.get("content") or json.dumps(message, ensure_ascii=False))
        for message in messages
    ]
    return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {text}" for role, text in said)
