"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run. The training questions are asked too: whether they were learned by heart is what the
figures `test_train_*` say.
"""

import csv
import io
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.markup import escape

from athanor import (
    chat,
    console,
    files,
    models,
    settings,
    sources,
    supervision,
    templates,
    tracking,
)
from athanor.evaluation import Answer, answers, mean_loss
from athanor.paths import PREPARED, SPLITS, TESTED, TRAINED
from athanor.supervision import Tokens

Line = dict[str, Any]

# What every answer is that is none of the labels.
OTHER = "(other)"
# More of them make a table that no terminal is wide enough for.
LABELS_SHOWN = 20


@dataclass(frozen=True)
class Split:
    """What is asked of a model on one split: the loss on `tokens`, answers to `questions`."""

    tokens: list[Tokens]
    questions: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a model made of a split: its mean loss in nats a token, and an answer a question."""

    loss: float
    answers: list[Answer]


def examine(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    splits: dict[str, Split],
    *,
    batch_size: int,
    max_tokens: int,
    title: str,
) -> dict[str, Outcome]:
    """Measures the loss over every row once, and asks every question greedily."""
    outcomes = {}
    with console.progress() as bar:
        task = bar.add_task(title, total=sum(len(split.questions) for split in splits.values()))
        for name, split in splits.items():
            loss, _ = mean_loss(model, split.tokens, batch_size)
            given = answers(
                model,
                tokenizer,
                [templates.prompt_ids(row, tokenizer) for row in split.questions],
                max_tokens=max_tokens,
                batch_size=batch_size,
                on_answer=lambda: bar.advance(task),
            )
            outcomes[name] = Outcome(loss, given)
    return outcomes


def predictions(
    splits: dict[str, Split],
    base: dict[str, Outcome],
    tuned: dict[str, Outcome],
    tokenizer: TokenizerWrapper,
) -> list[Line]:
    """A line a question: what was asked, what was expected, and what both models said.

    Lines of a classification's rows have a "label" too.
    """
    lines = []
    for name, split in splits.items():
        for row, *pair in zip(
            split.questions, base[name].answers, tuned[name].answers, strict=True
        ):
            texts = (templates.answer_text(answer.ids, tokenizer) for answer in pair)
            said = {
                who: {"text": text, "stopped": answer.stopped}
                for who, answer, text in zip(("base", "tuned"), pair, texts, strict=True)
            }
            lines.append(
                {
                    "split": name,
                    "prompt": row["messages"][:-1],
                    "reference": templates.expected_answer(row, tokenizer),
                    **({"label": label_of(row)} if "label" in row else {}),
                    **said,
                }
            )
    return lines


def figures(
    outcomes: dict[str, Outcome], lines: list[Line], who: str, labels: Sequence[str]
) -> dict[str, float]:
    """The metrics of one model: test_* for the test rows, test_valid_* and test_train_* beside.

    `exact_match` and `stop_rate` are shares of the questions asked; an answer that was cut off is
    no exact match. Where some of them are a classification's, `label_figures` says how well those
    were answered.
    """
    found: dict[str, float] = {}
    for name, outcome in outcomes.items():
        prefix = metric_prefix(name, who)
        if not math.isnan(outcome.loss):
            found[f"{prefix}loss"] = outcome.loss
            found[f"{prefix}perplexity"] = math.exp(min(outcome.loss, 700))
        asked = [line for line in lines if line["split"] == name]
        if asked:
            exact = [is_exact(line, who) for line in asked]
            found[f"{prefix}exact_match"] = sum(exact) / len(asked)
            found[f"{prefix}stop_rate"] = sum(line[who]["stopped"] for line in asked) / len(asked)
        if classified := with_labels(asked):
            for figure, value in label_figures(classified, labels, who).items():
                found[f"{prefix}{figure}"] = value
    return found


def metric_prefix(split: str, who: str) -> str:
    """What a metric's name begins with: test_ or test_<split>_, then base_ for the base model."""
    return ("test_" if split == "test" else f"test_{split}_") + ("base_" if who == "base" else "")


def is_exact(line: Line, who: str) -> bool:
    """Whether an answer is the reference, to the character, and ended by itself."""
    return bool(line[who]["stopped"] and line[who]["text"] == line["reference"])


def label_of(row: dict[str, Any]) -> str:
    """The label of a classification's row, which is the answer that the model learned."""
    return str(row["messages"][-1]["content"]).strip()


def with_labels(lines: Iterable[Line], split: str | None = None) -> list[Line]:
    """The lines of a classification's rows; those of one split, where it is named."""
    return [line for line in lines if "label" in line and split in (None, line["split"])]


def numbered(lines: list[Line], labels: Sequence[str], who: str) -> tuple[list[int], list[int]]:
    """The expected and the given labels as places in `labels`; len(labels) for no label at all.

    An answer is a label if it ended by itself and is that label to the character, white space
    around it and a reasoning model's thought before it aside. One that never ended is none: what
    uses the model would have read more than the label.
    """
    places = {label: place for place, label in enumerate(labels)}
    given = []
    for line in lines:
        text = line[who]["text"].rpartition("</think>")[2].strip()
        given.append(places.get(text, len(labels)) if line[who]["stopped"] else len(labels))
    return [places[line["label"]] for line in lines], given


def label_figures(lines: list[Line], labels: Sequence[str], who: str) -> dict[str, float]:
    """`accuracy` and `macro_f1` of one model on a classification's rows, both from 0 to 1.

    The F1 is the mean over the labels that these rows have: one that few rows have may be missing
    in a split, and would count as 0 however good the answers are.
    """
    from sklearn.metrics import accuracy_score, f1_score  # costs a second, which few data need

    expected, given = numbered(lines, labels, who)
    f1 = f1_score(expected, given, labels=sorted(set(expected)), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(expected, given)), "macro_f1": float(f1)}


def confusion(lines: list[Line], labels: Sequence[str], who: str) -> list[list[int]]:
    """How often each label, a row, was answered with each, a column; the last column is OTHER."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(*numbered(lines, labels, who), labels=range(len(labels) + 1))
    return [[int(count) for count in row] for row in counts[:-1]]


def labels_csv(lines: list[Line], labels: Sequence[str]) -> str:
    """CSV of a classification's rows: their split, their label, what base and tuned said it is."""
    classified = with_labels(lines)
    names = [*labels, OTHER]
    base, tuned = (numbered(classified, labels, who)[1] for who in ("base", "tuned"))
    return as_csv(
        ["split", "expected", "base", "tuned"],
        (
            [line["split"], line["label"], names[by_base], names[by_tuned]]
            for line, by_base, by_tuned in zip(classified, base, tuned, strict=True)
        ),
    )


def confusion_table(
    lines: list[Line], labels: Sequence[str], who: str
) -> tuple[str, list[str], list[list[str]]]:
    """`confusion` of the test rows (else of the valid, else of the train rows) as a table.

    Returns the split, the head and the rows. There has to be a row of a classification.
    """
    split = next(name for name in reversed(SPLITS) if with_labels(lines, name))
    counts = confusion(with_labels(lines, split), labels, who)
    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    return split, ["expected", *labels, OTHER], rows


def as_csv(head: list[str], rows: Iterable[list[str]]) -> str:
    """A head and rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    trained = files.read_json(TRAINED / "run.json")
    with tracking.resume(trained["run"], trained["run_id"]) as run:
        source = sources.Source.read(PREPARED / "model.json")
        end = chat.Contract.read(PREPARED / "chat.json").end
        model, tokenizer = models.load(source.folder())
        splits = {}
        found_labels: set[str] = set()
        for name in SPLITS:
            rows = files.read_jsonl(PREPARED / f"{name}.jsonl")
            questions = [row for row in rows if "text" not in row]
            found_labels.update(label_of(row) for row in rows if "label" in row)
            splits[name] = Split(
                supervision.tokenize_all(
                    rows, tokenizer, cfg.train.mask_prompt, cfg.train.max_seq_length, end
                ),
                questions[: None if cfg.test.max_rows == -1 else cfg.test.max_rows],
            )
        limits = {"batch_size": cfg.test.batch_size, "max_tokens": cfg.test.max_tokens}
        base = examine(model, tokenizer, splits, title="ask the base", **limits)
        models.load_adapters(model, TRAINED / "adapters")
        tuned = examine(model, tokenizer, splits, title="ask the tuned", **limits)

        labels = sorted(found_labels)
        lines = predictions(splits, base, tuned, tokenizer)
        metrics = figures(base, lines, "base", labels) | figures(tuned, lines, "tuned", labels)
        files.write_jsonl(TESTED / "predictions.jsonl", lines)
        files.write_json(TESTED / "metrics.json", metrics)
        files.write_text(TESTED / "labels.csv", labels_csv(lines, labels))
        run.metrics(trained["iteration"], metrics)
        run.artifact(TESTED / "predictions.jsonl", "test")
        if with_labels(lines):
            _, head, counts = confusion_table(lines, labels, "tuned")
            run.artifact(TESTED / "labels.csv", "test")
            run.text(as_csv(head, counts), "test/confusion.csv")
    _show(splits, metrics, lines, labels)


def _show(
    splits: dict[str, Split], metrics: dict[str, float], lines: list[Line], labels: list[str]
) -> None:
    rows = []
    for name, split in splits.items():
        for who in ("base", "tuned"):
            prefix = metric_prefix(name, who)
            if f"{prefix}loss" not in metrics:
                continue
            asked = len(split.questions)
            exact = sum(is_exact(line, who) for line in lines if line["split"] == name)
            stopped = sum(line[who]["stopped"] for line in lines if line["split"] == name)
            rows.append(
                [
                    f"{name}, {who}",
                    f"{metrics[f'{prefix}loss']:.4f}",
                    f"{metrics[f'{prefix}perplexity']:.4g}",
                    f"{exact} of {asked}" if asked else "–",
                    f"{stopped} of {asked}" if asked else "–",
                ]
            )
    console.side_by_side(
        "test", ["rows, model", "loss", "perplexity", "answered exactly", "stopped"], rows
    )
    console.side_by_side(
        "",
        ["asked", "expected", "base", "tuned"],
        [
            [
                _clip(line["prompt"][-1]["content"] or ""),
                _clip(line["reference"] or ""),
                *(
                    _clip(line[who]["text"] + ("" if line[who]["stopped"] else " …"))
                    for who in ("base", "tuned")
                ),
            ]
            for line in lines[:12]
        ],
    )
    if with_labels(lines):
        _show_labels(metrics, lines, labels)
    console.done("", {"wrote": f"{TESTED}/: metrics.json, predictions.jsonl, labels.csv"})


def _show_labels(metrics: dict[str, float], lines: list[Line], labels: list[str]) -> None:
    rows = []
    for name in SPLITS:
        for who in ("base", "tuned"):
            prefix = metric_prefix(name, who)
            if f"{prefix}accuracy" in metrics:
                values = (metrics[f"{prefix}{figure}"] for figure in ("accuracy", "macro_f1"))
                rows.append([f"{name}, {who}", *(f"{value:.4f}" for value in values)])
    console.side_by_side("", ["labels of, model", "accuracy", "macro F1"], rows)
    if len(labels) <= LABELS_SHOWN:
        split, head, counts = confusion_table(lines, labels, "tuned")
        title = f"what the tuned model said to the {split} rows"
        console.side_by_side(title, [escape(name) for name in head], counts)


def _clip(text: str, width: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    console.run(main)
