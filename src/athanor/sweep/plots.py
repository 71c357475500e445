"""A sweep's pictures as SVG: the losses over the swept keys, and the loss curves.

Drawn by matplotlib, which is imported where something is drawn; equal trials give equal bytes, and
text stays text. A lower loss is darker, so that no two shades differ in their hue alone.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

from athanor.sweep.choice import Candidate, Choice, Trial
from athanor.sweep.colours import MAP, loss_range, shade, text_on
from athanor.sweep.grid import Grid, arrange_grid, index_of, is_number, swept_keys, values_of
from athanor.sweep.naming import (
    ALL_LAYERS,
    LAYERS,
    LEARNING_RATE,
    SEED,
    format_loss,
    format_value,
    name_trial,
    printable,
    short_names,
)

# The colours of prepare/report_page.html by day; at night the summary's page inverts them.
PAPER, WASH, LINE, INK, SOFT, ACCENT, FAULT = (
    "#ffffff", "#f4f6f7", "#d5dadf", "#1a1f24", "#56606a", "#0b6672", "#b3261e",
)  # fmt: skip
FRAME = "#d55e00"  # seen on every shade of the map
KEYS = "petroff6"  # matplotlib's colours, of a key's values
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
LOSS_TITLE = "Validation loss, nats a token"
SANS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'PingFang SC', "
    "'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
)


def heatmap(choice: Choice) -> str | None:
    """Return a picture of the validation loss over the swept keys; None with a single trial.

    Two keys make a grid of cells, or dots in the colour of their loss where a search drew the
    values; one key, or the seed alone, makes dots at the height of their loss.
    """
    if choice.best is None:
        return None
    if (grid := arrange_grid(choice)) is not None:
        return _draw_cells(choice, grid)
    keys = swept_keys(choice)
    if not keys and len(choice.trials) < 2:
        return None
    return _draw_dots(choice, *(keys or [SEED])[:2])


def curves(choice: Choice) -> str | None:
    """Return a picture of the losses over iterations, all trials on the same axes.

    None where no trial has any. Of a grid the colour is the first key and the line's style the
    second; of a search the colour is the loss.
    """
    lines = ("val_loss", LOSS_TITLE), ("train_loss", "Training loss")
    trials = [
        (candidate, trial)
        for candidate in reversed(choice.candidates)
        for trial in candidate.trials
        if any(len(_series(trial, name)) > 1 for name, _ in lines)
    ]
    if not trials:
        return None
    looks, legends = _looks(choice)
    tips, starts, values = {}, [], []
    with _figure(11.2, 4.8) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, title) in zip(axes, lines, strict=True):
            for candidate, trial in trials:
                bold, series = trial is choice.trial, _series(trial, name)
                axis.plot(
                    *zip(*series or [(math.nan, math.nan)], strict=True),
                    linewidth=3 if bold else 1.2 if len(trials) > 10 else 1.6,
                    marker="o" if len(series) == 1 else None,
                    markersize=4,
                    zorder=4 if bold else 3,
                    gid=f"{name}-{trial.number}",
                    **looks[id(candidate)],
                )
                tips[f"{name}-{trial.number}"] = _tip(trial)
                starts += [loss for _, loss in series[:1]]
                values += [loss for _, loss in series]
            axis.set_title(title)
            axis.set_xlabel("iteration")
            axis.grid(axis="y")
            axis.margins(x=0.02)
        # A training that goes astray leaves the picture at its top.
        top = max([loss for loss in starts if loss <= 1.25 * median(starts)])
        room = (top - min(values)) or abs(top) or 1.0
        axes[0].set_ylim(min(values) - 0.12 * room, top + 0.05 * room)
        if (chosen := choice.trial) is not None and "kept_iteration" in chosen.metrics:
            x = chosen.metrics["kept_iteration"]
            axes[0].plot(x, chosen.loss, "o", color=INK, markersize=8, zorder=6, gid="kept")
            side = "right" if x > 0.9 * axes[0].get_xlim()[1] else "center"
            _annotate(axes[0], x, chosen.loss, f"kept: {format_loss(chosen.loss)}", ha=side)
        for (title, entries), place in zip(legends, ("left", "right"), strict=False):
            handles = [axes[0].plot([], [], label=label, **look)[0] for label, look in entries]
            loc = f"outside lower {place}"
            figure.legend(handles=handles, title=title, ncols=9, loc=loc, alignment="left")
        return _svg(figure, "curves", "Loss curves of every trial", tips)


def _draw_cells(choice: Choice, grid: Grid) -> str:
    from matplotlib.patches import Rectangle

    low, high = loss_range(cell.loss for cell in grid.cells.values())
    columns, rows = (
        [_shorten(key, value) for value in values]
        for key, values in ((grid.across, grid.columns), (grid.down, grid.rows))
    )
    width = 1.6 + 0.085 * max(map(len, rows)) + len(columns) * (1.06 if len(columns) <= 6 else 0.86)
    tips = {}
    with _figure(max(width, 3.6), 0.95 + len(rows) * 0.66) as figure:
        axis = figure.subplots()
        for row, column in product(range(len(rows)), range(len(columns))):
            candidate = grid.cells.get((row, column))
            best = candidate is not None and candidate is choice.best
            missing = candidate is None or not candidate.losses
            colour = WASH if candidate is None or missing else shade(candidate.loss, low, high)
            ink = SOFT if missing else text_on(colour)
            name = f"cell-{row}-{column}"
            tips[name] = _tip(candidate)
            corner = (column - 0.47, row - 0.46)
            cell = Rectangle(corner, 0.94, 0.92, facecolor=colour, edgecolor=LINE, gid=name)
            cell.set(linewidth=0, hatch="////" if missing and candidate else None)
            axis.add_patch(cell)
            if best:
                frame = Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=FRAME, gid="best")
                axis.add_patch(frame).set(linewidth=3, zorder=5)
            first, second = _cell_lines(candidate)
            place = {"ha": "center", "va": "center", "color": ink}
            weight = "bold" if best else "normal"
            axis.text(column, row + 0.12 * bool(second), first, size=11, weight=weight, **place)
            axis.text(column, row - 0.22, second, size=8, **place)
        axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5), title=LOSS_TITLE)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return _finish(figure, choice, (grid.across, grid.down), tips, (low, high))


def _cell_lines(candidate: Candidate | None) -> tuple[str, str]:
    """Return the one or two lines of a cell."""
    if candidate is None or not candidate.losses:
        return candidate.outcome if candidate else "–", ""
    notes = [f"±{format_loss(candidate.spread)}"] if candidate.spread is not None else []
    if not candidate.complete:
        notes.append(f"{len(candidate.losses)} of {len(candidate.trials)}")
    return format_loss(candidate.loss), ", ".join(notes)


def _draw_dots(choice: Choice, across: str, down: str | None = None) -> str:
    """Draw candidates where their two values lie, or trials at their loss over one key."""
    items: Sequence[Candidate | Trial] = choice.candidates if down else choice.trials
    low, high = loss_range(item.loss for item in items)
    room = (high - low) or abs(high) or 1.0
    top = high + 0.15 * room
    tips = {}
    with _figure(7.2, 4.4 if down else 3.9) as figure:
        axis = figure.subplots()
        axis.set_title(LOSS_TITLE)
        xs = _scale(axis.xaxis, choice, across)
        ys = _scale(axis.yaxis, choice, down) if down else lambda loss: min(loss, top)
        if not down and across != SEED:
            means = sorted(
                (xs(c.values.get(across)), c.loss) for c in choice.candidates if c.losses
            )
            axis.plot(*zip(*means, strict=True), color=SOFT, linewidth=1.4, zorder=2, gid="means")
        for number, item in enumerate(items):
            best = item is choice.best or item is choice.trial
            failed, above = not math.isfinite(item.loss), not down and item.loss > top
            colour = FAULT if failed else shade(item.loss, low, high) if down else ACCENT
            x = xs(item.values.get(across))
            y = ys(item.values.get(down) if down else item.loss)
            axis.plot(
                x,
                y,
                marker="x" if failed else "^" if above else "o",
                markersize=(8 if failed else 11) + 4 * best,
                color=colour,
                markeredgecolor=FAULT if failed else FRAME if best else SOFT if down else PAPER,
                markeredgewidth=3 if best else 1.8 if failed else 0.8,
                zorder=4 if best else 3,
                gid=f"dot-{number}",
            )
            tips[f"dot-{number}"] = _tip(item)
            if best:
                _annotate(axis, x, y, f"best: {format_loss(item.loss)}")
            elif above:
                text = item.outcome if failed else format_loss(item.loss)
                _annotate(axis, x, y, text, color=FAULT, weight="normal", lift=9)
        axis.margins(0.09, 0.14)
        axis.grid(axis="both" if down else "y")
        if not down:
            axis.set_ylim(low - 0.2 * room, high + 0.2 * room)
        keys = (across, down) if down else (across,)
        return _finish(figure, choice, keys, tips, (low, high) if down else None)


def _scale(axis: Any, choice: Choice, key: str) -> Callable[[Any], Any]:
    """Set up an axis for a key's values; return a function from a value to its place."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = values_of(choice, key)
    if not all(is_number(v) and (key, v) != (LAYERS, ALL_LAYERS) for v in values):
        axis.set_ticks(range(len(values)), [_shorten(key, value) for value in values])
        return lambda value: index_of(values, value)
    low, high = values[0], values[-1]
    if low > 0 and (key == LEARNING_RATE or high >= 10 * low):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        nearest = min((b / a for a, b in pairwise(values)), default=math.inf)
        if nearest < (high / low) ** 0.07:
            decades = math.log10(high / low)
            subs = (1.0, 2.0, 3.0, 5.0) if decades < 1.3 else (1.0, 3.0) if decades < 3 else (1.0,)
            axis.set_major_locator(LogLocator(subs=subs))
            values = []
        axis.set_minor_locator(NullLocator())
    if 0 < len(values) <= 12:
        axis.set_ticks(values)
    axis.set_major_formatter(lambda value, _: format_value(key, float(value)))
    return lambda value: value


def _looks(choice: Choice) -> tuple[dict[int, Any], list[tuple[str, list[tuple[str, Any]]]]]:
    """Return each candidate's colour and line by its id, and legends: a title and its entries."""
    from matplotlib import color_sequences

    keys = swept_keys(choice)[:2]
    colours = [{"color": colour} for colour in color_sequences[KEYS]]
    first_is_long = keys and len(values_of(choice, keys[0])) > len(colours)
    if first_is_long or (len(keys) == 2 and arrange_grid(choice) is None):
        low, high = loss_range(candidate.loss for candidate in choice.candidates)
        lightest = low + (high - low) / 0.7  # the map's own is not seen as a line
        by_loss = {id(c): {"color": shade(c.loss, low, lightest)} for c in choice.candidates}
        ends = [(format_loss(end), {"color": shade(end, low, lightest)}) for end in (low, high)]
        return by_loss, [("validation loss kept", ends)]
    looks: dict[int, Any] = {id(c): {"color": ACCENT} for c in choice.candidates}
    legends = []
    dashes = [{"linestyle": dash} for dash in DASHES]
    for key, options in zip(keys, (colours, dashes), strict=False):
        values = values_of(choice, key)[:: -1 if options is dashes else 1]
        if len(values) > len(options):
            continue
        for candidate in choice.candidates:
            looks[id(candidate)] |= options[index_of(values, candidate.values.get(key))]
        entries = [
            (_shorten(key, value), {"color": SOFT} | option)
            for value, option in zip(values, options, strict=False)
        ]
        legends.append((_title(choice, key), entries))
    return looks, legends


def _series(trial: Trial, name: str) -> list[tuple[float, float]]:
    """Return the iterations and values of a loss, of the rows where it is finite."""
    rows = [row for row in trial.history if math.isfinite(row.get(name, math.nan))]
    return [(row["iteration"], row[name]) for row in rows]


def _title(choice: Choice, key: str) -> str:
    titles = {LEARNING_RATE: "learning rate", LAYERS: "layers trained"}
    return titles.get(key) or printable(short_names(choice.keys).get(key, key))


def _shorten(key: str, value: Any, longest: int = 24) -> str:
    """Return a value cut to the room of a tick or a legend; a tip has all of it."""
    text = format_value(key, value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _tip(item: Candidate | Trial | None) -> str:
    """Return the text that a cell, a dot or a line shows when it is pointed at."""
    if item is None:
        return "no trial here"
    trials = item.trials if isinstance(item, Candidate) else [item]
    texts = [format_loss(item.loss)] if math.isfinite(item.loss) else []
    for trial in trials:
        seed = SEED in trial.values and isinstance(item, Candidate)
        if trial.fault:
            texts.append(f"{f'seed {format_value(SEED, trial.seed)}: ' * seed}{trial.fault}")
    return f"{name_trial(item.values)}: {'; '.join(texts)}"


def _annotate(axis: Any, x: float, y: float, text: str, lift: int = -21, **style: Any) -> None:
    """Write bold text below a place, or above it by a positive lift in points."""
    style = {"color": INK, "weight": "bold", "ha": "center", "zorder": 7} | style
    axis.annotate(text, (x, y), xytext=(0, lift), textcoords="offset points", **style)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """Yield a figure of a size in inches; while the block draws, matplotlib has our options."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = Path(__file__).with_suffix(".mplstyle")
    with rc_context(fname=style), warnings.catch_warnings():
        # The SVG names fonts that have them; only the widths of such characters are guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width, height))


def _finish(
    figure: Any,
    choice: Choice,
    keys: tuple[str, ...],
    tips: dict[str, str],
    colours: tuple[float, float] | None,
) -> str:
    """Name the axes by their keys, add the scale of the colours, and return the picture."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    [axis] = figure.axes
    axis.set_xlabel(_title(choice, keys[0]))
    if len(keys) > 1:
        axis.set_ylabel(_title(choice, keys[1]))
    if colours and colours[1] > colours[0]:
        beyond = any(colours[1] < c.loss < math.inf for c in choice.candidates)
        # With more than fifty colours matplotlib would make a raster of it.
        scale = ScalarMappable(Normalize(*colours), colormaps[MAP].resampled(48))
        bar = figure.colorbar(scale, ax=axis, extend="max" if beyond else "neither", aspect=14)
        bar.outline.set_visible(False)
        bar.solids.set_edgecolor("face")
        bar.ax.invert_yaxis()  # the best on top
    names = " and ".join(_title(choice, key) for key in keys)
    return _svg(figure, "heatmap", f"Validation loss by {names}", tips)


def _svg(figure: Any, name: str, description: str, tips: dict[str, str]) -> str:
    """Return a figure as SVG, with tips as titles, and ids that are its own in a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", SANS)
    for id, tip in tips.items():
        text = text.replace(f'<g id="{id}">', f'<g id="{id}"><title>{escape(tip)}</title>', 1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
