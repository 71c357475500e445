"""Articles are cut into pieces: at the right places, with the right path, and without a loss."""

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from athanor.prepare.articles import Piece, pieces


def cut(text: str, budget: int = 1000, name: str = "file") -> list[Piece]:
    """The pieces with one token a character."""
    return list(pieces(text, name=name, count=len, budget=budget))


def texts(text: str, budget: int) -> list[str]:
    return [piece.text for piece in cut(text, budget)]


def bare(text: str) -> str:
    return "".join(text.split())


def words(text: str) -> int:
    """A number of tokens that does not add up: a space belongs to the word after it."""
    return len(re.findall(r" ?[A-Za-z]{1,5}|\s+|[^\sA-Za-z]", text))


def test_a_piece_knows_its_line_and_path() -> None:
    text = (
        "# 炼丹 *炉*\n\n导言。\n\n## `Rows` & [files](x.md)\n\nA row.\n\n"
        "### 三\n\n四\n\n## End\n\nFive."
    )
    assert cut(text) == [
        Piece(3, ("炼丹 炉",), "导言。"),
        Piece(7, ("炼丹 炉", "Rows & files"), "A row."),
        Piece(11, ("炼丹 炉", "Rows & files", "三"), "四"),
        Piece(15, ("炼丹 炉", "End"), "Five."),
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("text", ("file",)),
        ("<!-- by me -->\n\nTitle\n=====\n\ntext", ("Title",)),
        ("# \n\ntext", ("file",)),
        ("# A\n\n# B\n\ntext", ("A", "B")),
        ("## A\n\n# B\n\ntext", ("file", "B")),
        ("![badge](b.svg)\n\n# A\n\ntext", ("file", "A")),
        ("### A\n\n## B\n\n#### C\n\ntext", ("file", "B", "C")),
        ("---\ntitle: 'A  b'\ntags: [x]\n---\ntext", ("A b",)),
        ("---\ntitle: A\n---\n\n# B\n\ntext", ("B",)),
        ("---\ntitle: A\n---\n\n![badge](b.svg)\n\n# A\n\n## C\n\ntext", ("A", "C")),
        ("---\ntitle: 1984\n---\ntext", ("1984",)),
        ("---\ntitle: [A]\n---\ntext", ("file",)),
        ("---\ntitle: [A\n---\ntext", ("file",)),
        ('---\ntitle: "\\UFFFFFFFF"\n---\ntext', ("file",)),
        ("---\n---\ntext", ("file",)),
        ("\ufeff---\r\ntitle: A\r\n---\r\ntext\r\n", ("A",)),
    ],
)
def test_the_path(text: str, path: tuple[str, ...]) -> None:
    last = cut(text)[-1]
    assert (last.path, last.text) == (path, "text")
    assert last.line == len(text.splitlines())


def test_rules_open_no_front_matter_around_prose() -> None:
    assert texts("---\n\nNote: prose\n\n---\n\nmore", 1000) == ["Note: prose\n\nmore"]
    assert texts("---\nprose\n\n---\n\nmore", 1000) == ["prose\n\nmore"]


@pytest.mark.parametrize(
    "text", ["", " \n\t\n", "# A\n\n## B\n", "<!-- a\n\nb -->\n", "***\n", "---\ntitle: A\n---\n"]
)
def test_headings_comments_and_rules_are_left_out(text: str) -> None:
    assert cut(text) == []


def test_a_comment_in_code_is_text() -> None:
    assert texts("```\n<!-- a -->\n```", 1000) == ["```\n<!-- a -->\n```"]


def test_blocks_are_packed_up_to_the_budget() -> None:
    text = "1234\n\n\n\n<!-- no text -->\n678\n\nabcd\n"
    assert texts(text, 15) == ["1234\n\n678\n\nabcd"]
    assert texts(text, 14) == ["1234\n\n678", "abcd"]
    assert [piece.line for piece in cut(text, 8)] == [1, 6, 8]


def test_sections_are_not_packed_together() -> None:
    assert texts("a\n\n# B\n\nb\n\n# C\n\nc", 1000) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "block",
    [
        "```python\nx = 1. \n\n\ny = 2. \n```",
        "~~~\nnever closed. Here",
        "    indented. Code\n\n    more. Code",
        "| a | b |\n|---|---|\n| one. Two | 三。四 |",
        "<div>\none. Two\n</div>",
    ],
)
def test_code_tables_and_html_stay_whole_as_written(block: str) -> None:
    assert texts(f"before\n\n{block}", 10) == ["before", block]
    assert texts(f"before\n\n{block}", 1000) == [f"before\n\n{block}"]


def test_text_after_a_block_above_the_budget_is_a_piece_of_its_own() -> None:
    assert texts("a\n\n```\n0123456789\n```\n\nb", 8) == ["a", "```\n0123456789\n```", "b"]


@pytest.mark.parametrize(
    ("text", "budget", "cuts"),
    [
        ("今天下雨。明天晴！后天呢？", 7, ["今天下雨。", "明天晴！", "后天呢？"]),
        ("他说：“走吧。”我们走了；到家……", 10, ["他说：“走吧。”", "我们走了；到家……"]),
        ("（见上文。）下文", 6, ["（见上文。）", "下文"]),
        ("He left. She stayed! Why?", 15, ["He left.", "She stayed!", "Why?"]),
        ('"He left." She stayed.', 12, ['"He left."', "She stayed."]),
        ("Pi is 3.14 or so. Next.", 18, ["Pi is 3.14 or so.", "Next."]),
        ("One. See Dr. Li.", 13, ["One.", "See Dr. Li."]),
        ("One. So, e.g. me.", 14, ["One.", "So, e.g. me."]),
        ("One. J. Wu left.", 12, ["One.", "J. Wu left."]),
        ("v1.2.3 is out. Next", 14, ["v1.2.3 is out.", "Next"]),
        ("See `a. b`. Next one", 12, ["See `a. b`.", "Next one"]),
        ("见[甲。乙](u)。下一句", 11, ["见[甲。乙](u)。", "下一句"]),
        ("See https://x.com/a,b. Next one", 22, ["See https://x.com/a,b.", "Next one"]),
        ("go https://x.com/a,b", 19, ["go", "https://x.com/a,b"]),
        ("床前，明月光\n疑是，地上霜", 10, ["床前，明月光", "疑是，地上霜"]),
        ("one, two\nthree. Four", 15, ["one, two\nthree.", "Four"]),
        ("很长的，没有句号、的句子", 10, ["很长的，没有句号、", "的句子"]),
        ("one two three four", 8, ["one two", "three", "four"]),
        ("pay 1,000,000", 9, ["pay", "1,000,000"]),
        ("now,then", 5, ["now,", "then"]),
        ("无标点的句子", 4, ["无标点的", "句子"]),
        ("`a b c d e f`", 7, ["`a b c", "d e f`"]),
        ("11. one", 5, ["11.", "one"]),
        (">\n> one\n>\n> two", 9, [">\n> one\n>", "> two"]),
        ("> one two.\n> Three four.", 12, ["> one two.", "> Three", "four."]),
    ],
)
def test_prose_is_cut_at_the_best_place_that_fits(text: str, budget: int, cuts: list[str]) -> None:
    assert texts(text, budget) == cuts


def test_grapheme_clusters_are_never_cut() -> None:
    seen = [
        "e\u0301",
        "👩\u200d👩\u200d👧",
        "👍🏽",
        "🇨🇳",
        "🇩🇪",
        "\u1100\u1161\u11a8",
        "\ud83d\ude00",
    ]
    assert texts("".join(seen), 1) == seen
    assert texts("".join(seen), 7) == [
        "e\u0301👩\u200d👩\u200d👧",
        "👍🏽🇨🇳🇩🇪",
        "\u1100\u1161\u11a8\ud83d\ude00",
    ]


def test_an_accent_on_a_space_stays_there() -> None:
    assert texts("ab \u0301cd", 4) == ["ab \u0301", "cd"]
    assert texts("- \t\u0301", 1) == ["-", "\t\u0301"]


def test_half_a_character_in_a_link_is_kept() -> None:
    text = "[a](\ud83d) [b](\ud83d\ude00)"
    assert texts(text, 1000) == [text]


def test_lists_are_cut_between_items_and_items_between_their_blocks() -> None:
    text = (
        "甲\n\n- one\n- two\n\n  - three four\n  - five six\n\n  ```\n  code. code\n  ```\n1. end"
    )
    assert texts(text, 1000) == [text.replace("```\n1.", "```\n\n1.")]
    assert texts(text, 16) == [
        "甲\n\n- one\n- two",
        "  - three four",
        "  - five six",
        "  ```\n  code. code\n  ```",
        "1. end",
    ]
    assert [piece.line for piece in cut(text, 16)] == [1, 6, 7, 9, 12]


def test_a_later_part_of_a_paragraph_has_its_own_line() -> None:
    text = "# T\n\nOne.\nTwo three.\nFour,\nfive six\nseven.\n"
    assert [(piece.line, piece.text) for piece in cut(text, 11)] == [
        (3, "One."),
        (4, "Two three."),
        (5, "Four,"),
        (6, "five six"),
        (7, "seven."),
    ]


def test_every_line_end_is_one() -> None:
    text = "# T\n\nOne.\nTwo.\n\n```\na\n\nb\n```\n"
    for end in ("\r\n", "\r"):
        assert cut(text.replace("\n", end)) == cut(text)


def test_tokens_that_do_not_add_up_stay_within_the_budget() -> None:
    def count(text: str) -> int:
        return len(text) + text.count(". ") * 5

    texts = [p.text for p in pieces("Aa. Bb. Cc. Dd. Ee.", name="", count=count, budget=15)]
    assert texts == ["Aa. Bb.", "Cc. Dd.", "Ee."]


# Everything that cuts look at, and what Markdown nests.
FRAGMENTS = (
    "# ;## ;- ;1. ;> ;    ;```;~~~;\n;\n\n;\r\n;---;***;<!--;-->;<div>;`;``;[a](;[a]: b;](;);[;];"
    "**;|;| a | b |\n|---|---|\n;\\;&amp;!;. ;.;。;，;……;”;e.g. ;3.14;https://x.com/a.b;one two;"
    "今天;\t;\u3000;\u0301;\u200d;👍🏽;🇨🇳;\ud83d;\ude00;\x00;\x0c;\x85;\u2028;title: ;===;\ufeff"
)
MARKDOWN = st.lists(st.sampled_from(FRAGMENTS.split(";")), max_size=60).map("".join)
COUNTS: st.SearchStrategy[Callable[[str], int]] = st.sampled_from([len, words])
FUZZED = settings(max_examples=200, deadline=None, derandomize=True)
ANYTHING = st.one_of(MARKDOWN, st.text(st.characters()), st.text("[]()<>`*_-#>|:\n \t.!a"))


def blocks(text: str) -> list[tuple[str, str]]:
    """The kind and the lines of each block that is text, if no front matter is above."""
    lines = text.split("\n")
    blocks = []
    safe = re.sub("[\ud800-\udfff]", "?", text)
    for token in MarkdownIt("commonmark").enable("table").parse(safe):
        if token.level == 0 and token.map and token.type not in ("heading_open", "hr"):
            source = "\n".join(lines[slice(*token.map)])
            comment = re.sub(r"<!--(?:-?>|.*?(?:-->|\Z))", "", source, flags=re.S).strip() == ""
            if token.type != "html_block" or not comment:
                blocks.append((token.type, source))
    return blocks


@FUZZED
@given(ANYTHING, st.sampled_from([0, 1, 5, 20, 1000]), COUNTS)
def test_no_text_is_lost_or_doubled(text: str, budget: int, count: Callable[[str], int]) -> None:
    text = re.sub("\r\n?", "\n", f"<!-- no front matter -->\n\n{text}")
    cut_pieces = list(pieces(text, name="file", count=count, budget=budget))
    assert bare("".join(piece.text for piece in cut_pieces)) == bare(
        "".join(source for _, source in blocks(text))
    )
    lines = text.split("\n")
    for piece in cut_pieces:
        assert piece.text.strip()
        assert piece.text.split("\n")[0] in lines[piece.line - 1]
    assert [piece.line for piece in cut_pieces] == sorted(piece.line for piece in cut_pieces)


@FUZZED
@given(ANYTHING, st.integers(0, 40))
def test_no_text_is_refused(text: str, budget: int) -> None:
    for front in ("", "---\n", "---\ntitle: "):
        for piece in cut(front + text + "\n---\ntext", budget):
            assert all(piece.path)


SENTENCES = st.lists(
    st.sampled_from(
        ["今天，下雨了。", "He left, at 3.14 p.m. today. ", "`a b`", "一二三四五", "x\n"]
    ),
    min_size=1,
    max_size=30,
).map("".join)


@FUZZED
@given(st.lists(SENTENCES, max_size=6), st.integers(8, 60), COUNTS)
def test_prose_never_exceeds_the_budget(
    paragraphs: list[str], budget: int, count: Callable[[str], int]
) -> None:
    text = "\n\n".join(paragraphs)
    parts = [piece.text for piece in pieces(text, name="file", count=count, budget=budget)]
    assert bare("".join(parts)) == bare(text)
    assert all(count(piece) <= budget for piece in parts)


@pytest.mark.parametrize(
    "part",
    ["One two. ", "今天，下雨。", "字", "- item\n", "A par.\n\n", "[", "`a``b", ". ", "....", "🇨"],
)
def test_the_work_is_about_linear_in_the_length(part: str) -> None:
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text)

    text = part * (100_000 // len(part))
    began = time.process_time()
    cut_pieces = list(pieces(text, name="file", count=count, budget=200))
    assert max(len(piece.text) for piece in cut_pieces) <= 200
    assert counted < 30 * len(text)
    assert time.process_time() - began < 4
