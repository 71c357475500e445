"""The metrics of a test: the figures of each split, for the base and the tuned model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from athanor.compute.evaluation import Answer
from athanor.paths import SPLITS
from athanor.test import scores
from athanor.test.predictions import OTHER, Prediction, index_labels, select_labelled


@dataclass(frozen=True)
class Outcome:
    """The mean loss of a model on a split in nats a token, and its answer to each question."""

    loss: float
    answers: list[Answer]


def compute_metrics(
    outcomes: dict[str, Outcome],
    predictions: Sequence[Prediction],
    model: str,
    labels: Sequence[str],
) -> dict[str, float]:
    """Return the metrics of one model: test_* of the test rows, test_valid_* and test_train_*.

    A classification's rows have accuracy and macro F1 in place of character error rate and chrF.
    Metrics that a split has no rows for are left out.
    """
    metrics: dict[str, float] = {}
    for split, outcome in outcomes.items():
        asked = [prediction for prediction in predictions if prediction.split == split]
        free = [prediction for prediction in asked if prediction.label is None]
        ids = [answer.ids for answer in outcome.answers]
        stopped = [prediction.reply(model).stopped for prediction in asked]
        values = {
            "loss": outcome.loss,
            "perplexity": math.exp(min(outcome.loss, 700)),
            "exact_match": scores.exact_match(*_texts(asked, model), stopped),
            "stop_rate": scores.stop_rate(stopped),
            "cer": scores.character_error_rate(*_texts(free, model)),
            "chrf": scores.chrf(*_texts(free, model)),
            "mean_length": scores.mean_length(ids),
            "repetition_rate": scores.repetition_rate(ids),
            **scores.score_labels(*index_labels(select_labelled(asked), labels, model)),
        }
        prefix = metric_prefix(split, model)
        metrics |= {prefix + key: value for key, value in values.items() if not math.isnan(value)}
    return metrics


def metric_prefix(split: str, model: str) -> str:
    """Return the prefix of a metric's name: test_ or test_<split>_, then base_ for the base."""
    return ("test_" if split == "test" else f"test_{split}_") + ("base_" if model == "base" else "")


def _texts(predictions: Sequence[Prediction], model: str) -> tuple[list[str], list[str]]:
    """Return the answers of a model and the expected ones, in the form that is compared."""
    answers = [scores.normalize_answer(p.reply(model).text) for p in predictions]
    return answers, [scores.normalize_answer(p.reference) for p in predictions]


def tabulate_confusion(
    predictions: Sequence[Prediction], labels: Sequence[str]
) -> tuple[str, list[str], list[list[str]]]:
    """Count the tuned model's answers to each label on the test (else valid, else train) rows.

    Returns the split, the header and the rows. At least one row must have a label.
    """
    split = next(name for name in reversed(SPLITS) if select_labelled(predictions, name))
    indices = index_labels(select_labelled(predictions, split), labels, "tuned")
    counts = scores.confusion(*indices, len(labels))
    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    return split, ["expected", *labels, OTHER], rows
