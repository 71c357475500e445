"""The figures of a sweep's configurations as the cells of tables."""

import math

from athanor import console
from athanor.sweep.choice import Candidate, Choice
from athanor.sweep.naming import format_loss, format_value, name_trial, printable, short_names


def compare(choice: Choice) -> tuple[list[str], list[list[str]]]:
    """Return a head and a row for each configuration, without columns that none has a figure for.

    The first columns are the swept keys.
    """
    candidates = choice.candidates
    columns = {
        printable(name): [
            format_value(key, c.values[key]) if key in c.values else "–" for c in candidates
        ]
        for key, name in short_names(choice.keys).items()
    }
    if any(len(candidate.trials) > 1 for candidate in candidates):
        columns["seeds"] = [
            str(len(c.trials)) if c.complete else f"{len(c.losses)} of {len(c.trials)}"
            for c in candidates
        ]
    columns["val loss"] = [
        format_loss(c.loss) + (f" ± {format_loss(c.spread)}" if c.spread is not None else "")
        for c in candidates
    ]
    columns["iter"] = [_format_range(c.metric("kept_iteration")) for c in candidates]
    columns["train loss"] = [format_loss(c.mean("train_loss")) for c in candidates]
    for split in ("valid", "train"):
        shares = [c.mean(f"test_{split}_exact_match") for c in candidates]
        if any(share is not None for share in shares):
            columns[f"{split} exact"] = [console.share(share) for share in shares]
    columns["time"] = [format_time(c.mean("train_seconds")) for c in candidates]
    columns["peak"] = [format_memory(peak_memory(c)) for c in candidates]
    columns[""] = ["best" if c is choice.best else c.outcome for c in candidates]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def every_trial(choice: Choice) -> list[list[str]]:
    """Return a row for each trial, where seeds hide some in the configurations' means."""
    if len(choice.trials) == len(choice.candidates):
        return []
    return [
        [
            str(trial.number),
            name_trial(trial.values),
            format_loss(trial.loss),
            f"{trial.metrics.get('kept_iteration', math.nan):.0f}" if trial.has_loss else "–",
            format_time(trial.metrics.get("train_seconds")),
            "promoted" if trial is choice.trial else trial.outcome,
        ]
        for trial in choice.trials
    ]


def chosen_on_test(choice: Choice) -> list[tuple[str, str]]:
    """Return the chosen trial's figures on the rows of `test`: their names and texts."""
    metrics = choice.trial.metrics if choice.trial else {}
    figures = []
    if "test_exact_match" in metrics:
        figures.append(("exact match", console.share(metrics["test_exact_match"])))
    if "test_loss" in metrics:
        figures.append(("loss", format_loss(metrics["test_loss"])))
    return figures


def peak_memory(candidate: Candidate) -> float | None:
    """Return the highest memory of the trials that finished, in GB."""
    return max(candidate.metric("peak_memory"), default=None)


def format_memory(gigabytes: float | None) -> str:
    """Return memory with its unit."""
    return f"{gigabytes:.2f} GB" if gigabytes is not None and math.isfinite(gigabytes) else "–"


def format_time(seconds: float | None) -> str:
    """Return a time as 9.8 s, 59 s, 1m 01s or 1h 01m."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def _format_range(numbers: list[float]) -> str:
    if not numbers:
        return "–"
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}"
