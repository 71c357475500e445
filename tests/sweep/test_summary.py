"""A sweep's summary: an honest choice, a line that repeats it, and tables and pictures of it."""

import csv
import io
import math
import random
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import compose_and_dump, to_hydra_overrides
from markdown_it import MarkdownIt

from athanor.config.compose import load_config
from athanor.sweep import page, plots, summary
from athanor.sweep.choice import Trial, choose
from athanor.sweep.colours import loss_range, shade, text_on
from athanor.sweep.grid import arrange_grid
from athanor.sweep.naming import format_value, promotion_command
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


# The choice


def test_the_lowest_validation_loss_is_chosen() -> None:
    choice = choose([lr(0, 1e-4, 1.3), lr(1, 3e-4, 1.1), lr(2, 1e-3, 1.2)])
    assert choice.trial and choice.trial.number == 1
    assert [candidate.loss for candidate in choice.candidates] == [1.1, 1.2, 1.3]
    assert choice.lead == pytest.approx(0.1)
    assert "lr 3e-4 has the lowest validation loss, 1.1000: 0.1000 below lr 1e-3" in choice.sentence


def test_test_figures_choose_nothing() -> None:
    worse = lr(0, 1e-4, 1.3, test_loss=0.1, test_exact_match=1.0, test_valid_exact_match=1.0)
    better = lr(1, 3e-4, 1.2, test_loss=9.0, test_exact_match=0.0, val_loss=9.0, best_val_loss=9.0)
    assert choose([worse, better]).trial is better


def test_seeds_are_averaged_and_the_lowest_of_the_best_is_promoted() -> None:
    # The single lowest run belongs to the candidate with the worse mean.
    losses = {1e-4: (1.00, 1.60, 1.60), 3e-4: (1.22, 1.20, 1.24)}
    trials = [
        lr(3 * at + seed, rate, loss, seed)
        for at, (rate, of) in enumerate(losses.items())
        for seed, loss in enumerate(of)
    ]
    choice = choose(trials)
    assert choice.best and choice.best.values == {"train.learning_rate": 3e-4}
    assert choice.best.loss == pytest.approx(1.22)
    assert choice.trial and choice.trial.values["seed"] == 1
    assert choice.lead == pytest.approx(0.18)
    # ((0.4² + 0.2² + 0.2²) + (0² + 0.02² + 0.02²)) / (2 + 2)
    assert choice.spread == pytest.approx(math.sqrt((0.24 + 0.0008) / 4))
    assert choice.pooled == 2
    assert "This lead is not larger than the seeds' spread of 0.2454" in choice.sentence
    assert "Its trial with seed 1 has the lowest loss, 1.2000" in choice.sentence


def test_a_lead_larger_than_the_spread_is_said_to_be() -> None:
    losses = [(1e-4, 1.5), (1e-4, 1.52), (3e-4, 1.2), (3e-4, 1.22)]
    choice = choose([lr(n, rate, loss, n % 2) for n, (rate, loss) in enumerate(losses)])
    assert choice.spread == pytest.approx(0.02 / math.sqrt(2))
    assert "This lead is larger than the seeds' spread of 0.0141" in choice.sentence
    assert "by a factor of 21.2" in choice.sentence


@pytest.mark.parametrize("seed", [None, 0])
def test_one_seed_says_nothing_of_chance(seed: int | None) -> None:
    choice = choose([lr(0, 1e-4, 1.3, seed), lr(1, 3e-4, 1.1, seed)])
    assert choice.spread is None
    assert "not known" in choice.sentence and "seed=0,1,2" in choice.sentence


def test_equal_losses_leave_the_order_of_the_sweep() -> None:
    choice = choose([lr(1, 1e-4, 1.1), lr(0, 3e-4, 1.1), lr(2, 1e-3, 1.1)])
    assert choice.trial and choice.trial.number == 0
    assert choice.lead == 0 and "have the same validation loss" in choice.sentence


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_loss_never_comes_first(loss: float | None) -> None:
    choice = choose([lr(0, 1e3, loss), lr(1, 1e-4, 5.0), lr(2, 1e-3, loss), lr(3, 3e-4, 4.0)])
    assert [c.trials[0].number for c in choice.candidates] == [3, 1, 0, 2]
    assert choice.lead == 1


@pytest.mark.parametrize("status", [TrialStatus.FAILED, TrialStatus.KILLED])
def test_a_point_that_did_not_finish_is_not_chosen(status: TrialStatus) -> None:
    choice = choose([lr(0, 1e-4, 1.3), lr(1, 3e-4, 0.1, status=status)])
    assert choice.trial and choice.trial.number == 0
    assert choice.lead is None and "no other configuration finished" in choice.sentence


def test_a_candidate_that_lacks_a_seed_is_no_rival_and_that_is_said() -> None:
    trials = [
        lr(0, 1e-4, 1.5, 0),
        lr(1, 1e-4, 1.5, 1),
        lr(2, 3e-4, 1.0, 0),
        lr(3, 3e-4, None, 1, status=TrialStatus.FAILED, reason="the loss is NaN\nTraceback"),
        lr(4, 1e-3, 2.0, 0),
        lr(5, 1e-3, 2.0, 1),
    ]
    choice = choose(trials)
    assert choice.best and choice.best.values == {"train.learning_rate": 1e-4}
    assert choice.second and choice.second.values == {"train.learning_rate": 1e-3}
    said = "lr 3e-4 has 1.0000 over the 1 of 2 seeds that finished"
    assert said in choice.sentence and "seed 1 (the loss is NaN)" in choice.sentence
    assert "Traceback" not in choice.sentence
    # Where none has every seed, the best of those is chosen, and that is said too.
    alone = choose(trials[2:4])
    assert alone.trial and alone.trial.number == 2
    assert "No configuration finished with every seed" in alone.sentence


def test_no_point_finished() -> None:
    trials = [
        lr(0, 1e-4, None, status=TrialStatus.FAILED, reason="out of memory"),
        lr(1, 3e-4, math.nan),
    ]
    choice = choose(trials)
    assert choice.best is choice.trial is choice.lead is choice.spread is None
    assert "No trial of 2 finished" in choice.sentence
    assert choose([]).candidates == []
    text = Page(html(trials)).text
    assert (
        "No trial of 2 finished" in text and "out of memory" in text and "dvc exp run" not in text
    )
    assert "dvc exp run" not in summary.markdown(trials, [])


def test_a_point_that_ran_again_counts_once() -> None:
    trials = [
        lr(0, 1e-4, None, 0, status=TrialStatus.KILLED),
        lr(1, 1e-4, 1.2, 0),
        lr(2, 1e-4, 1.2, 0),
    ]
    [candidate] = choose(trials).candidates
    assert candidate.losses == [1.2] and candidate.complete


# The promotion


AWKWARD = [
    "dora",
    "",
    "a b",
    "it's",
    'say "x"',
    "1,2",
    "[1,2]",
    "{a: b}",
    "x=y",
    "a:b",
    "true",
    "null",
    "3",
    "back\\slash\\",
    "\\'",
    "$HOME `ls`",
    "(a|b)",
    "range(1,3)",
    "星期八",
    1e-5,
    0.1 + 0.2,
    5e-324,
    1e22,
    -1,
    0,
    True,
    False,
    None,
    [1, 2.5, "a,b", None],
    {"betas": [0.9, 0.999], "name": "it's"},
]


@pytest.mark.parametrize("value", AWKWARD, ids=repr)
def test_a_promoted_value_comes_through_the_shell_and_dvc(value: Any) -> None:
    line = promotion_command({"train.key": value}, [])
    words = shlex.split(line)
    assert words[:6] == ["uv", "run", "dvc", "exp", "run", "-S"]
    overrides = to_path_overrides(words[6:])
    assert list(overrides) == ["params.yaml"]
    [found] = to_hydra_overrides(overrides["params.yaml"])
    assert found.key_or_group == "train.key" and not found.is_sweep_override()
    assert found.value() == value and type(found.value()) is type(value)


def test_a_promotion_has_what_was_fixed_and_not_what_is_hydras() -> None:
    fixed = [
        "train=dora",
        "train.iters=100",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=12",
        "seed=7",
        "train.learning_rate=1",
        "data.label_prompt='a, b'",
    ]
    line = promotion_command({"train.learning_rate": 3e-4, "train.num_layers": -1}, fixed)
    words = shlex.split(line)[5:]
    assert words[1::2] == [
        "train=dora",
        "train.iters=100",
        "seed=7",
        "data.label_prompt='a, b'",
        "train.learning_rate=0.0003",
        "train.num_layers=-1",
    ]
    assert set(words[::2]) == {"-S"}
    # A seed that was swept is the trial's own.
    assert promotion_command({"seed": 0}, ["seed=7"]) == "uv run dvc exp run -S seed=0"


def test_dvc_composes_what_is_promoted(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"train.learning_rate": 1e-5, "train.num_layers": 3, "seed": 2}
    line = promotion_command(values, ["train=dora", "test.temp=0.5"])
    overrides = to_path_overrides(shlex.split(line)[6::2])["params.yaml"]
    params = tmp_path / "params.yaml"
    compose_and_dump(params, str(repo / "conf"), None, "config", str(repo), overrides)
    config = load_config([], params)
    assert (config.train.learning_rate, config.train.num_layers, config.seed) == (1e-5, 3, 2)
    assert config.train.method == "dora" and config.test.temp == 0.5


# Tables


def test_values_are_shown_short() -> None:
    rates = [1e-4, 3e-4, 2.3456e-5, 1e-3, 0.01, 0.5, 20.0, 0.0]
    said = [format_value("train.learning_rate", value) for value in rates]
    assert said == ["1e-4", "3e-4", "2.35e-5", "1e-3", "0.01", "0.5", "20", "0"]
    assert format_value("train.num_layers", -1) == "all" and format_value("train.rank", -1) == "-1"
    assert format_value("train.mask_prompt", True) == "true"


def test_keys_with_the_same_leaf_keep_their_names() -> None:
    trials = [
        trial(n, {"train.batch_size": 4, "test.batch_size": n, "train.rank": 8}, 1 + n)
        for n in range(2)
    ]
    head = summary.markdown(trials, []).splitlines()[6]
    assert head.startswith(r"| train.batch\_size | test.batch\_size | rank | val loss |")


def test_csv_has_every_figure_in_full() -> None:
    loss = 1.2345678901234567
    trials = [
        trial(1, {"train.learning_rate": 1e-5, "train.num_layers": -1, "seed": 0}, loss, zeta=0.1),
        trial(
            0,
            {"train.learning_rate": 3e-4, "train": "lo,ra"},
            None,
            TrialStatus.FAILED,
            'a "b",\nc',
        ),
    ]
    rows = list(csv.DictReader(io.StringIO(summary.as_csv(trials))))
    assert [row["number"] for row in rows] == ["0", "1"]
    assert rows[0]["reason"] == 'a "b",\nc' and rows[0]["status"] == "FAILED"
    assert rows[0]["train"] == "lo,ra" and rows[0]["kept_val_loss"] == ""
    assert float(rows[1]["kept_val_loss"]) == loss
    assert float(rows[1]["train.learning_rate"]) == 1e-5
    assert rows[1]["train.num_layers"] == "-1" and rows[1]["seed"] == "0"
    assert rows[1]["zeta"] == "0.1" and rows[1]["reason"] == ""


def test_the_page_has_the_candidates_in_order() -> None:
    trials = grid([1e-3, 1e-4], [4, -1])
    trials.append(
        trial(
            4, {"train.learning_rate": 1e3, "train.num_layers": 4}, None, TrialStatus.FAILED, "NaN"
        )
    )
    found = Page(html(trials, ["train.iters=100"]))
    cells = [row[:3] for row in found.rows if len(row) > 5]
    assert cells == [
        ["1e-3", "4", "1.0000"],
        ["1e-3", "all", "1.0100"],
        ["1e-4", "4", "1.0200"],
        ["1e-4", "all", "1.0300"],
        ["1000", "4", "–"],
    ]
    for part in ("61 s", "1m 01s"):
        assert (part in found.text) == (part == "1m 01s")
    assert "1.23 GB" in found.text and "4of 5" in found.text.replace("\n", "")
    line = promotion_command(trials[0].values, ["train.iters=100"])
    assert line in found.text


def test_test_figures_are_of_the_chosen_alone() -> None:
    trials = [lr(0, 1e-4, 1.3, test_exact_match=0.123), lr(1, 3e-4, 1.2, test_exact_match=0.456)]
    text = Page(html(trials)).text
    assert "exact match of 45.6%" in text and "12.3" not in text


def test_the_page_has_a_line_for_each_seed() -> None:
    trials = [lr(n, 1e-4, 1.2 + n / 100, n) for n in range(3)]
    found = Page(html(trials))
    assert ["0", "lr 1e-4, seed 0", "1.2000", "20", "–", "promoted"] in found.rows
    assert ["1e-4", "3", "1.2100 ± 0.0100", "20", "–", "–", "–", "best"] in found.rows


def test_the_terminal_shows_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    astray = {"train.learning_rate": 1e3, "train.num_layers": 2}
    trials = grid([1e-4, 3e-4], [2, -1])
    trials.append(trial(4, astray, None, TrialStatus.FAILED, "[red]NaN\nTraceback"))
    summary.show(trials, ["train.iters=100"])
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["1e-4", "2", "1.0000", "20", "1.1000", "1m", "01s", "1.23", "GB", "best"] in lines
    assert ["all", "1.0100", "1.0300", "–"] in lines and [
        "2",
        "*1.0000*",
        "1.0200",
        "failed",
    ] in lines
    assert "failed lr 1000, layers 2: [red]NaN\n" in said and "Traceback" not in said
    assert f"  {promotion_command(trials[0].values, ['train.iters=100'])}\n" in said


def test_a_wide_table_keeps_every_column_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures: dict[str, Any] = {"train_loss": 1.1, "train_seconds": 99.0, "peak_memory": 1.25}
    exact: dict[str, Any] = {"test_valid_exact_match": 0.5, "test_train_exact_match": 1.0}
    trials = [
        trial(
            n,
            {"train.learning_rate": 3e-4, "train.num_layers": 2, "seed": n},
            1 + n,
            **figures,
            **exact,
        )
        for n in range(2)
    ]
    summary.show(trials, [])
    [row] = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    said = "3e-4 2 2 1.5000 ± 0.7071 20 1.1000 50.0% 100.0% 1m 39s 1.25 GB best"
    assert " ".join(row.split()) == said


def test_notes_are_markdown() -> None:
    trials = [*grid([1e-4], [2, 4]), trial(2, {"train": EVIL}, None, TrialStatus.FAILED, EVIL)]
    text = summary.markdown(trials, [f"data.labels=[{'`' * 4}]"])
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in rendered and "<em>" not in rendered
    assert rendered.count("<table>") == 1 and rendered.count("<tr>") == 4
    assert len(re.findall("<td", rendered)) == 3 * len(re.findall("<th", rendered)[1:])
    assert rendered.count("<code") == 1
    assert "**1.0000**" in text
    assert summary.note(trials[0]).startswith(
        "lr 1e-4, layers 2: validation loss 1.0000 at iteration 20"
    )
    note = summary.note(trials[2])
    assert "\n" not in note and "<script" not in MarkdownIt("commonmark").render(note)


# Pictures


SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[tuple[str, float, float]]:
    """Every text of a picture and where it is drawn."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        place = element.get("transform", "")
        if moved := re.search(r"translate\(([-\d.]+)[ ,]+([-\d.]+)\)", place):
            x, y = float(moved[1]), float(moved[2])
        elif turned := re.search(r"rotate\([-\d.]+[ ,]+([-\d.]+)[ ,]+([-\d.]+)\)", place):
            x, y = float(turned[1]), float(turned[2])
        else:
            x, y = float(element.get("x", "nan")), float(element.get("y", "nan"))
        found.append(("".join(element.itertext()), x, y))
    return found


def titles(svg: str) -> dict[str, str]:
    """What each named part says when it is pointed at."""
    root = ElementTree.fromstring(svg)
    return {
        group.get("id", ""): title.text or ""
        for group in root.iter(f"{SVG}g")
        if (title := group.find(f"{SVG}title")) is not None
    }


def picture(trials: list[Trial]) -> str:
    found = plots.heatmap(choose(trials))
    assert found is not None
    return found


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
    said = [text for text, _, _ in texts(svg)]
    assert {"3.0500", "±0.0707", "5.0500", "4.0000", "1 of 2", "failed"} <= set(said)
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
    found = arrange_grid(choice)
    assert found and (found.across, found.down) == ("train.learning_rate", "train.num_layers")
    assert {place: cell.loss for place, cell in found.cells.items()} == {
        (0, 0): 1.4,
        (1, 0): 1.3,
        (1, 1): 1.2,
        (0, 1): 1.1,
    }
    assert "Each cell shows the best over rank" in Page(html(trials)).text


def test_the_colours_leave_out_what_went_astray() -> None:
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


def test_cells_are_ever_lighter_and_readable() -> None:
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
        said = " ".join(titles(svg).values())
        assert all(value in said for value in long)
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
    # A grid that was stopped early is still one.
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
    said = [text for text, _, _ in texts(svg)]
    assert label in said and "best: 1.3000" in said and "failed" in said
    assert titles(svg)["heatmap-dot-3"].endswith(": out of memory")
    assert ('id="heatmap-means"' in svg) == (key != "seed")


def test_one_point_has_curves_and_no_heatmap(tmp_path: Path) -> None:
    summary.write(tmp_path, [lr(0, 1e-4, 1.3)], [], "models/tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.svg",
        "points.csv",
        "summary.html",
    ]
    said = [text for text, _, _ in texts((tmp_path / "curves.svg").read_text(encoding="utf-8"))]
    assert "kept: 1.3000" in said


def test_curves_have_every_run_and_skip_what_is_no_number() -> None:
    trials = grid([1e-4, 3e-4], [2, -1])
    trials[1].history.append({"iteration": 30, "train_loss": math.nan, "val_loss": math.inf})
    trials[2].history.clear()
    svg = plots.curves(choose(trials))
    assert svg is not None
    assert {name for name in titles(svg) if "val_loss" in name} == {
        f"curves-val_loss-{n}" for n in (0, 1, 3)
    }
    assert "nan" not in svg and "inf" not in re.findall(r' d="(.*?)"', svg)
    said = [text for text, _, _ in texts(svg)]
    assert {"learning rate", "1e-4", "3e-4", "layers trained", "2", "all"} <= set(said)


@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_the_same_points_give_the_same_bytes(tmp_path: Path, count: int) -> None:
    trials = grid([1e-5 * 2**n for n in range(6)], [1, 2, 4, 8, -1])[:count]
    for name in ("one", "two"):
        summary.write(tmp_path / name, trials, [], "models/tiny")
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "summary.html" in written and "curves.svg" in written
    for name in written:
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_pictures_that_are_no_longer_of_the_sweep_go_away(tmp_path: Path) -> None:
    summary.write(tmp_path, grid([1e-4, 3e-4], [2, 4]), [], "models/tiny")
    assert (tmp_path / "heatmap.svg").exists()
    summary.write(tmp_path, grid([1e-4], [2]), [], "models/tiny")
    assert not (tmp_path / "heatmap.svg").exists()


# Safety


def test_texts_are_shown_and_never_run() -> None:
    clean = [
        trial(0, {"train": "a", "train.rank": "b"}, 1.0),
        trial(1, {"train": "c", "train.rank": "d"}, 1.1),
        trial(2, {"train": "e", "train.rank": "f"}, None, TrialStatus.FAILED, "g"),
    ]
    dirty = [
        Trial(
            p.number,
            {key: f"{EVIL}{value}" for key, value in p.values.items()},
            p.status,
            p.reason and EVIL,
            p.metrics,
            p.history,
        )
        for p in clean
    ]
    shown, plain = html(dirty, [f"x={EVIL}"]), html(clean, ["x=y"])
    assert "<script" not in shown and "\x00" not in shown
    found = Page(shown)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in Page(plain).tags]
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert EVIL.replace("\x00", "␀") in found.text
    for svg in (picture(dirty), plots.curves(choose(dirty)) or ""):
        ElementTree.fromstring(svg)
        assert "<script" not in svg


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = html(grid([1e-4, 3e-4], [2, -1]))
    found = Page(text)
    assert not {"script", "link", "img", "image", "iframe"} & {tag for tag, _ in found.tags}
    assert not re.search(r"data:|@import|@font-face|\bsrc\s*=|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = re.findall(r'href="#(.*?)"|url\(#(.*?)\)', text)
    assert {one or two for one, two in named} <= set(ids)


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
