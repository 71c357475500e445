"""The summary of a sweep, by which a person compares its trials: terminal, files and MLflow.

`write` puts into a folder summary.html, which needs no other file, points.csv with every number in
full, and the page's pictures as heatmap.svg and curves.svg. Equal trials give equal bytes.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from athanor import console, files
from athanor.sweep import page, plots
from athanor.sweep.choice import LOSS, Candidate, Choice, Trial, choose
from athanor.sweep.colours import loss_range, shade, text_on
from athanor.sweep.grid import arrange_grid
from athanor.sweep.naming import (
    as_override,
    format_loss,
    format_value,
    name_trial,
    printable,
    promotion_command,
    short_names,
)
from athanor.sweep.tables import chosen_on_test, compare, format_time

FIRST_METRICS = (
    LOSS,
    "kept_iteration",
    "best_val_loss",
    "val_loss",
    "train_loss",
    "test_valid_exact_match",
    "test_train_exact_match",
    "train_seconds",
    "peak_memory",
    "trained_tokens",
)


def show(trials: list[Trial], fixed: Iterable[str]) -> None:
    """Print the configurations in order, the heatmap, the choice, and the command to promote it.

    `fixed` are the overrides of the sweep's command that are the same for every trial.
    """
    choice = choose(trials)
    head, rows = compare(choice)
    table = Table(box=box.SIMPLE_HEAD, title="sweep", title_justify="left", collapse_padding=True)
    for number, name in enumerate(head):
        # Headers wrap, so that no number has to.
        header = escape(name).replace(" ", "\n")
        table.add_column(header, justify="left" if number < len(choice.keys) else "right")
    for candidate, row in zip(choice.candidates, rows, strict=True):
        table.add_row(*map(escape, row), style="bold" if candidate is choice.best else None)
    console.print_whole(table)
    _show_grid(choice)
    for trial in choice.without_loss:
        line = f"{escape(name_trial(trial.values))}: {escape(trial.fault)}"
        console.out.print(f"  [red]{trial.outcome}[/] {line}", highlight=False)
    console.out.print(f"\n{escape(choice.sentence)}", highlight=False)
    if test := chosen_on_test(choice):
        metrics = escape(", ".join(f"{name} {value}" for name, value in test))
        console.out.print(
            f"On test rows, which had no part in the choice: {metrics}.", highlight=False
        )
    if choice.trial is not None:
        # One line however long it is: it is there to be copied.
        command = Text(promotion_command(choice.trial.values, fixed))
        console.out.print("\nto promote it:")
        console.out.print(Text("  ") + command, soft_wrap=True, highlight=False)


def write(folder: Path, trials: list[Trial], fixed: Iterable[str], model: str) -> None:
    """Write summary.html, points.csv, heatmap.svg and curves.svg into `folder`.

    A picture that has nothing to show is not written: a single trial has no heatmap. `fixed` is as
    for `show`, `model` the name of the base model.
    """
    choice = choose(trials)
    pictures = {"heatmap": plots.heatmap(choice), "curves": plots.curves(choice)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        if picture is not None:
            files.write_text(folder / f"{name}.svg", picture)
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)
    files.write_text(folder / "points.csv", as_csv(trials))
    files.write_text(folder / "summary.html", page.render(choice, list(fixed), model, pictures))


def markdown(trials: list[Trial], fixed: Iterable[str]) -> str:
    """Return the choice, the command to promote it and the configurations, as a note in MLflow."""
    choice = choose(trials)
    head, rows = compare(choice)
    lines = [_escape(choice.sentence), ""]
    if choice.trial is not None:
        command = promotion_command(choice.trial.values, fixed)
        fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", command)), 3)
        lines += [f"{fence}sh", command, fence, ""]
    if rows:
        keys = len(choice.keys)
        lines.append(_row([_escape(name) for name in head]))
        lines.append(_row([":--"] * keys + ["--:"] * (len(head) - keys)))
        for candidate, row in zip(choice.candidates, rows, strict=True):
            cells = [_escape(cell) for cell in row]
            if candidate is choice.best:
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append(_row(cells))
        lines.append("")
    for trial in choice.without_loss:
        lines.append(
            f"- {trial.outcome}: {_escape(name_trial(trial.values))}: {_escape(trial.fault)}"
        )
    return "\n".join(lines).rstrip() + "\n"


def note(trial: Trial) -> str:
    """Return a line of Markdown for the trial's own run in MLflow."""
    name, metrics = _escape(name_trial(trial.values)), trial.metrics
    if not trial.has_loss:
        return f"{name}: {trial.outcome}: {_escape(trial.fault)}"
    facts = [f"validation loss {format_loss(trial.loss)}"]
    if "kept_iteration" in metrics:
        facts[0] += f" at iteration {metrics['kept_iteration']:.0f}"
    for split in ("valid", "train"):
        if (matched := metrics.get(f"test_{split}_exact_match")) is not None:
            facts.append(f"exact match on {split} rows {console.share(matched)}")
    if "train_seconds" in metrics:
        facts.append(format_time(metrics["train_seconds"]))
    return f"{name}: {', '.join(facts)}"


def as_csv(trials: Iterable[Trial]) -> str:
    """Return every trial with its values and metrics as CSV, numbers in full, by number."""
    trials = sorted(trials, key=lambda trial: trial.number)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    names = {name for trial in trials for name in trial.metrics}
    metrics = [name for name in FIRST_METRICS if name in names]
    metrics += sorted(names - set(metrics))
    rows = []
    for trial in trials:
        values = [_cell(trial.values[key]) if key in trial.values else "" for key in keys]
        numbers = [repr(trial.metrics[name]) if name in trial.metrics else "" for name in metrics]
        rows.append([trial.number, trial.status, *values, *numbers, trial.reason or ""])
    table = files.csv_text(["number", "status", *keys, *metrics, "reason"], rows)
    return table.encode("utf-8", "backslashreplace").decode("utf-8")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else as_override(value)


def _show_grid(choice: Choice) -> None:
    """Print the heatmap: a cell for a configuration, in the colour of its loss."""
    grid = arrange_grid(choice)
    if grid is None:
        return
    low, high = loss_range(cell.loss for cell in grid.cells.values())
    short = {key: printable(name) for key, name in short_names(choice.keys).items()}
    over = f", the best over {', '.join(short[key] for key in grid.over)}" if grid.over else ""
    title = f"validation loss, {short[grid.down]} by {short[grid.across]}{over}"
    table = Table(box=None, padding=(0, 1), title_justify="left", pad_edge=False)
    table.title = escape(title)
    table.add_column(escape(short[grid.down]), justify="right", style="dim")
    for value in grid.columns:
        header = f"{short[grid.across]} {format_value(grid.across, value)}"
        table.add_column(escape(header), justify="center")
    for row in reversed(range(len(grid.rows))):
        cells = [
            _colour_cell(grid.cells.get((row, column)), choice, low, high)
            for column in range(len(grid.columns))
        ]
        table.add_row(escape(format_value(grid.down, grid.rows[row])), *cells)
    console.print_whole(table)
    console.out.print()


def _colour_cell(candidate: Candidate | None, choice: Choice, low: float, high: float) -> Text:
    if candidate is None or not math.isfinite(candidate.loss):
        return Text(candidate.outcome if candidate else "–", style="dim")
    colour = shade(candidate.loss, low, high)
    mark, weight = ("*", "bold ") if candidate is choice.best else (" ", "")
    text = f" {mark}{format_loss(candidate.loss)}{mark} "
    return Text(text, style=f"{weight}{text_on(colour)} on {colour}")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", printable(text))
