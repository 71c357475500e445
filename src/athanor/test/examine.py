"""The examination of a model: its loss on rows, and its answers to their questions."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor import console, files
from athanor.chat import templates
from athanor.chat.conversation import Conversation
from athanor.compute.arrays import TokenizedText
from athanor.compute.evaluation import generate_answers, measure_loss
from athanor.compute.forward import Forward, probe_tokens
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.schema import Config
from athanor.model.adapters import read_adapter_names
from athanor.paths import Workspace
from athanor.prepare.result import Prepared
from athanor.test.figures import Outcome, compute_metrics, tabulate_confusion
from athanor.test.predictions import (
    Prediction,
    Reply,
    labels_csv,
    select_labelled,
    write_predictions,
)
from athanor.test.scores import normalize_answer


@dataclass(frozen=True)
class Split:
    """The rows of a split: its loss is measured on `tokens`, answers are given to `questions`.

    `labels` are those of a classification's rows.
    """

    tokens: list[TokenizedText]
    questions: list[Conversation]
    labels: set[str] = field(default_factory=set)


def examine(
    cfg: Config,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    splits: dict[str, Split],
    name: str,
    forward: Forward | None = None,
) -> dict[str, Outcome]:
    """Return the outcome of a model, `base` or `tuned`, on each split.

    `forward` computes the losses, if it has computed a part of them already.
    """
    batch_size = cfg.test.batch_size
    rows = [row for split in splits.values() for row in split.tokens]
    forward = forward or Forward.from_model(model, rows)
    prompts = [
        templates.encode_prompt(row, tokenizer)
        for split in splits.values()
        for row in split.questions
    ]
    with console.progress() as bar:
        batches = sum(-(-len(split.tokens) // batch_size) for split in splits.values())
        reading = bar.add_task(f"loss of the {name}", total=batches)
        asking = bar.add_task(f"ask the {name}", total=len(prompts))
        losses = [
            measure_loss(forward, split.tokens, batch_size, lambda: bar.advance(reading))[0]
            for split in splits.values()
        ]
        replies = iter(
            generate_answers(
                model,
                tokenizer,
                prompts,
                max_tokens=cfg.test.max_tokens,
                batch_size=batch_size,
                temp=cfg.test.temp,
                seed=cfg.seed,
                on_step=lambda answered: bar.update(asking, completed=answered),
            )
        )
    return {
        split_name: Outcome(loss, list(islice(replies, len(split.questions))))
        for (split_name, split), loss in zip(splits.items(), losses, strict=True)
    }


def build_predictions(
    splits: dict[str, Split],
    base: dict[str, Outcome],
    tuned: dict[str, Outcome],
    tokenizer: TokenizerWrapper,
) -> list[Prediction]:
    """Return a prediction for each question, with both models' answers."""
    return [
        Prediction(
            split=name,
            prompt=[turn.message() for turn in row.turns[:-1]],
            reference=templates.find_expected_answer(row, tokenizer),
            label=None if row.label is None else read_label(row),
            base=Reply(templates.decode_answer(by_base.ids, tokenizer), by_base.stopped),
            tuned=Reply(templates.decode_answer(by_tuned.ids, tokenizer), by_tuned.stopped),
        )
        for name, split in splits.items()
        for row, by_base, by_tuned in zip(
            split.questions, base[name].answers, tuned[name].answers, strict=True
        )
    ]


def read_label(row: Conversation) -> str:
    """Return the label of a classification's row, which is the answer that the model learned."""
    return normalize_answer(row.turns[-1].content).strip()


def forward_as_trained(
    model: nn.Module, workspace: Workspace, rows: list[TokenizedText]
) -> Forward:
    """Return the forward pass of a training: its frozen layers run on a row at a time."""
    frozen = FrozenLayers(Parts.find(model, probe_tokens(rows)), Budget(0, 0, workspace.tested))
    cut = frozen.choose_cut(read_adapter_names(workspace.trained / "adapters"))
    return Forward(model, frozen.parts, frozen, cut)


def build_splits(
    cfg: Config, base: Prepared, tokenizer: TokenizerWrapper, rows: dict[str, list[Conversation]]
) -> dict[str, Split]:
    """Return the rows of each split: all for the loss, test.max_rows as questions."""
    count = None if cfg.test.max_rows == -1 else cfg.test.max_rows
    return {
        name: Split(
            base.tokens(split_rows, tokenizer, cfg),
            [row for row in split_rows if row.turns][:count],
            {read_label(row) for row in split_rows if row.label is not None},
        )
        for name, split_rows in rows.items()
    }


@dataclass(frozen=True)
class Examination:
    """The result of a test: a prediction for each question, the metrics, and all labels."""

    predictions: list[Prediction]
    metrics: dict[str, float]
    labels: list[str]

    @classmethod
    def compare(
        cls,
        splits: dict[str, Split],
        base: dict[str, Outcome],
        tuned: dict[str, Outcome],
        tokenizer: TokenizerWrapper,
        labels: Iterable[str],
    ) -> "Examination":
        """Compare base and tuned model on the same splits; `labels` are those of all rows."""
        labels = sorted(labels)
        predictions = build_predictions(splits, base, tuned, tokenizer)
        metrics = compute_metrics(base, predictions, "base", labels)
        metrics |= compute_metrics(tuned, predictions, "tuned", labels)
        return cls(predictions, metrics, labels)

    def confusion_csv(self) -> str | None:
        """Return the confusion matrix of the tuned model as CSV, None without labels."""
        if not select_labelled(self.predictions):
            return None
        _, head, counts = tabulate_confusion(self.predictions, self.labels)
        return files.csv_text(head, counts)

    def write(self, folder: Path) -> None:
        """Write predictions.jsonl, labels.csv and, last, metrics.json."""
        write_predictions(folder / "predictions.jsonl", self.predictions)
        files.write_text(folder / "labels.csv", labels_csv(self.predictions, self.labels))
        files.write_json(folder / "metrics.json", self.metrics)
