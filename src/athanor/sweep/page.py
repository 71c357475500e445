"""The summary of a sweep as one web page with its pictures inside and no script."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from athanor import console
from athanor.pages.render import render_page
from athanor.sweep import tables
from athanor.sweep.choice import Choice
from athanor.sweep.grid import arrange_grid, swept_keys
from athanor.sweep.naming import (
    format_loss,
    name_trial,
    printable,
    promotion_command,
    short_names,
)


def _print_lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))


FILTERS: dict[str, Callable[..., str]] = {
    "loss": format_loss,
    "name": name_trial,
    "printable": printable,
    "lines": _print_lines,
    "time": tables.format_time,
    "counted": console.counted,
}


def render(choice: Choice, fixed: list[str], model: str, pictures: dict[str, str | None]) -> str:
    """Return the page; `pictures` are its heatmap and its curves as SVG."""
    head, rows = tables.compare(choice)
    grid = arrange_grid(choice)
    short = {key: printable(name) for key, name in short_names(choice.keys).items()}
    return render_page(
        Path(__file__).with_name("summary.html"),
        FILTERS,
        choice=choice,
        model=model,
        swept=list(short.values()),
        fixed=fixed,
        head=head,
        rows=rows,
        lacking=any(c.losses and not c.complete for c in choice.candidates),
        seconds=sum(trial.metrics.get("train_seconds", 0.0) for trial in choice.trials),
        costs=_costs(choice),
        test=tables.chosen_on_test(choice),
        trials=tables.every_trial(choice),
        coloured=len(swept_keys(choice)) > 1,
        over=[short[key] for key in grid.over] if grid else [],
        pictures={name: _inline(picture) for name, picture in pictures.items() if picture},
        promotion=promotion_command(choice.trial.values, fixed) if choice.trial else None,
    )


def _costs(choice: Choice) -> list[dict[str, Any]]:
    """Return time and memory of each configuration, and their shares of the longest bar."""
    measured = [
        (candidate, candidate.mean("train_seconds"), tables.peak_memory(candidate))
        for candidate in choice.candidates
        if candidate.losses
    ]
    longest = max((seconds or 0.0 for _, seconds, _ in measured), default=0.0)
    largest = max((peak or 0.0 for _, _, peak in measured), default=0.0)
    if not longest and not largest:
        return []
    return [
        {
            "name": name_trial(candidate.values),
            "best": candidate is choice.best,
            "bars": [
                (tables.format_time(seconds), (seconds or 0.0) / (longest or 1.0)),
                (tables.format_memory(peak), (peak or 0.0) / (largest or 1.0)),
            ],
        }
        for candidate, seconds, peak in measured
    ]


def _inline(picture: str) -> str:
    """Return a picture for the page, no wider than it was drawn."""
    from markupsafe import Markup

    width = re.search(r'width="([\d.]+)pt"', picture)
    assert width is not None
    pixels = float(width[1]) * 4 / 3
    return Markup(picture.replace("<svg ", f'<svg style="max-width: {pixels:.0f}px" ', 1))
