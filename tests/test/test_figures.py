"""The figures of answers: named by split and model, and of labels."""

import pytest

from athanor.chat.conversation import Conversation, Turn
from athanor.test import scores, tables
from athanor.test.examine import Examination, read_label
from athanor.test.figures import Outcome, compute_metrics, tabulate_confusion
from athanor.test.predictions import OTHER, Prediction, Reply, index_labels, labels_csv

LABELS = ["negative", "neutral", "positive"]
FIGURES = ("accuracy", "macro_f1")


def answered(label: str, text: str, stopped: bool = True, split: str = "test") -> Prediction:
    """Return a prediction with this answer of the base; the tuned model is right."""
    return Prediction(
        split=split,
        prompt=[{"role": "user", "content": "?"}],
        reference=label,
        label=label,
        base=Reply(text, stopped),
        tuned=Reply(label, True),
    )


def test_an_answer_that_is_no_label_is_wrong() -> None:
    predictions = [
        answered("positive", " positive\n"),
        answered("positive", "negative"),
        answered("negative", "Negative"),
        answered("negative", "negative\nbecause"),
        answered("negative", "negative", stopped=False),
        answered("negative", "<think>\npositive?\n</think>\n\nnegative"),
    ]
    predicted, expected = index_labels(predictions, LABELS, "base")
    assert (predicted, expected) == ([2, 0, 3, 3, 3, 0], [2, 2, 0, 0, 0, 0])
    assert scores.confusion(predicted, expected, 3) == [[1, 0, 0, 3], [0, 0, 0, 0], [1, 0, 1, 0]]
    figures = scores.score_labels(predicted, expected)
    # negative: precision 1 / 2, recall 1 / 4; positive: precision 1, recall 1 / 2.
    assert figures == pytest.approx({"accuracy": 2 / 6, "macro_f1": (2 / 6 + 2 / 3) / 2})
    # The tuned model is right; a label without rows takes nothing from it.
    right = scores.score_labels(*index_labels(predictions, LABELS, "tuned"))
    assert right == {"accuracy": 1, "macro_f1": 1}
    assert labels_csv(predictions, LABELS).splitlines()[1:4] == [
        "test,positive,positive,positive",
        "test,positive,negative,positive",
        "test,negative,(other),negative",
    ]


def test_figures_are_named_by_split_and_model() -> None:
    predictions = [answered("positive", "negative"), answered("positive", "", split="valid")]
    outcomes = {name: Outcome(1.0, []) for name in ("train", "valid", "test")}
    metrics = compute_metrics(outcomes, predictions, "base", LABELS)
    metrics |= compute_metrics(outcomes, predictions, "tuned", LABELS)
    assert {key for key in metrics if key.endswith(FIGURES)} == {
        f"test_{split}{model}{figure}"
        for split in ("", "valid_")
        for model in ("", "base_")
        for figure in FIGURES
    }
    assert metrics["test_base_accuracy"] == metrics["test_valid_base_macro_f1"] == 0
    assert metrics["test_accuracy"] == metrics["test_valid_macro_f1"] == 1


def test_confusion_is_of_the_test_rows_else_of_the_valid_ones() -> None:
    valid = answered("[b]", "x", split="valid")
    predictions = [valid, answered("c", "c", split="train")]
    assert tabulate_confusion(predictions, ["[b]", "c"]) == (
        "valid",
        ["expected", "[b]", "c", OTHER],
        [["[b]", "1", "0", "0"], ["c", "0", "0", "0"]],
    )


@pytest.mark.parametrize(("many", "shown"), [(20, True), (21, False)])
def test_confusion_of_many_labels_is_not_printed(
    many: int, shown: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = [f"[/{number}]" for number in range(many)]
    predictions = [answered(label, "x") for label in labels]
    tables.print_labels(Examination(predictions, {}, labels))
    assert ("tuned model to the test rows" in capfd.readouterr().out) == shown


def test_a_label_is_the_cleaned_answer() -> None:
    for answer, label in (("A 1", "A 1"), ("<think>\nA or B\n</think>\n\nA", "A")):
        assert read_label(Conversation([Turn("assistant", answer)], label="Ａ 1")) == label
