"""The summary of a sweep, for a person to compare its points: on a terminal, in files, in MLflow.

Into a folder `write` puts summary.html, which needs nothing but itself, points.csv with every
figure as it is, and the page's pictures as heatmap.svg and curves.svg. The same points give the
same bytes.
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
from athanor.sweep import plots
from athanor.sweep.choice import (
    FAILED,
    FINISHED,
    LOSS,
    Candidate,
    Choice,
    Point,
    called,
    choose,
    figure,
    names,
    override,
    plain,
    promotion,
    shown,
)

EXACT = {"test_valid_exact_match": "valid exact", "test_train_exact_match": "train exact"}
FIRST_METRICS = (
    LOSS,
    "kept_iteration",
    "best_val_loss",
    "val_loss",
    "train_loss",
    *EXACT,
    "train_seconds",
    "peak_memory",
    "trained_tokens",
)


def show(points: list[Point], fixed: Iterable[str]) -> None:
    """Prints the candidates in order, the heatmap, what is chosen and the line that promotes it.

    `fixed` are the overrides of the sweep's command that are the same for every point.
    """
    choice = choose(points)
    head, rows = _table(choice)
    table = Table(box=box.SIMPLE_HEAD, title="sweep", title_justify="left", collapse_padding=True)
    swept = len(_keys(choice))
    for number, name in enumerate(head):
        # Headers are broken, so that no figure has to be.
        header = escape(name).replace(" ", "\n")
        table.add_column(header, justify="left" if number < swept else "right")
    for candidate, row in zip(choice.candidates, rows, strict=True):
        table.add_row(*map(escape, row), style="bold" if candidate is choice.best else None)
    console.out.print(table)
    _show_grid(choice)
    for point in _faulty(choice):
        console.out.print(
            f"  [red]{_status(point)}[/] {escape(called(point.values))}: "
            f"{escape(plain(point.fault or ''))}",
            highlight=False,
        )
    console.out.print(f"\n{escape(choice.sentence)}", highlight=False)
    if test := _of_the_chosen(choice):
        asked = ", ".join(f"{name} {value}" for name, value in test)
        console.out.print(f"On test rows, which chose nothing: {escape(asked)}.", highlight=False)
    if choice.run is not None:
        # One line however long it is: it is there to be copied.
        line = Text(promotion(choice.run.values, fixed))
        console.out.print("\nto promote it:")
        console.out.print(Text("  ") + line, soft_wrap=True, highlight=False)


def write(folder: Path, points: list[Point], fixed: Iterable[str], model: str) -> None:
    """Writes summary.html, points.csv, heatmap.svg and curves.svg into `folder`.

    A picture for which there is nothing to draw is not written: one point has no heatmap. `fixed`
    is as for `show`, `model` what the page calls the base model.
    """
    choice = choose(points)
    drawn = {"heatmap": plots.heatmap(choice), "curves": plots.curves(choice)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        if picture is not None:
            files.write_text(folder / f"{name}.svg", picture)
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)
    files.write_text(folder / "points.csv", table_of(points))
    files.write_text(folder / "summary.html", page(choice, list(fixed), model, drawn))


def page(choice: Choice, fixed: list[str], model: str, drawn: dict[str, str | None]) -> str:
    """The summary as one web page with the pictures in it; it has no script."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": figure,
        "plain": plain,
        "lines": _lines,
        "time": _time,
        "share": _share,
    }
    template = environment.from_string(
        Path(__file__).with_name("summary.html").read_text(encoding="utf-8")
    )
    head, rows = _table(choice)
    points = [point for candidate in choice.candidates for point in candidate.points]
    seconds = [p.metrics["train_seconds"] for p in points if "train_seconds" in p.metrics]
    grid = plots.grid(choice)
    short = names(_keys(choice))
    html = template.render(
        choice=choice,
        model=model,
        swept=[short[key] for key in _keys(choice)],
        fixed=fixed,
        head=head,
        rows=rows,
        keys=len(_keys(choice)),
        points=points,
        lacking=any(found.losses and not found.complete for found in choice.candidates),
        finished=sum(point.measured for point in points),
        seconds=sum(seconds) if seconds else None,
        costs=_costs(choice),
        test=_of_the_chosen(choice),
        faults=[(called(p.values), _status(p), _reason(p)) for p in _faulty(choice)],
        runs=_runs(choice),
        coloured=len(plots.swept(choice)) > 1,
        over=[plain(short[key]) for key in grid.over] if grid else [],
        drawn={name: _inline(picture) for name, picture in drawn.items() if picture},
        called=called,
        promotion=promotion(choice.run.values, fixed) if choice.run else None,
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def markdown(points: list[Point], fixed: Iterable[str]) -> str:
    """The candidates, what is chosen and the line that promotes it, for a note in MLflow."""
    choice = choose(points)
    head, rows = _table(choice)
    lines = [_markdown(choice.sentence), ""]
    if choice.run is not None:
        line = promotion(choice.run.values, fixed)
        fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", line)), 3)
        lines += [f"{fence}sh", line, fence, ""]
    if rows:
        side = [":--"] * len(_keys(choice)) + ["--:"] * (len(head) - len(_keys(choice)))
        lines += [_row(head), _row(side, markup=True)]
        for candidate, row in zip(choice.candidates, rows, strict=True):
            lines.append(_row(row, bold=candidate is choice.best))
        lines.append("")
    for point in _faulty(choice):
        name, why = _markdown(called(point.values)), _markdown(plain(point.fault or ""))
        lines.append(f"- {_status(point)}: {name}: {why}")
    return "\n".join(lines).rstrip() + "\n"


def note(point: Point) -> str:
    """A line of Markdown for the point's own run in MLflow."""
    name = _markdown(called(point.values))
    if not point.measured:
        return f"{name}: {_status(point)}: {_markdown(plain(point.fault or ''))}"
    said = [f"validation loss {figure(point.loss)}"]
    if "kept_iteration" in point.metrics:
        said[0] += f" at iteration {point.metrics['kept_iteration']:.0f}"
    for metric, where in (("test_valid_exact_match", "valid"), ("test_train_exact_match", "train")):
        if metric in point.metrics:
            said.append(f"exact match on {where} rows {_share(point.metrics[metric])}")
    if "train_seconds" in point.metrics:
        said.append(_time(point.metrics["train_seconds"]))
    return f"{name}: {', '.join(said)}"


def table_of(points: Iterable[Point]) -> str:
    """Every point with its values and metrics as CSV, numbers in full, by number."""
    points = sorted(points, key=lambda point: point.number)
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    found = list(dict.fromkeys(metric for point in points for metric in point.metrics))
    first = [metric for metric in FIRST_METRICS if metric in found]
    metrics = first + sorted(set(found) - set(first))
    rows = []
    for point in points:
        values = ["" if key not in point.values else _cell(point.values[key]) for key in keys]
        measured = [repr(point.metrics[m]) if m in point.metrics else "" for m in metrics]
        rows.append([point.number, point.status, *values, *measured, point.reason or ""])
    table = files.csv_text(["number", "status", *keys, *metrics, "reason"], rows)
    return table.encode("utf-8", "backslashreplace").decode("utf-8")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else override(value)


def _keys(choice: Choice) -> list[str]:
    return list(dict.fromkeys(key for found in choice.candidates for key in found.values))


def _table(choice: Choice) -> tuple[list[str], list[list[str]]]:
    """The candidates' table, shorn of columns that none has a figure for."""
    keys = _keys(choice)
    short = names(keys)
    several = any(len(candidate.points) > 1 for candidate in choice.candidates)
    columns: dict[str, list[str]] = {
        plain(short[key]): [
            shown(key, c.values[key]) if key in c.values else "–" for c in choice.candidates
        ]
        for key in keys
    }
    if several:
        columns["seeds"] = [
            str(len(c.points)) if c.complete else f"{len(c.losses)} of {len(c.points)}"
            for c in choice.candidates
        ]
    columns["val loss"] = [_loss(c) for c in choice.candidates]
    columns["iter"] = [_range(c, "kept_iteration") for c in choice.candidates]
    columns["train loss"] = [figure(c.mean("train_loss")) for c in choice.candidates]
    for metric, title in EXACT.items():
        if any(c.mean(metric) is not None for c in choice.candidates):
            columns[title] = [_share(c.mean(metric)) for c in choice.candidates]
    columns["time"] = [_time(c.mean("train_seconds")) for c in choice.candidates]
    columns["peak"] = [_memory(_peak(c)) for c in choice.candidates]
    columns[""] = [
        "best" if c is choice.best else "" if c.complete else _status_of(c)
        for c in choice.candidates
    ]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _loss(candidate: Candidate) -> str:
    spread = candidate.spread
    return figure(candidate.loss) + (f" ± {figure(spread)}" if spread is not None else "")


def _range(candidate: Candidate, metric: str) -> str:
    found = [p.metrics[metric] for p in candidate.finished if metric in p.metrics]
    if not found:
        return "–"
    low, high = min(found), max(found)
    return f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}"


def _peak(candidate: Candidate) -> float | None:
    found = [p.metrics["peak_memory"] for p in candidate.finished if "peak_memory" in p.metrics]
    return max(found) if found else None


def _memory(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f} GB"


def _share(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    # Not all of them is never 100 %, however few are missing.
    return ">99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


def _time(seconds: float | None) -> str:
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


def _status(point: Point) -> str:
    if point.status == FINISHED:
        return "finished" if point.measured else "no loss"
    return "failed" if point.status == FAILED else "stopped"


def _status_of(candidate: Candidate) -> str:
    faults = {_status(point) for point in candidate.points if not point.measured}
    return " or ".join(sorted(faults))


def _faulty(choice: Choice) -> list[Point]:
    """The points without a loss, in the sweep's order."""
    points = [p for c in choice.candidates for p in c.points if not p.measured]
    return sorted(points, key=lambda point: point.number)


def _reason(point: Point) -> str:
    return (point.reason or "").strip() or point.fault or ""


def _lines(text: str) -> str:
    return "\n".join(map(plain, text.splitlines()))


def _show_grid(choice: Choice) -> None:
    """The heatmap on the terminal: a cell for a candidate, in the colour of its loss."""
    grid = plots.grid(choice)
    if grid is None:
        return
    low, high = plots.span(cell.loss for cell in grid.cells.values())
    short = names([grid.across, grid.down, *grid.over])
    table = Table(box=None, padding=(0, 1), title_justify="left", pad_edge=False)
    table.title = escape(f"validation loss, {_by(grid, short)}")
    table.add_column(escape(plain(short[grid.down])), justify="right", style="dim")
    for value in grid.columns:
        title = f"{plain(short[grid.across])} {shown(grid.across, value)}"
        table.add_column(escape(title), justify="center")
    for row in reversed(range(len(grid.rows))):
        cells = []
        for column in range(len(grid.columns)):
            cell = grid.cells.get((row, column))
            if cell is None or not cell.losses:
                cells.append(Text(_status_of(cell) if cell else "–", style="dim"))
                continue
            colour = plots.shade(cell.loss, low, high)
            best = cell is choice.best
            text = f"*{figure(cell.loss)}*" if best else f" {figure(cell.loss)} "
            style = f"{'bold ' if best else ''}{plots.text_on(colour)} on {colour}"
            cells.append(Text(f" {text} ", style=style))
        table.add_row(escape(shown(grid.down, grid.rows[row])), *cells)
    console.out.print(table)
    console.out.print()


def _by(grid: plots.Grid, short: dict[str, str]) -> str:
    text = f"{plain(short[grid.down])} by {plain(short[grid.across])}"
    if grid.over:
        text += f", the best over {', '.join(plain(short[key]) for key in grid.over)}"
    return text


def _costs(choice: Choice) -> list[dict[str, Any]]:
    """Time and memory of each candidate as shares of the longest bar."""
    found = [
        (candidate, candidate.mean("train_seconds"), _peak(candidate))
        for candidate in choice.candidates
        if candidate.losses
    ]
    longest = max((seconds or 0.0 for _, seconds, _ in found), default=0.0)
    largest = max((peak or 0.0 for _, _, peak in found), default=0.0)
    if not longest and not largest:
        return []
    return [
        {
            "name": called(candidate.values),
            "best": candidate is choice.best,
            "time": _time(seconds),
            "time_share": (seconds or 0.0) / longest if longest else 0.0,
            "peak": _memory(peak),
            "peak_share": (peak or 0.0) / largest if largest else 0.0,
        }
        for candidate, seconds, peak in found
    ]


def _of_the_chosen(choice: Choice) -> list[tuple[str, str]]:
    """What is known of the chosen on test rows, which chose nothing."""
    metrics = choice.run.metrics if choice.run else {}
    found = []
    if "test_exact_match" in metrics:
        found.append(("exact match", _share(metrics["test_exact_match"])))
    if "test_loss" in metrics:
        found.append(("loss", figure(metrics["test_loss"])))
    return found


def _runs(choice: Choice) -> list[list[str]]:
    """Every point in the sweep's order, where seeds hide some in the candidates' means."""
    points = [point for candidate in choice.candidates for point in candidate.points]
    if len(points) == len(choice.candidates):
        return []
    return [
        [
            str(point.number),
            called(point.values),
            figure(point.loss),
            f"{point.metrics.get('kept_iteration', math.nan):.0f}" if point.measured else "–",
            _time(point.metrics.get("train_seconds")),
            "promoted" if point is choice.run else _status(point),
        ]
        for point in sorted(points, key=lambda point: point.number)
    ]


def _inline(picture: str) -> str:
    """A picture for the page, no wider than it was drawn."""
    from markupsafe import Markup

    points = re.search(r'width="([\d.]+)pt"', picture)
    assert points is not None
    wide = float(points[1]) * 4 / 3
    return Markup(picture.replace("<svg ", f'<svg style="max-width: {wide:.0f}px" ', 1))


def _row(cells: list[str], bold: bool = False, markup: bool = False) -> str:
    texts = cells if markup else [_markdown(cell) for cell in cells]
    if bold:
        texts = [f"**{text}**" if text else "" for text in texts]
    return f"| {' | '.join(texts)} |"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", plain(text))
