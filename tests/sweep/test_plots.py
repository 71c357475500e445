"""The pictures of a sweep."""

import math
import random
import re
import subprocess
import sys
from typing import Any

import pytest

from athanor.sweep import plots
from athanor.sweep.choice import choose
from athanor.sweep.colours import loss_range, shade, text_on
from athanor.sweep.grid import arrange_grid
from athanor.sweep.naming import format_value
from athanor.sweep.trial_record import TrialStatus
from support.trials import EVIL, Page, grid, html, picture, texts, titles, trial


def test_the_heatmap_has_each_value_at_its_place() -> None:
    rates, layers = [1e-3, 1e-4, 3e-4], [4, -1, 2]
    svg = picture(grid(rates, layers))
    # The colours' scale has the lowest and the highest loss too, and comes last.
    placed = {text: (x, y) for text, x, y in reversed(texts(svg))}
    columns = sorted(("1e-4", "3e-4", "1e-3"), key=lambda name: placed[name][0])
    rows = sorted(("2", "4", "all"), key=lambda name: -placed[name][1])
    assert (columns, rows) == (["1e-4", "3e-4", "1e-3"], ["2", "4", "all"])
    number = 0
    for rate in rates:
        for count in layers:
            x, y = placed[f"{1 + number / 100:.4f}"]
            assert x == pytest.approx(placed[format_value("train.learning_rate", rate)][0], abs=2)
            assert y == pytest.approx(placed[format_value("train.num_layers", count)][1], abs=2)
            number += 1
    assert titles(svg)["heatmap-cell-1-2"] == "lr 1e-3, layers 4: 1.0000"
    assert svg.count('id="heatmap-best"') == 1


def test_seeds_are_averaged_and_failures_marked_in_their_cells() -> None:
    trials = [
        trial(n, {"train.learning_rate": rate, "train.num_layers": count, "seed": seed}, loss)
        for n, (rate, count, seed, loss) in enumerate(
            (rate, count, seed, rate * 1e4 + count + seed / 10)
            for rate in (1e-4, 2e-4)
            for count in (2, 4)
            for seed in (0, 1)
        )
    ]
    for n in (5, 6, 7):
        trials[n] = trial(
            n, trials[n].values, None, TrialStatus.FAILED, f"out of memory {n} {EVIL}"
        )
    svg = picture(trials)
    labels = [text for text, _, _ in texts(svg)]
    assert {"3.0500", "±0.0707", "5.0500", "4.0000", "1 of 2", "failed"} <= set(labels)
    tips = titles(svg)
    assert tips["heatmap-cell-0-1"].startswith("lr 2e-4, layers 2: 4.0000; seed 1: out of memory 5")
    assert "seed 0: out of memory 6" in tips["heatmap-cell-1-1"]
    assert "seed 1: out of memory 7" in tips["heatmap-cell-1-1"]


def test_a_cell_is_the_best_over_other_keys_and_the_page_says_so() -> None:
    trials = [
        trial(
            n,
            {"train.rank": rank, "train.num_layers": count, "train.learning_rate": rate},
            loss,
        )
        for n, (rank, count, rate, loss) in enumerate(
            [
                (4, 2, 1e-4, 1.5),
                (8, 2, 1e-4, 1.4),
                (4, 4, 1e-4, 1.3),
                (8, 4, 3e-4, 1.2),
                (4, 2, 3e-4, 1.1),
            ]
        )
    ]
    choice = choose(trials)
    cells = arrange_grid(choice)
    assert cells and (cells.across, cells.down) == (
        "train.learning_rate",
        "train.num_layers",
    )
    assert {place: cell.loss for place, cell in cells.cells.items()} == {
        (0, 0): 1.4,
        (1, 0): 1.3,
        (1, 1): 1.2,
        (0, 1): 1.1,
    }
    assert "Each cell shows the best over rank" in Page(html(trials)).text


def test_the_colours_leave_out_losses_gone_astray() -> None:
    assert loss_range([1.2, 1.3, 1.5, math.inf, math.nan]) == (1.2, 1.5)
    assert loss_range([1.2, 1.3, 1.4, 9.0]) == (1.2, 1.4)
    assert loss_range([1.2, 9.0]) == (1.2, 9.0)
    assert loss_range([2.0]) == (2.0, 2.0)
    assert shade(9.0, 1.0, 2.0) == shade(2.0, 1.0, 2.0) == shade(2.0, 1.0, 2.0)
    assert shade(1.0, 1.0, 2.0) == shade(1.0, 1.0, 2.0) == shade(1.0, 1.0, 1.0)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_higher_loss_is_lighter_and_readable() -> None:
    """WCAG AA: 4.5 to 1; and no two shades that only their hue tells apart."""
    ramp = [shade(at / 100, 0, 1) for at in range(101)]
    light = [luminance(colour) for colour in ramp]
    assert light == sorted(light) and len(set(light)) > 95
    for colour in ramp:
        low, high = sorted((luminance(colour), luminance(text_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_long_values_are_cut_where_they_have_no_room() -> None:
    long = ["Answer in one word, and in no more than one.", "Answer as you like, at any length."]
    trials = [
        trial(n, {"data.system": long[n % 2], "train.learning_rate": rate}, 1 + n / 10)
        for n, rate in enumerate([1e-4, 1e-4, 1e-3, 1e-3])
    ]
    for several in (trials, trials[:2]):  # a grid, one key
        svg = picture(several)
        drawn = {text for text, *_ in texts(svg)}
        assert {"Answer in one word, and …", "Answer as you like, at a…"} <= drawn
        tips = " ".join(titles(svg).values())
        assert all(value in tips for value in long)
    curves = plots.curves(choose(trials))
    assert curves is not None
    assert "Answer in one word, and …" in {text for text, *_ in texts(curves)}


def test_values_of_a_search_are_dots_where_they_lie() -> None:
    draw = random.Random(0)
    trials = [
        trial(
            n,
            {
                "train.learning_rate": 10 ** draw.uniform(-5, -3),
                "train.num_layers": draw.choice([2, 4, 8, -1]),
            },
            1 + n / 50,
        )
        for n in range(30)
    ]
    trials[7] = trial(7, trials[7].values, None, TrialStatus.FAILED, "the loss is NaN")
    assert arrange_grid(choose(trials)) is None
    svg = picture(trials)
    tips = titles(svg)
    assert len(tips) == 30
    assert tips["heatmap-dot-0"].endswith(": 1.0000")
    assert tips["heatmap-dot-29"].endswith(": the loss is NaN")
    places = {
        name: use
        for name in tips
        if (use := re.search(rf'id="{name}">.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg, re.S))
    }
    order = sorted(
        (c.values["train.learning_rate"], float(places[f"heatmap-dot-{n}"][1]))
        for n, c in enumerate(choose(trials).candidates)
    )
    assert [x for _, x in order] == sorted(x for _, x in order)
    height = {text: y for text, _, y in texts(svg)}
    assert height["all"] < height["8"] < height["4"] < height["2"]


def test_a_small_search_is_no_grid_of_empty_cells() -> None:
    trials = [
        trial(
            n, {"train.learning_rate": 1e-4 * (n + 1), "train.num_layers": [2, 4, -1][n % 3]}, 1.0
        )
        for n in range(12)
    ]
    assert arrange_grid(choose(trials)) is None
    # A grid that was stopped early is still a grid.
    assert arrange_grid(choose(grid([1e-4, 3e-4, 1e-3], [2, 4, -1])[:4])) is not None


@pytest.mark.parametrize(
    ("key", "values", "label"),
    [
        ("train.learning_rate", [1e-5, 1e-4, 1e-3], "1e-4"),
        ("train.num_layers", [2, 4, -1], "all"),
        ("train", ["lora", "dora", "full"], "dora"),
        ("train.rank", [4, 8, 16], "8"),
        ("seed", [0, 1, 2], "1"),
    ],
)
def test_one_key_is_a_line_of_losses(key: str, values: list[Any], label: str) -> None:
    trials = [trial(n, {key: value}, 1.5 - n / 10) for n, value in enumerate(values)]
    trials.append(
        trial(
            3, {key: 7} if key != "train" else {key: "x"}, None, TrialStatus.FAILED, "out of memory"
        )
    )
    svg = picture(trials)
    labels = [text for text, _, _ in texts(svg)]
    assert label in labels and "best: 1.3000" in labels and "failed" in labels
    assert titles(svg)["heatmap-dot-3"].endswith(": out of memory")
    assert ('id="heatmap-means"' in svg) == (key != "seed")


def test_curves_have_every_trial_and_skip_values_that_are_not_finite() -> None:
    trials = grid([1e-4, 3e-4], [2, -1])
    trials[1].history.append({"iteration": 30, "train_loss": math.nan, "val_loss": math.inf})
    trials[2].history.clear()
    svg = plots.curves(choose(trials))
    assert svg is not None
    assert {name for name in titles(svg) if "val_loss" in name} == {
        f"curves-val_loss-{n}" for n in (0, 1, 3)
    }
    assert "nan" not in svg and "inf" not in re.findall(r' d="(.*?)"', svg)
    labels = [text for text, _, _ in texts(svg)]
    assert {"learning rate", "1e-4", "3e-4", "layers trained", "2", "all"} <= set(labels)


def test_matplotlib_is_imported_only_to_draw() -> None:
    """And pyplot, which holds figures and settings for all of a process, never."""
    code = """
import sys
from athanor.sweep import choice, plots, summary
print("matplotlib" in sys.modules, "mlflow" in sys.modules)
values = [{"train.learning_rate": rate, "train.num_layers": n} for rate in (1, 2) for n in (2, 4)]
metrics = {"kept_val_loss": 1.0}
status = choice.TrialStatus.FINISHED
trials = [choice.Trial(n, v, status, None, metrics, []) for n, v in enumerate(values)]
plots.heatmap(choice.choose(trials))
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    picture(grid([1e-4, 3e-4], [2, -1]))
    assert dict(matplotlib.rcParams) == before
