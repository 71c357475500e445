"""The predictions of base and tuned model, a line of predictions.jsonl for each question."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from athanor import files
from athanor.test import scores

# The models that a test compares.
MODELS = ("base", "tuned")
# The label of an answer that is none of the labels.
OTHER = "(other)"


class Reply(msgspec.Struct, frozen=True):
    """The answer of a model as text; `stopped` if it ended by itself."""

    text: str
    stopped: bool


class Prediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A question, the expected answer and both models' answers.

    `label` is that of a classification's row, and None for other rows.
    """

    split: str
    prompt: list[dict[str, Any]]
    reference: str
    label: str | None = None
    base: Reply
    tuned: Reply

    def reply(self, model: str) -> Reply:
        """Return the answer of the base or the tuned model."""
        return self.base if model == "base" else self.tuned


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions.jsonl."""
    return msgspec.convert(files.read_jsonl(path), list[Prediction])


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions.jsonl."""
    files.write_jsonl(path, map(msgspec.to_builtins, predictions))


def select_labelled(
    predictions: Iterable[Prediction], split: str | None = None
) -> list[Prediction]:
    """Return the predictions for a classification's rows, of one split if it is given."""
    return [p for p in predictions if p.label is not None and split in (None, p.split)]


def index_labels(
    predictions: Sequence[Prediction], labels: Sequence[str], model: str
) -> tuple[list[int], list[int]]:
    """Return the predicted and the expected labels as places in `labels`; len(labels) for none."""
    replies = [prediction.reply(model) for prediction in predictions]
    answers = [scores.normalize_answer(reply.text) for reply in replies]
    predicted = scores.find_labels(answers, [reply.stopped for reply in replies], labels)
    return predicted, [labels.index(str(prediction.label)) for prediction in predictions]


def labels_csv(predictions: Iterable[Prediction], labels: Sequence[str]) -> str:
    """Return CSV with the split, the expected and both predicted labels of a classification."""
    labelled = select_labelled(predictions)
    names = [*labels, OTHER]
    base, tuned = (index_labels(labelled, labels, model)[0] for model in MODELS)
    return files.csv_text(
        ["split", "expected", *MODELS],
        (
            [prediction.split, prediction.label, names[by_base], names[by_tuned]]
            for prediction, by_base, by_tuned in zip(labelled, base, tuned, strict=True)
        ),
    )


def as_columns(predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
    """Return the predictions as columns of MLflow's table, each prompt as one text."""
    return {
        "split": [prediction.split for prediction in predictions],
        "prompt": [_join_messages(prediction.prompt) for prediction in predictions],
        "reference": [prediction.reference for prediction in predictions],
        **{m: [prediction.reply(m).text for prediction in predictions] for m in MODELS},
        **{
            f"{m}_stopped": [prediction.reply(m).stopped for prediction in predictions]
            for m in MODELS
        },
    }


def _join_messages(messages: list[dict[str, Any]]) -> str:
    """Return a single message as its text, a conversation with the roles' names."""
    texts = [
        (message["role"], message.get("content") or json.dumps(message, ensure_ascii=False))
        for message in messages
    ]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)
