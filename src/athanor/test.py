"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run, the answers also as a table. What the figures mean is in scores.py. The training
questions are asked too: whether they were learned by heart is what `test_train_*` say.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from omegaconf import OmegaConf
from rich.markup import escape

from athanor import console, files, models, prepared, scores, settings, templates
from athanor.computing.forward import Forward, trial
from athanor.computing.frozen import Budget, Frozen
from athanor.computing.parts import Parts
from athanor.evaluation import Answer, answers, mean_loss
from athanor.paths import PARAMS, SPLITS, TESTED, TRAINED
from athanor.prepared import Prepared, Row
from athanor.record import tracking
from athanor.schema import Config
from athanor.supervision import Tokens

Line = dict[str, Any]

# What every answer is that is none of the labels.
OTHER = "(other)"
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


@dataclass(frozen=True)
class Split:
    """What is asked of a model on one split: the loss on `tokens`, answers to `questions`.

    `labels` are those of a classification's rows.
    """

    tokens: list[Tokens]
    questions: list[Row]
    labels: set[str] = field(default_factory=set)


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
    temp: float,
    seed: int,
    who: str,
    forward: Forward | None = None,
) -> dict[str, Outcome]:
    """Measures the loss over every row once, and asks every question once.

    `forward` computes the losses, if it has a part of them already.
    """
    rows = [row for split in splits.values() for row in split.tokens]
    through = forward or Forward.of(model, rows)
    prompts = [
        templates.prompt_ids(row, tokenizer) for split in splits.values() for row in split.questions
    ]
    with console.progress() as bar:
        batches = sum(-(-len(split.tokens) // batch_size) for split in splits.values())
        reading = bar.add_task(f"loss of the {who}", total=batches)
        asking = bar.add_task(f"ask the {who}", total=len(prompts))
        losses = [
            mean_loss(through, split.tokens, batch_size, lambda: bar.advance(reading))[0]
            for split in splits.values()
        ]
        given = iter(
            answers(
                model,
                tokenizer,
                prompts,
                max_tokens=max_tokens,
                batch_size=batch_size,
                temp=temp,
                seed=seed,
                on_step=lambda answered: bar.update(asking, completed=answered),
            )
        )
    return {
        name: Outcome(loss, list(islice(given, len(split.questions))))
        for (name, split), loss in zip(splits.items(), losses, strict=True)
    }


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
    """How often each label was answered with each, of the test rows (else valid, else train rows).

    Returns the split, the head and the rows. There has to be a row of a classification.
    """
    split = next(name for name in reversed(SPLITS) if with_labels(lines, name))
    counts = scores.confusion(*numbered(with_labels(lines, split), labels, who), len(labels))
    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    return split, ["expected", *labels, OTHER], rows


def as_csv(head: list[str], rows: Iterable[list[str]]) -> str:
    """A head and rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


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


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    trained = files.read_json(TRAINED / "run.json")
    with tracking.resume(trained["run"], trained["run_id"]) as run:
        base = Prepared.read(cfg)
        model, tokenizer = base.load()
        splits = splits_of(cfg, base, tokenizer, prepared.rows(SPLITS))
        before = examine(model, tokenizer, splits, who="base", **how(cfg))
        models.load_adapters(model, TRAINED / "adapters")
        forward = _as_trained(model, [row for split in splits.values() for row in split.tokens])
        after = examine(model, tokenizer, splits, who="tuned", forward=forward, **how(cfg))
        labels = set[str]().union(*(split.labels for split in splits.values()))
        examined = Examined.of(splits, before, after, tokenizer, labels)
        examined.write(TESTED)
        run.text(OmegaConf.to_yaml(cfg), f"test/{PARAMS.name}")  # it may run again with others
        record(run, TESTED, examined, trained["iteration"])
    _show(examined.metrics, examined.lines, examined.labels)


def _as_trained(model: nn.Module, rows: list[Tokens]) -> Forward:
    """The model as its training computes it: what is frozen, a row at a time."""
    frozen = Frozen(Parts.of(model, trial(rows)), Budget(0, 0, TESTED))
    cut = frozen.cut_below(models.adapter_names(TRAINED / "adapters"))
    return Forward(model, frozen.parts, frozen, cut)


def splits_of(
    cfg: Config, base: Prepared, tokenizer: TokenizerWrapper, rows: dict[str, list[Row]]
) -> dict[str, Split]:
    """What is asked on each split: the loss on all of its rows, answers to test.max_rows."""
    count = None if cfg.test.max_rows == -1 else cfg.test.max_rows
    return {
        name: Split(
            base.tokens(found, tokenizer, cfg),
            [row for row in found if "text" not in row][:count],
            {label_of(row) for row in found if "label" in row},
        )
        for name, found in rows.items()
    }


def how(cfg: Config) -> dict[str, Any]:
    """How models are examined, for `examine`."""
    return {
        "batch_size": cfg.test.batch_size,
        "max_tokens": cfg.test.max_tokens,
        "temp": cfg.test.temp,
        "seed": cfg.seed,
    }


@dataclass(frozen=True)
class Examined:
    """What came out: a line a question with both models' answers, the figures, the labels."""

    lines: list[Line]
    metrics: dict[str, float]
    labels: list[str]

    @classmethod
    def of(
        cls,
        splits: dict[str, Split],
        base: dict[str, Outcome],
        tuned: dict[str, Outcome],
        tokenizer: TokenizerWrapper,
        labels: Iterable[str],
    ) -> "Examined":
        """Base and tuned model side by side on the same splits; `labels` are all that there are."""
        labels = sorted(labels)
        lines = predictions(splits, base, tuned, tokenizer)
        metrics = figures(base, lines, "base", labels) | figures(tuned, lines, "tuned", labels)
        return cls(lines, metrics, labels)

    def write(self, out: Path) -> None:
        """Writes predictions.jsonl, labels.csv and, last, metrics.json."""
        files.write_jsonl(out / "predictions.jsonl", self.lines)
        files.write_text(out / "labels.csv", labels_csv(self.lines, self.labels))
        files.write_json(out / "metrics.json", self.metrics)


def record(
    run: tracking.Run, out: Path, examined: Examined, iteration: int, once: bool = False
) -> None:
    """Adds what was written to `out` to a training's run, at the iteration of its adapters.

    With `once` only the figures that have no value there yet.
    """
    lines = examined.lines
    run.metrics(iteration, examined.metrics, once=once)
    run.artifact(out / "predictions.jsonl", "test")
    if lines:
        run.table(as_columns(lines), "test/answers.json")
    if with_labels(lines):
        _, head, counts = confusion_table(lines, examined.labels, "tuned")
        run.artifact(out / "labels.csv", "test")
        run.text(as_csv(head, counts), "test/confusion.csv")


def _show(metrics: dict[str, float], lines: list[Line], labels: list[str]) -> None:
    console.side_by_side("test", *_table("rows, model", OF_ANSWERS, metrics, lines))
    console.side_by_side(
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
    console.done("", {"wrote": f"{TESTED}/: metrics.json, predictions.jsonl, labels.csv"})


def _show_labels(metrics: dict[str, float], lines: list[Line], labels: list[str]) -> None:
    console.side_by_side("", *_table("labels of, model", OF_LABELS, metrics, lines))
    if len(labels) <= LABELS_SHOWN:
        split, head, counts = confusion_table(lines, labels, "tuned")
        title = f"what the tuned model said to the {split} rows"
        console.side_by_side(title, [escape(name) for name in head], counts)


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


if __name__ == "__main__":
    console.run(main)
