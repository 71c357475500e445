"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run, the answers also as a table. What the figures mean is in scores.py. The training
questions are asked too: whether they were learned by heart is what `test_train_*` say.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor import console, files
from athanor.chat import templates
from athanor.compute.arrays import TokenizedText
from athanor.compute.evaluation import generate_answers, measure_loss
from athanor.compute.forward import Forward, probe_tokens
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.schema import Config
from athanor.model.adapters import read_adapter_names
from athanor.paths import Workspace
from athanor.prepare.result import Prepared, Row
from athanor.test.figures import (
    Line,
    Outcome,
    confusion_table,
    figures,
    label_of,
    labels_csv,
    with_labels,
)


@dataclass(frozen=True)
class Split:
    """What is asked of a model on one split: the loss on `tokens`, answers to `questions`.

    `labels` are those of a classification's rows.
    """

    tokens: list[TokenizedText]
    questions: list[Row]
    labels: set[str] = field(default_factory=set)


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
    through = forward or Forward.from_model(model, rows)
    prompts = [
        templates.encode_prompt(row, tokenizer)
        for split in splits.values()
        for row in split.questions
    ]
    with console.progress() as bar:
        batches = sum(-(-len(split.tokens) // batch_size) for split in splits.values())
        reading = bar.add_task(f"loss of the {who}", total=batches)
        asking = bar.add_task(f"ask the {who}", total=len(prompts))
        losses = [
            measure_loss(through, split.tokens, batch_size, lambda: bar.advance(reading))[0]
            for split in splits.values()
        ]
        given = iter(
            generate_answers(
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
            texts = (templates.decode_answer(answer.ids, tokenizer) for answer in pair)
            said = {
                who: {"text": text, "stopped": answer.stopped}
                for who, answer, text in zip(("base", "tuned"), pair, texts, strict=True)
            }
            lines.append(
                {
                    "split": name,
                    "prompt": row["messages"][:-1],
                    "reference": templates.find_expected_answer(row, tokenizer),
                    **({"label": label_of(row)} if "label" in row else {}),
                    **said,
                }
            )
    return lines


def as_trained(model: nn.Module, workspace: Workspace, rows: list[TokenizedText]) -> Forward:
    """The model as its training computes it: what is frozen, a row at a time."""
    frozen = FrozenLayers(Parts.find(model, probe_tokens(rows)), Budget(0, 0, workspace.tested))
    cut = frozen.choose_cut(read_adapter_names(workspace.trained / "adapters"))
    return Forward(model, frozen.parts, frozen, cut)


def build_splits(
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


def examine_options(cfg: Config) -> dict[str, Any]:
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

    def confusion(self) -> str | None:
        """Return the confusion matrix of the tuned model as CSV, None without labels."""
        if not with_labels(self.lines):
            return None
        _, head, counts = confusion_table(self.lines, self.labels, "tuned")
        return files.csv_text(head, counts)

    def write(self, out: Path) -> None:
        """Writes predictions.jsonl, labels.csv and, last, metrics.json."""
        files.write_jsonl(out / "predictions.jsonl", self.lines)
        files.write_text(out / "labels.csv", labels_csv(self.lines, self.labels))
        files.write_json(out / "metrics.json", self.metrics)
