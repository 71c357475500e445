"""Trials of sweeps with made-up losses, and readers of their pictures and pages."""

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from athanor.sweep import page, plots
from athanor.sweep.choice import Trial, choose
from athanor.sweep.trial_record import TrialStatus

EVIL = "\"'><script>alert(1)</script>[red]|*x*|`$\\frac{1}{$ ]]>&lt;\x00"


def trial(
    number: int,
    values: dict[str, Any],
    loss: float | None = None,
    status: TrialStatus = TrialStatus.FINISHED,
    reason: str | None = None,
    **metrics: float,
) -> Trial:
    measured = {} if loss is None else {"kept_val_loss": loss, "kept_iteration": 20.0}
    history = [
        {"iteration": 1, "val_loss": 3.6},
        {"iteration": 10, "train_loss": 2.2, "val_loss": 2.0},
        {"iteration": 20, "train_loss": 1.4, "val_loss": 2.0 if loss is None else loss},
    ]
    return Trial(number, values, status, reason, measured | metrics, history)


def lr(number: int, rate: float, loss: float | None, seed: int | None = None, **more: Any) -> Trial:
    values = {"train.learning_rate": rate} | ({} if seed is None else {"seed": seed})
    return trial(number, values, loss, **more)


def grid(rates: list[float], layers: list[int]) -> list[Trial]:
    """Losses that are all different: 1.00, 1.01, 1.02 … in the order of the sweep."""
    pairs = [(rate, count) for rate in rates for count in layers]
    return [
        trial(
            n,
            {"train.learning_rate": rate, "train.num_layers": count},
            1 + n / 100,
            train_loss=1.1,
            train_seconds=61.0,
            peak_memory=1.234,
        )
        for n, (rate, count) in enumerate(pairs)
    ]


SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[tuple[str, float, float]]:
    """Every text of a picture and where it is drawn."""
    placed = []
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        place = element.get("transform", "")
        if moved := re.search(r"translate\(([-\d.]+)[ ,]+([-\d.]+)\)", place):
            x, y = float(moved[1]), float(moved[2])
        elif turned := re.search(r"rotate\([-\d.]+[ ,]+([-\d.]+)[ ,]+([-\d.]+)\)", place):
            x, y = float(turned[1]), float(turned[2])
        else:
            x, y = float(element.get("x", "nan")), float(element.get("y", "nan"))
        placed.append(("".join(element.itertext()), x, y))
    return placed


def titles(svg: str) -> dict[str, str]:
    """What each named part says when it is pointed at."""
    root = ElementTree.fromstring(svg)
    return {
        group.get("id", ""): title.text or ""
        for group in root.iter(f"{SVG}g")
        if (title := group.find(f"{SVG}title")) is not None
    }


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.inside = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self.inside = tag == "td" or (self.inside and tag in ("span", "i", "b"))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def html(trials: list[Trial], fixed: list[str] | None = None) -> str:
    choice = choose(trials)
    drawn = {"heatmap": plots.heatmap(choice), "curves": plots.curves(choice)}
    return page.render(choice, fixed or [], "models/tiny", drawn)


def picture(trials: list[Trial]) -> str:
    svg = plots.heatmap(choose(trials))
    assert svg is not None
    return svg
