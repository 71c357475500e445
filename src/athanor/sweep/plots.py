"""A sweep's pictures, as the text of SVG files: the losses over the swept keys, and the curves.

Drawn by matplotlib, which is imported where something is drawn, and the same to the byte for the
same points. Every text in them stays text. A better loss is darker, so that the order is seen
without telling one hue from another, and the best is framed besides.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import median
from typing import Any

from athanor.sweep.choice import (
    ALL_LAYERS,
    LAYERS,
    LEARNING_RATE,
    SEED,
    Candidate,
    Choice,
    called,
    figure,
    names,
    plain,
    shown,
)

# The colours of prepare/report_page.html by day; at night the summary's page inverts them.
PAPER, WASH, LINE, INK, SOFT, ACCENT = (
    "#ffffff",
    "#f4f6f7",
    "#d5dadf",
    "#1a1f24",
    "#56606a",
    "#0b6672",
)
# From the lowest loss to the highest, ever lighter.
RAMP = ("#063a43", "#1b747f", "#549fa5", "#92c2c2", "#c9deda", "#f1f3ec")
# Okabe and Ito (2008), less yellow and black: told apart by colour-blind people too.
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# From an axis's greatest value, all layers, down.
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
FAULT = "#b3261e"
MOST_IN_A_GRID = 12  # values on an axis; more are drawn where they lie
TITLE = "Validation loss, nats a token"


@dataclass(frozen=True)
class Grid:
    """Two keys' values in order, and in each cell (row, column) the best candidate that is there.

    `over` are the other keys that were swept, of which each cell shows the best.
    """

    across: str
    down: str
    columns: list[Any]
    rows: list[Any]
    cells: dict[tuple[int, int], Candidate]
    over: list[str]


def swept(choice: Choice) -> list[str]:
    """The keys of more than one value, the seed apart: learning rate, layers, then the sweep's."""
    keys = list(dict.fromkeys(key for found in choice.candidates for key in found.values))
    several = [key for key in keys if len(_values(choice, key)) > 1]
    return sorted(several, key=lambda key: (key != LEARNING_RATE, key != LAYERS))


def grid(choice: Choice) -> Grid | None:
    """The candidates as a grid of the first two swept keys, or None where they are none.

    Values that a search drew (Optuna's) make a grid of empty cells: that is None too.
    """
    keys = swept(choice)
    if len(keys) < 2:
        return None
    across, down, *over = keys
    columns, rows = _values(choice, across), _values(choice, down)
    cells: dict[tuple[int, int], Candidate] = {}
    for candidate in choice.candidates:  # in order, so that the first is a cell's best
        place = (
            _at(rows, candidate.values.get(down)),
            _at(columns, candidate.values.get(across)),
        )
        cells.setdefault(place, candidate)
    longest = max(len(columns), len(rows))
    sparse = longest > MOST_IN_A_GRID / 2 and 2 * len(cells) < len(columns) * len(rows)
    if longest > MOST_IN_A_GRID or sparse:
        return None
    return Grid(across, down, columns, rows, cells, over)


def span(losses: Iterable[float]) -> tuple[float, float]:
    """The losses that the colours run over: not those of a training that went astray.

    The lowest to the highest, of those that are at most three times as far above the median as the
    lowest is below it.
    """
    found = sorted(loss for loss in losses if math.isfinite(loss))
    if not found:
        return 0.0, 1.0
    middle = median(found)
    near = [loss for loss in found if loss <= middle + 3 * (middle - found[0])]
    high = near[-1] if near[-1] > found[0] else found[-1]
    return found[0], high


def shade(loss: float, low: float, high: float) -> str:
    """The colour of a loss, as #rrggbb."""
    share = min(max((loss - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    place = share * (len(RAMP) - 1)
    left = min(int(place), len(RAMP) - 2)
    pairs = zip(_parts(RAMP[left]), _parts(RAMP[left + 1]), strict=True)
    mixed = (round(a + (b - a) * (place - left)) for a, b in pairs)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def text_on(colour: str) -> str:
    """The colour of text that is readable on another: at least 4.5 to 1 (WCAG AA) on the ramp."""
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in _shares(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def heatmap(choice: Choice) -> str | None:
    """The validation loss over the swept keys; None where no two candidates or seeds are there.

    A grid of two keys is cells; values that a search drew are dots where they lie, their colour
    their loss; one key, or the seed alone, is the loss over it.
    """
    if choice.best is None:
        return None
    if (found := grid(choice)) is not None:
        return _cells(choice, found)
    keys = swept(choice)
    if len(keys) > 1:
        return _dots(choice, keys[0], keys[1])
    if not keys and sum(len(candidate.points) for candidate in choice.candidates) < 2:
        return None
    return _over_one(choice, keys[0] if keys else SEED)


def curves(choice: Choice) -> str | None:
    """The losses of validation and training over iterations, every run's on the same axes.

    None where no run has any. Of a grid the colour is the learning rate (or its first key) and the
    line's style its second; of a search the colour is the loss.
    """
    runs = [
        (candidate, point)
        for candidate in reversed(choice.candidates)
        for point in candidate.points
        if any(len(_series(point.history, name)) > 1 for name in ("val_loss", "train_loss"))
    ]
    if not runs:
        return None
    look, legends = _looks(choice)
    many = len(runs) > 10
    with _drawing():
        picture = _figure(11.2, 4.8)
        axes = picture.subplots(1, 2, sharey=True)
        tops = []
        for axis, (name, title) in zip(
            axes, (("val_loss", TITLE), ("train_loss", "Training loss")), strict=True
        ):
            for candidate, point in runs:
                x, y = zip(*_series(point.history, name) or [(math.nan, math.nan)], strict=True)
                chosen = point is choice.run
                colour, style = look[id(candidate)]
                axis.plot(
                    x,
                    y,
                    color=colour,
                    linestyle=style,
                    linewidth=3 if chosen else 1.2 if many else 1.6,
                    solid_capstyle="round",
                    zorder=4 if chosen else 3,
                    marker="o" if len(x) == 1 else None,
                    markersize=4,
                    gid=f"{name}-{point.number}",
                )
                tops.append(y[0])
            _head(axis, title)
            axis.set_xlabel("iteration")
            axis.grid(axis="y", color=LINE, linewidth=0.8)
            axis.margins(x=0.02)
        _limit(axes[0], runs, tops)
        _mark_kept(axes[0], choice)
        for number, (title, entries) in enumerate(legends):
            _legend(picture, title, entries, number, len(legends))
        titles = {
            f"{name}-{point.number}": f"{called(point.values)}: "
            + (figure(point.loss) if point.measured else plain(point.fault or ""))
            for _, point in runs
            for name in ("val_loss", "train_loss")
        }
        return _svg(picture, "curves", "Loss curves of every run", titles)


def _cells(choice: Choice, found: Grid) -> str:
    from matplotlib.patches import Rectangle

    short = names([found.across, found.down, *found.over])
    low, high = span(cell.loss for cell in found.cells.values())
    across, down = len(found.columns), len(found.rows)
    wide = 1.06 if across <= 6 else 0.86
    labels = [_short(found.down, value) for value in found.rows]
    left = 0.5 + 0.085 * max(map(len, labels))
    titles = {}
    with _drawing():
        picture = _figure(max(left + across * wide + 1.1, 3.6), 0.95 + down * 0.66)
        axis = picture.subplots()
        for row in range(down):
            for column in range(across):
                candidate = found.cells.get((row, column))
                colour, first, second = _cell(candidate, low, high)
                name = f"cell-{row}-{column}"
                titles[name] = _tip(candidate)
                axis.add_patch(
                    Rectangle(
                        (column - 0.48, row - 0.47),
                        0.96,
                        0.94,
                        facecolor=colour,
                        edgecolor=LINE if candidate and not candidate.losses else "none",
                        hatch="////" if candidate and not candidate.losses else None,
                        gid=name,
                    )
                )
                ink = text_on(colour) if candidate and candidate.losses else SOFT
                lift = 0.12 if second else 0.0
                axis.text(
                    column,
                    row + lift,
                    first,
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=11,
                    fontweight="bold" if candidate is choice.best else "normal",
                    gid=f"{name}-loss",
                )
                if second:
                    axis.text(
                        column, row - 0.22, second, ha="center", va="center", color=ink, fontsize=8
                    )
                if candidate is not None and candidate is choice.best:
                    for inset, ink, line in ((0.0, INK, 3), (0.035, PAPER, 1.2)):
                        axis.add_patch(
                            Rectangle(
                                (column - 0.48 + inset, row - 0.47 + inset),
                                0.96 - 2 * inset,
                                0.94 - 2 * inset,
                                facecolor="none",
                                edgecolor=ink,
                                linewidth=line,
                                zorder=5,
                                gid=None if inset else "best",
                            )
                        )
        axis.set_xlim(-0.5, across - 0.5)
        axis.set_ylim(-0.5, down - 0.5)
        axis.set_xticks(range(across), [_short(found.across, v) for v in found.columns])
        axis.set_yticks(range(down), labels)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(_title(found.across, short))
        axis.set_ylabel(_title(found.down, short))
        _head(axis, TITLE)
        _bar(picture, axis, low, high, [cell.loss for cell in found.cells.values()])
        words = f"Validation loss by {plain(short[found.down])} and {plain(short[found.across])}"
        return _svg(picture, "heatmap", words, titles)


def _cell(candidate: Candidate | None, low: float, high: float) -> tuple[str, str, str]:
    """A cell's colour and its one or two lines."""
    if candidate is None:
        return WASH, "–", ""
    if not candidate.losses:
        return WASH, "failed" if candidate.failed else "stopped", ""
    lines = []
    if candidate.spread is not None:
        lines.append(f"±{figure(candidate.spread)}")
    if not candidate.complete:
        lines.append(f"{len(candidate.losses)} of {len(candidate.points)}")
    return shade(candidate.loss, low, high), figure(candidate.loss), ", ".join(lines)


def _dots(choice: Choice, across: str, down: str) -> str:
    """Each candidate where its two values lie, its colour its loss."""
    short = names([across, down])
    low, high = span(candidate.loss for candidate in choice.candidates)
    titles = {}
    with _drawing():
        picture = _figure(7.2, 4.4)
        axis = picture.subplots()
        xs, ys = _scale(axis.xaxis, choice, across), _scale(axis.yaxis, choice, down)
        for number, candidate in enumerate(reversed(choice.candidates)):
            best = candidate is choice.best
            failed = not candidate.losses
            name = f"dot-{len(choice.candidates) - 1 - number}"
            titles[name] = _tip(candidate)
            axis.plot(
                [xs(candidate.values.get(across))],
                [ys(candidate.values.get(down))],
                marker="x" if failed else "o",
                markersize=8 if failed else 15 if best else 11,
                color=FAULT if failed else shade(candidate.loss, low, high),
                markeredgecolor=FAULT if failed else INK if best else SOFT,
                markeredgewidth=1.8 if failed else 3 if best else 0.7,
                linestyle="none",
                zorder=4 if best else 3,
                gid=name,
            )
        first = choice.candidates[0]
        x, y = xs(first.values.get(across)), ys(first.values.get(down))
        _name_best(axis, x, y, figure(first.loss))
        axis.grid(color=LINE, linewidth=0.8)
        axis.margins(0.09, 0.14)
        axis.set_xlabel(_title(across, short))
        axis.set_ylabel(_title(down, short))
        _head(axis, TITLE)
        _bar(picture, axis, low, high, [candidate.loss for candidate in choice.candidates])
        words = f"Validation loss by {plain(short[down])} and {plain(short[across])}"
        return _svg(picture, "heatmap", words, titles)


def _over_one(choice: Choice, key: str) -> str:
    """The loss over one key: a dot for each run, and a line through the means over seeds."""
    runs = [(candidate, point) for candidate in choice.candidates for point in candidate.points]
    low, high = span(point.loss for _, point in runs)
    room = (high - low) or abs(high) or 1.0
    bottom, top = low - 0.2 * room, high + 0.2 * room
    titles = {}
    with _drawing():
        picture = _figure(7.2, 3.9)
        axis = picture.subplots()
        xs = _scale(axis.xaxis, choice, key)
        if key != SEED:
            means = sorted((xs(c.values.get(key)), c.loss) for c in choice.candidates if c.losses)
            axis.plot(*zip(*means, strict=True), color=SOFT, linewidth=1.4, zorder=2, gid="means")
        for _, point in reversed(runs):
            chosen = point is choice.run
            beyond = not point.measured or point.loss > top
            name = f"dot-{point.number}"
            titles[name] = f"{called(point.values)}: " + (
                figure(point.loss) if point.measured else plain(point.fault or "")
            )
            x = xs(point.values.get(key))
            axis.plot(
                [x],
                [top - 0.05 * room if beyond else point.loss],
                marker="o" if not beyond else "^" if point.measured else "x",
                markersize=11 if chosen else 8,
                color=ACCENT if point.measured else FAULT,
                markeredgecolor=FAULT if not point.measured else INK if chosen else PAPER,
                markeredgewidth=2.5 if chosen else 1.8 if not point.measured else 1,
                linestyle="none",
                zorder=4 if chosen else 3,
                gid=name,
            )
            if beyond:
                _beside(
                    axis,
                    x,
                    top - 0.05 * room,
                    figure(point.loss)
                    if point.measured
                    else ("failed" if point.status == "FAILED" else "stopped"),
                )
        run = choice.run
        assert run is not None
        _name_best(axis, xs(run.values.get(key)), run.loss, figure(run.loss))
        axis.set_ylim(bottom, top)
        axis.margins(x=0.09)
        axis.grid(axis="y", color=LINE, linewidth=0.8)
        axis.set_xlabel(_title(key, names([key])))
        _head(axis, TITLE)
        return _svg(picture, "heatmap", f"Validation loss by {plain(names([key])[key])}", titles)


def _values(choice: Choice, key: str) -> list[Any]:
    """A key's values in order: numbers as such, all layers after them, others as they came."""
    points = sorted((p for c in choice.candidates for p in c.points), key=lambda p: p.number)
    found: list[Any] = list({repr(p.values.get(key)): p.values.get(key) for p in points}.values())
    if all(_is_number(value) for value in found):
        return sorted(found, key=lambda value: (_is_all(key, value), value))
    return found


def _at(values: Sequence[Any], value: Any) -> int:
    return [repr(found) for found in values].index(repr(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_all(key: str, value: Any) -> bool:
    return bool(key == LAYERS and value == ALL_LAYERS)


def _parts(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def _shares(colour: str) -> list[float]:
    return [part / 255 for part in _parts(colour)]


def _series(history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """Iterations and values of a column, of the rows that have one that is a number."""
    return [
        (row["iteration"], row[name]) for row in history if name in row and math.isfinite(row[name])
    ]


Look = tuple[str, Any]


def _looks(choice: Choice) -> tuple[dict[int, Look], list[tuple[str, list[tuple[str, Look]]]]]:
    """Each candidate's colour and line (by its id), and the legends: a title and its entries."""
    found, keys = grid(choice), swept(choice)
    by = [key for key in keys[:2] if len(_values(choice, key)) <= len(HUES)]
    if (len(keys) > 1 and found is None) or (keys and not by):
        low, high = span(candidate.loss for candidate in choice.candidates)
        far = low + (high - low) / 0.75  # the ramp's lightest is not seen as a line
        look = {id(c): (shade(c.loss, low, far), "-") for c in choice.candidates}
        ends = [(figure(loss), (shade(loss, low, far), "-")) for loss in (low, high)]
        return look, [("validation loss kept", ends)]
    short = names(keys)
    legends: list[tuple[str, list[tuple[str, Look]]]] = []
    coloured = {id(c): ACCENT for c in choice.candidates}
    styled: dict[int, Any] = {id(c): "-" for c in choice.candidates}
    if by:
        values = _values(choice, by[0])
        coloured = {id(c): HUES[_at(values, c.values.get(by[0]))] for c in choice.candidates}
        entries = [(_short(by[0], v), (HUES[at], "-")) for at, v in enumerate(values)]
        legends.append((_title(by[0], short), entries))
    others = [key for key in keys[:2] if key not in by[:1]]
    if others and len(values := _values(choice, others[0])) <= len(STYLES):
        values.reverse()
        styled = {id(c): STYLES[_at(values, c.values.get(others[0]))] for c in choice.candidates}
        drawn = [(_short(others[0], v), (SOFT, STYLES[at])) for at, v in enumerate(values)]
        legends.append((_title(others[0], short), drawn))
    return {id(c): (coloured[id(c)], styled[id(c)]) for c in choice.candidates}, legends


def _legend(
    picture: Any, title: str, entries: list[tuple[str, Look]], number: int, count: int
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=style, linewidth=2.4, label=label)
        for label, (colour, style) in entries
    ]
    picture.legend(
        handles=handles,
        title=title,
        ncols=len(handles),
        loc="outside lower left" if number == 0 else "outside lower right",
        alignment="left",
        handlelength=2.6,
    )


def _limit(axis: Any, runs: list[Any], tops: list[float]) -> None:
    """From the lowest value to where trainings begin; one that goes astray leaves the picture."""
    values = [
        value
        for _, point in runs
        for name in ("val_loss", "train_loss")
        for _, value in _series(point.history, name)
    ]
    known = [top for top in tops if math.isfinite(top)]
    top = max((first for first in known if first <= 1.25 * median(known)), default=max(known))
    bottom = min(values)
    room = (top - bottom) or abs(top) or 1.0
    axis.set_ylim(bottom - 0.12 * room, top + 0.05 * room)


def _mark_kept(axis: Any, choice: Choice) -> None:
    run = choice.run
    if run is None or "kept_iteration" not in run.metrics:
        return
    x = run.metrics["kept_iteration"]
    axis.plot(
        [x], [run.loss], marker="o", markersize=8, color=INK, linestyle="none", zorder=6, gid="kept"
    )
    axis.annotate(
        f"kept: {figure(run.loss)}",
        (x, run.loss),
        xytext=(0, -18),
        textcoords="offset points",
        ha="right" if x > 0.9 * axis.get_xlim()[1] else "center",
        color=INK,
        fontweight="bold",
        zorder=7,
    )


def _name_best(axis: Any, x: float, y: float, text: str) -> None:
    _beside(axis, x, y, f"best: {text}", INK, "bold", -21)


def _beside(
    axis: Any,
    x: float,
    y: float,
    text: str,
    colour: str = FAULT,
    weight: str = "normal",
    lift: int = 12,
) -> None:
    axis.annotate(
        text,
        (x, y),
        xytext=(0, lift),
        textcoords="offset points",
        ha="center",
        color=colour,
        fontweight=weight,
        zorder=5,
    )


def _scale(axis: Any, choice: Choice, key: str) -> Any:
    """Sets up an axis for a key's values, and returns where on it a value is."""
    values = _values(choice, key)
    if not all(_is_number(v) and not _is_all(key, v) for v in values):
        axis.set_ticks(range(len(values)), [_short(key, value) for value in values])
        return lambda value: _at(values, value)
    low, high = values[0], values[-1]
    several_decades = low > 0 and high / low >= 10
    if low > 0 and (key == LEARNING_RATE or several_decades):
        name = "set_xscale" if axis.axis_name == "x" else "set_yscale"
        getattr(axis.axes, name)("log")
        nearest = min((b / a for a, b in pairwise(values)), default=high)
        apart = math.log(nearest) > 0.07 * math.log(high / low) if high > low else True
        ticks = values if apart else _round_ticks(low, high)
        axis.set_ticks(ticks, [shown(key, float(tick)) for tick in ticks])
        axis.set_ticks([], minor=True)
    elif len(values) <= 8:
        axis.set_ticks(values, [shown(key, value) for value in values])
    return lambda value: value


def _round_ticks(low: float, high: float) -> list[float]:
    """Numbers of one digit on a logarithmic axis, about four to eight of them."""
    decades = math.log10(high / low)
    steps = (1, 2, 3, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in found if low * 0.98 <= tick <= high * 1.02] or [low, high]


def _head(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontweight="bold", fontsize=11, color=INK, pad=10)


def _short(key: str, value: Any, longest: int = 24) -> str:
    """A value as a tick or a legend has room for it; what is pointed at says it whole."""
    text = shown(key, value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _title(key: str, short: dict[str, str]) -> str:
    titles = {LEARNING_RATE: "learning rate", LAYERS: "layers trained"}
    return titles.get(key, plain(short[key]))


def _bar(picture: Any, axis: Any, low: float, high: float, losses: list[float]) -> None:
    """The colours' scale; an arrow where losses lie beyond it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # Fewer than fifty, of which matplotlib would make a raster.
    steps = [shade(at / 47, 0.0, 1.0) for at in range(48)]
    beyond = any(math.isfinite(loss) and loss > high for loss in losses)
    bar = picture.colorbar(
        ScalarMappable(Normalize(low, high if high > low else low + 1e-9), ListedColormap(steps)),
        ax=axis,
        extend="max" if beyond else "neither",
        aspect=14,
        shrink=0.92,
        pad=0.03,
    )
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")
    bar.set_ticks([low, high] if high > low else [low])
    bar.set_ticklabels([figure(tick) for tick in bar.get_ticks()])
    bar.ax.tick_params(length=0)
    bar.ax.invert_yaxis()  # the best on top


def _tip(candidate: Candidate | None) -> str:
    """What a cell or a dot says when it is pointed at."""
    if candidate is None:
        return "no point here"
    faults = [
        f"{f'seed {shown(SEED, point.seed)}: ' if SEED in point.values else ''}{plain(point.fault)}"
        for point in candidate.points
        if point.fault
    ]
    found = [figure(candidate.loss)] if candidate.losses else []
    return f"{called(candidate.values)}: " + "; ".join(found + faults)


@contextmanager
def _drawing() -> Any:
    """matplotlib's settings while the block draws: text stays text, and no `$` is mathematics."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "athanor",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": SOFT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
        "axes.axisbelow": True,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "hatch.color": LINE,
        "hatch.linewidth": 1,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.title_fontsize": 10,
        "legend.borderaxespad": 0.2,
    }
    with rc_context(settings), warnings.catch_warnings():
        # The SVG names fonts that have them; only the widths of such characters are guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


SANS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'PingFang SC', "
    "'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
)


def _svg(picture: Any, name: str, words: str, titles: dict[str, str]) -> str:
    """The picture as SVG with a title where one is pointed at, and ids of its own in a page."""
    buffer = io.StringIO()
    picture.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("'DejaVu Sans'", SANS)
    for id, title in titles.items():
        text = text.replace(f'<g id="{id}">', f'<g id="{id}"><title>{escape(title)}</title>', 1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    opening = f'<svg role="img" aria-label="{escape(words)}" '
    return text.replace("<svg ", opening, 1).rstrip() + "\n"
