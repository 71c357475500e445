"""The data report's page: complete, closed in itself, and safe with rows of strangers."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from jinja2 import UndefinedError

from athanor.prepare.report_page import page

VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ["splits", "checks", "lengths", "labels", "sources", "scripts", "files", "cleaning"]
SECTIONS += ["spelled", "samples"]


def split(rows: int, **settings: Any) -> dict[str, Any]:
    return {
        "rows": rows,
        "tokens": rows * 51,
        "supervised_tokens": rows * 20,
        "shortest_row": 12,
        "median_row": 50.5,
        "longest_row": 700,
        "rows_cut": 3,
        "tokens_cut": 4120,
        "ends_cut": 1,
        "lengths": [
            {"from": 0, "to": 400, "rows": rows - 3},
            {"from": 400, "to": 800, "rows": 3},
        ],
        "labels": {"positive": rows - 1, "负面": 1},
        "sources": {f"来源{number:02}": 100 - number for number in range(15)},
        "scripts": {"Han": rows},
    } | settings


@pytest.fixture
def report() -> dict[str, Any]:
    samples = [
        {
            "where": "data/train.jsonl:1",
            "pieces": [["<|user|>\n月亮哪天最圆\n", False], ["星期八\n真的", True], ["\n", False]],
        }
    ]
    return {
        "model": "models/tiny",
        "max_seq_length": 600,
        "rows": {"read": 12345, "kept": 11100, "rejected": 1245, "augmented": 77},
        "files": [
            {"path": "data/训练.jsonl", "format": "completions", "rows": 12345, "kept": 11100}
        ],
        "splits": {"train": split(10000), "valid": split(1000), "test": split(100)},
        "checks": [
            {
                "name": "duplicate",
                "action": "skip",
                "rows": 1234,
                "problems": 1234,
                "says": "the same row twice in a split",
                "examples": [
                    {"where": "data/train.jsonl:17", "text": "the same as data/train.jsonl:3"}
                ],
            },
            {
                "name": "empty",
                "action": "warn",
                "rows": 1,
                "problems": 1,
                "says": "no answer",
                "examples": [],
            },
        ],
        "spelled": [
            {"character": chr(0x20BB7 + number), "tokens": 4, "rows": 3} for number in range(30)
        ],
        "cleaning": {"whitespace": 2345},
        "samples": {"train": samples, "valid": samples, "test": []},
    }


@pytest.fixture
def empty(report: dict[str, Any]) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "rows": {"read": 0, "kept": 0, "rejected": 0, "augmented": 0},
        "files": [],
        "splits": {},
        "checks": [],
        "spelled": [],
        "cleaning": {},
        "samples": {},
    }
    return report | nothing


class Page(HTMLParser):
    """The page's elements; a tag that is not closed where it should be is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str = "") -> str:
        return "".join(data for inside, data in self.texts if tag in ("", inside))


def test_a_full_report_has_every_section_in_order(report: dict[str, Any]) -> None:
    shown_page = Page(page(report))
    assert [section["id"] for section in shown_page.all("section")] == SECTIONS
    ids = [attributes["id"] for _, attributes in shown_page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert "models/tiny" in shown_page.text("title") and "models/tiny" in shown_page.text("span")


def test_an_empty_report_leaves_sections_out(empty: dict[str, Any]) -> None:
    shown_page = Page(page(empty))
    assert [section["id"] for section in shown_page.all("section")] == ["checks"]
    assert "Every row passed every check" in shown_page.text()
    assert "augmented" not in shown_page.text()


@pytest.mark.parametrize("kind", ["labels", "sources", "scripts", "lengths"])
def test_counts_without_rows_are_left_out(report: dict[str, Any], kind: str) -> None:
    for name, of in report["splits"].items():
        report["splits"][name] = of | {kind: type(of[kind])()}
    sections = [section["id"] for section in Page(page(report)).all("section")]
    assert sections == [name for name in SECTIONS if name != kind]


def test_figures_are_the_reports(report: dict[str, Any]) -> None:
    shown_page = Page(page(report))
    figures = shown_page.text("dd")
    for shown in ("11,100of 12,345 read", "1,24510.1% of those read", "77made", "566,100in 3"):
        assert shown in figures
    assert "39.2%222,000 tokens" in figures
    cells = shown_page.text("td")
    assert "10,0001,00010011,100" in cells  # rows of each split, and of all
    assert "50.550.550.5–" in cells
    assert "4,1204,1204,12012,360" in cells
    text = shown_page.text()
    assert "1,234 rows" in text and "1 row " in text
    assert "data/train.jsonl:17the same as data/train.jsonl:3" in text
    assert "2,34519.0%" in text
    assert "𠮷U+20BB74 tokens3 rows" in text and "6 more characters" in text
    assert "data/训练.jsonlcompletions12,34511,100" in text


def test_cut_rows_are_counted(report: dict[str, Any]) -> None:
    sentence = "3 rows are longer than 600 tokens; 4,120 tokens are cut off. 1 row loses its end"
    assert Page(page(report)).text().count(sentence) == 3
    report["splits"] = {"train": split(10, rows_cut=0, tokens_cut=0, ends_cut=0)}
    text = Page(page(report)).text()
    assert "Nothing is cut" in text and "longer than 600 tokens;" not in text


def test_plots_share_their_axes_and_mark_the_limit(report: dict[str, Any]) -> None:
    html = page(report)
    shown_page = Page(html)
    lines = [line for line in shown_page.all("line") if line.get("class") == "limit"]
    # 600 is a half into the second of two bins on an axis from 36 to 336.
    assert [line["x1"] for line in lines] == ["261.0"] * 3
    assert html.count(">80%</text>") == 0 and html.count(">100%</text>") == 3
    bars = [float(bar["height"] or 0) for bar in shown_page.all("rect")]
    assert bars[0] == pytest.approx(125 * 0.9997, abs=0.01)
    assert bars[1] == 2  # three rows of 10,000 are still seen
    assert bars[4] == pytest.approx(125 * 0.97, abs=0.01)
    assert "400 to 800 tokens: 3 rows, 3.0%" in shown_page.text("title")


@pytest.mark.parametrize(("limit", "arrow"), [(2048, "→"), (800, None), (0, None)])
def test_a_limit_beyond_the_plot_is_named(
    report: dict[str, Any], limit: int, arrow: str | None
) -> None:
    html = page(report | {"max_seq_length": limit})
    assert ("→" in html) == (arrow == "→")
    assert ('class="limit"' in html) == (arrow is None)
    assert html.count(f">max_seq_length {limit:,}") == 3


def test_every_plot_has_words(report: dict[str, Any]) -> None:
    shown_page = Page(page(report))
    drawn = shown_page.all("svg")
    assert len(drawn) == 3
    for plot, rows in zip(drawn, ("10,000", "1,000", "100"), strict=True):
        assert plot["role"] == "img"
        assert f"{rows} rows, the shortest of 12 tokens" in (plot["aria-label"] or "")
    tables = [table for table in shown_page.all("table") if table.get("class") == "bars"]
    ids = {heading.get("id") for heading in shown_page.all("h3")}
    assert len(tables) == 9
    assert all(table["aria-labelledby"] in ids for table in tables)


def test_long_tails_are_folded(report: dict[str, Any]) -> None:
    report["splits"]["test"]["sources"] = {"来源00": 3, "来源14": 1}
    text = Page(page(report)).text()
    assert "来源11" in text and "来源12" not in text
    assert text.count("others (3)") == 3
    assert text.count("others (3)18.7%261") == 2
    assert "others (3)25.0%1" in text  # in the order and under the names of all splits
    assert "来源010.0%0" in text


def test_nothing_comes_from_elsewhere(report: dict[str, Any]) -> None:
    html = page(report)
    assert not re.search(r"https?://|//[a-z]|@import|@font-face|\bsrc\s*=", html)
    assert not re.search(r"url\((?!#over\))", html)
    shown_page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in shown_page.tags}
    policies = [meta for meta in shown_page.all("meta") if "http-equiv" in meta]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def poison(value: Any, text: str) -> Any:
    """`value` with `text` before every string that a stranger may have written, keys too."""
    if isinstance(value, str):
        return text + value
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    if isinstance(value, dict):
        return {key: poison(item, text) for key, item in value.items()}
    return value


def test_rows_are_shown_and_never_run(report: dict[str, Any]) -> None:
    clean = [tag for tag, _ in Page(page(report)).tags]
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt;{{ 7 * 7 }}</style>"
    report = poison(report, evil)
    for of in report["splits"].values():
        for kind in ("labels", "sources", "scripts"):
            of[kind] = {evil + name: rows for name, rows in of[kind].items()}
    for kind in ("splits", "samples"):
        report[kind] = {evil + name: of for name, of in report[kind].items()}
    report["cleaning"] = {evil + name: rows for name, rows in report["cleaning"].items()}
    for check in report["checks"]:
        check["action"] = "skip"
    html = page(report)
    shown_page = Page(html)
    # One badge's legend fewer: two actions became one.
    assert [tag for tag, _ in shown_page.tags if tag not in ("li", "span")] == [
        tag for tag in clean if tag not in ("li", "span")
    ]
    assert not any(
        name.startswith("on") for _, attributes in shown_page.tags for name in attributes
    )
    assert "<script" not in html
    shown = shown_page.text()
    for after in ("models/tiny", "data/train.jsonl:1", "the same as", "星期八", "positive", "负面"):
        assert evil + after in shown
    assert evil + "whitespace" in shown and evil + "data/训练.jsonl" in shown


def test_samples_are_exact_and_marked(report: dict[str, Any]) -> None:
    html = page(report)
    row = html[html.index('<div class="row text"') :].split("</div>")[0]
    marked = row[row.index("<mark>") : row.index("</mark>")]
    assert re.sub("<.*?>", "", marked) == "星期八\n真的"
    assert re.sub("<.*?>", "", row) == "&lt;|user|&gt;\n月亮哪天最圆\n星期八\n真的\n"
    assert row.count('class="break"') == 4
    style = html[html.index("<style>") : html.index("</style>")]
    rule = re.search(r"^mark \{(.*)\}$", style, re.M)
    assert rule and "background:" in rule[1] and "underline" in rule[1]
    assert re.search(r"^\.text \{.*white-space: pre-wrap", style, re.M)


def test_characters_that_no_file_or_page_can_hold(report: dict[str, Any]) -> None:
    report["samples"]["train"][0]["pieces"] = [["一\ud83d二\r\n三\x00", True]]
    html = page(report)
    html.encode("utf-8")
    assert "一\\ud83d二␍" in html and "三␀</mark>" in html
    assert "\r" not in html and "\x00" not in html


@pytest.mark.parametrize("key", ["model", "rows", "checks", "cleaning", "samples"])
def test_a_report_that_lacks_something_is_an_error(report: dict[str, Any], key: str) -> None:
    del report[key]
    with pytest.raises(UndefinedError, match=key):
        page(report)


def test_a_figure_that_is_lacking_is_an_error(report: dict[str, Any]) -> None:
    del report["rows"]["rejected"]
    with pytest.raises(UndefinedError, match="rejected"):
        page(report)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(empty: dict[str, Any], scheme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    blocks = re.findall(r":root \{(.*?)\}", page(empty), re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme == "dark"]))
    pairs = [(front, back) for front in ("ink", "soft") for back in ("paper", "wash", "mark")]
    for front, back in [*pairs, ("accent", "paper"), ("paper", "ink")]:
        low, high = sorted(luminance(colours[name]) for name in (front, back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)
