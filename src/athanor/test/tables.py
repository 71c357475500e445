"""The tables at the end of a test: figures, answers side by side, the confusion of labels."""

from rich.markup import escape

from athanor import console
from athanor.paths import SPLITS, Workspace
from athanor.test.examine import Examination
from athanor.test.figures import metric_prefix, tabulate_confusion
from athanor.test.predictions import MODELS, Prediction, Reply, select_labelled
from athanor.test.scores import normalize_answer

# A table of more labels is too wide for a terminal.
LABELS_SHOWN = 20
ANSWERS_SHOWN = 12

# Headers and formats of the figures; `count` is the number of answers that a share stands for.
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


def print_examination(workspace: Workspace, examination: Examination) -> None:
    """Print the figures, the first answers, and the labels of a classification."""
    predictions, metrics = examination.predictions, examination.metrics
    console.print_table("test", *_tabulate("rows, model", OF_ANSWERS, metrics, predictions))
    console.print_table(
        "",
        ["asked", "expected", *MODELS],
        [
            [
                _clip(prediction.prompt[-1]["content"] or ""),
                _clip(prediction.reference),
                *(_clip(_show_reply(prediction.reply(model))) for model in MODELS),
            ]
            for prediction in predictions[:ANSWERS_SHOWN]
        ],
    )
    if select_labelled(predictions):
        print_labels(examination)
    console.print_facts(
        "", {"wrote": f"{workspace.tested}/: metrics.json, predictions.jsonl, labels.csv"}
    )


def print_labels(examination: Examination) -> None:
    """Print the figures of labels, and the confusion of the tuned model if it is narrow enough."""
    predictions, labels = examination.predictions, examination.labels
    console.print_table(
        "", *_tabulate("labels of, model", OF_LABELS, examination.metrics, predictions)
    )
    if len(labels) <= LABELS_SHOWN:
        split, head, counts = tabulate_confusion(predictions, labels)
        title = f"answers of the tuned model to the {split} rows"
        console.print_table(title, [escape(name) for name in head], counts)


def _tabulate(
    first: str,
    columns: dict[str, tuple[str, str]],
    metrics: dict[str, float],
    predictions: list[Prediction],
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of figures, a row for each split and model, without empty columns."""
    rows = []
    for name in SPLITS:
        asked = sum(prediction.split == name for prediction in predictions)
        for model in MODELS:
            prefix = metric_prefix(name, model)
            cells = [
                form.format(value=value, count=value * asked, asked=asked)
                if (value := metrics.get(prefix + figure)) is not None
                else NONE
                for figure, (_, form) in columns.items()
            ]
            if any(cell != NONE for cell in cells):
                rows.append([f"{name}, {model}", *cells])
    table = [[first, *(head for head, _ in columns.values())], *rows]
    kept = [column for column in zip(*table, strict=True) if set(column[1:]) != {NONE}]
    head, *rows = map(list, zip(*kept, strict=True))
    return head, rows


def _show_reply(reply: Reply) -> str:
    return (normalize_answer(reply.text) or reply.text) + ("" if reply.stopped else " …")


def _clip(text: str, width: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
