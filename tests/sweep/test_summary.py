"""The summary of a sweep: tables, notes, files and the page."""

import csv
import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from athanor.sweep import plots, summary
from athanor.sweep.choice import Trial, choose
from athanor.sweep.naming import promotion_command
from athanor.sweep.trial_record import TrialStatus
from support.trials import EVIL, Page, grid, html, lr, picture, texts, trial


def test_keys_with_the_same_leaf_keep_their_names() -> None:
    trials = [
        trial(n, {"train.batch_size": 4, "test.batch_size": n, "train.rank": 8}, 1 + n)
        for n in range(2)
    ]
    head = summary.markdown(trials, []).splitlines()[6]
    assert head.startswith(r"| train.batch\_size | test.batch\_size | rank | val loss |")


def test_csv_has_every_number_in_full() -> None:
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


def test_the_page_has_the_configurations_in_order() -> None:
    trials = grid([1e-3, 1e-4], [4, -1])
    trials.append(
        trial(
            4, {"train.learning_rate": 1e3, "train.num_layers": 4}, None, TrialStatus.FAILED, "NaN"
        )
    )
    parsed = Page(html(trials, ["train.iters=100"]))
    cells = [row[:3] for row in parsed.rows if len(row) > 5]
    assert cells == [
        ["1e-3", "4", "1.0000"],
        ["1e-3", "all", "1.0100"],
        ["1e-4", "4", "1.0200"],
        ["1e-4", "all", "1.0300"],
        ["1000", "4", "–"],
    ]
    for part in ("61 s", "1m 01s"):
        assert (part in parsed.text) == (part == "1m 01s")
    assert "1.23 GB" in parsed.text and "4of 5" in parsed.text.replace("\n", "")
    line = promotion_command(trials[0].values, ["train.iters=100"])
    assert line in parsed.text


def test_test_metrics_are_of_the_chosen_trial_alone() -> None:
    trials = [lr(0, 1e-4, 1.3, test_exact_match=0.123), lr(1, 3e-4, 1.2, test_exact_match=0.456)]
    text = Page(html(trials)).text
    assert "exact match of 45.6%" in text and "12.3" not in text


def test_the_page_has_a_line_for_each_seed() -> None:
    trials = [lr(n, 1e-4, 1.2 + n / 100, n) for n in range(3)]
    parsed = Page(html(trials))
    assert ["0", "lr 1e-4, seed 0", "1.2000", "20", "–", "promoted"] in parsed.rows
    assert ["1e-4", "3", "1.2100 ± 0.0100", "20", "–", "–", "–", "best"] in parsed.rows


def test_the_terminal_shows_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    astray = {"train.learning_rate": 1e3, "train.num_layers": 2}
    trials = grid([1e-4, 3e-4], [2, -1])
    trials.append(trial(4, astray, None, TrialStatus.FAILED, "[red]NaN\nTraceback"))
    summary.show(trials, ["train.iters=100"])
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert ["1e-4", "2", "1.0000", "20", "1.1000", "1m", "01s", "1.23", "GB", "best"] in lines
    assert ["all", "1.0100", "1.0300", "–"] in lines and [
        "2",
        "*1.0000*",
        "1.0200",
        "failed",
    ] in lines
    assert "failed lr 1000, layers 2: [red]NaN\n" in output and "Traceback" not in output
    assert f"  {promotion_command(trials[0].values, ['train.iters=100'])}\n" in output


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
    expected = "3e-4 2 2 1.5000 ± 0.7071 20 1.1000 50.0% 100.0% 1m 39s 1.25 GB best"
    assert " ".join(row.split()) == expected


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


def test_a_single_trial_has_curves_and_no_heatmap(tmp_path: Path) -> None:
    summary.write(tmp_path, [lr(0, 1e-4, 1.3)], [], "models/tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.svg",
        "points.csv",
        "summary.html",
    ]
    labels = [text for text, _, _ in texts((tmp_path / "curves.svg").read_text(encoding="utf-8"))]
    assert "kept: 1.3000" in labels


@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_equal_trials_give_equal_bytes(tmp_path: Path, count: int) -> None:
    trials = grid([1e-5 * 2**n for n in range(6)], [1, 2, 4, 8, -1])[:count]
    for name in ("first", "second"):
        summary.write(tmp_path / name, trials, [], "models/tiny")
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "summary.html" in written and "curves.svg" in written
    for name in written:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_a_picture_without_data_is_removed(tmp_path: Path) -> None:
    summary.write(tmp_path, grid([1e-4, 3e-4], [2, 4]), [], "models/tiny")
    assert (tmp_path / "heatmap.svg").exists()
    summary.write(tmp_path, grid([1e-4], [2]), [], "models/tiny")
    assert not (tmp_path / "heatmap.svg").exists()


def test_texts_are_shown_and_never_executed() -> None:
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
    parsed = Page(shown)
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in Page(plain).tags]
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert EVIL.replace("\x00", "␀") in parsed.text
    for svg in (picture(dirty), plots.curves(choose(dirty)) or ""):
        ElementTree.fromstring(svg)
        assert "<script" not in svg


def test_the_page_needs_no_other_file() -> None:
    text = html(grid([1e-4, 3e-4], [2, -1]))
    parsed = Page(text)
    assert not {"script", "link", "img", "image", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"data:|@import|@font-face|\bsrc\s*=|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = re.findall(r'href="#(.*?)"|url\(#(.*?)\)', text)
    assert {link or url for link, url in named} <= set(ids)
