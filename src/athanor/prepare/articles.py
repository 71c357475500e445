"""Articles in Markdown, cut into pieces of a few paragraphs that carry their title and section.

Lines are taken as written, not rendered again. Paragraphs and lists that are too long are cut;
code, tables and HTML stay whole.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from athanor.prepare.records import exceeds

# Blocks alone: inside them only headings are read, and inline parsing takes a hundred times longer.
_BLOCKS = MarkdownIt("commonmark").enable("table").disable(["inline", "text_join"])
_INLINE = MarkdownIt("commonmark")
# A block takes up to 0.1 ms, and may be a line.
MOST_LINES = 100_000
_LONGEST_TOKEN = 500
# No heading is meant to be longer.
_LONGEST_HEADING = 2000
_WHOLE = {"fence", "code_block", "html_block", "table_open"}
_NESTS = {"bullet_list_open", "ordered_list_open", "list_item_open", "blockquote_open"}
# As in Pandoc: a rule with an empty line below it opens no front matter.
_FRONT = re.compile(r"\A---[ \t]*\n(?![ \t]*\n)(?P<yaml>.*?)^---[ \t]*$", re.M | re.S)
_COMMENT = re.compile(r"<!--(?:-?>|.*?(?:-->|\Z))", re.S)

# Not cut while there is another place: code, links, tags, URLs, list markers.
_TOGETHER = r"""
    (?<!`)(?P<ticks>`++)(?s:.*?)(?<!`)(?P=ticks)(?!`)
  | \[(?:[^\[\]]++|\[[^\[\]]*+\])*+\](?:\((?:[^()]++|\([^()]*+\))*+\)|\[[^\[\]]*+\])
  | </?[A-Za-z][^<>]*+>
  | https?://[!-~]*[/\w]
  | ^(?:[ \t]*+(?:\d{1,9}[.)]|[-*+>]))++[ \t]*+
"""
# Dots that end no sentence are matched as well, so that a long run of them is read once.
_SENTENCES = rf"""{_TOGETHER}
  | \b(?:(?i:e\.g|i\.e|cf|vs)|Mrs?|Ms|Drs?|Profs?|St|Figs?|[A-Z])\.
  | (?P<cut>[。！？；…]++[”’」』）】》]*+ | [.!?]++["'”’)\]*_]*+(?=\s))
  | [.!?]++["'”’)\]*_]*+
"""
_CLAUSES = r"(?P<cut>\s++ | [，、；：] | ,(?!\d))"
_CUTS = tuple(
    re.compile(pattern, re.M | re.X)
    for pattern in (
        _SENTENCES,
        rf"{_TOGETHER} | (?P<cut>\n)",
        f"{_TOGETHER} | {_CLAUSES}",
        _CLAUSES,
    )
)
# Not \X of `regex`: it takes quadratic time for a run of flags, and splits pairs of surrogates.
_CHARACTER = re.compile("[\U0001f1e6-\U0001f1ff]{2}|[\ud800-\udbff][\udc00-\udfff]|.", re.S)

_BLANK = re.compile(r"\n[ \t\r]*\n")
_PARAGRAPH = re.compile(r"\S(?:[^\n]|\n(?![ \t]*(?:\n|\Z)))*")

_Span = tuple[int, int]  # the first character, and the one behind the last
_Part = tuple[str, int, int]  # the text between it and the part before it, and its span
_Fits = Callable[[int, int], bool]
_Section = tuple[tuple[str, ...], list[list[Token]]]  # its path, its blocks


@dataclass(frozen=True)
class Piece:
    """A piece of an article."""

    line: int  # the piece's first line in the file, from 1
    path: tuple[str, ...]  # the article's title, then the headings above the piece, as plain text
    text: str  # Markdown, as written


def pieces(text: str, *, name: str, count: Callable[[str], int], budget: int) -> Iterator[Piece]:
    """Yield the pieces of an article in order; a blank line separates the blocks of a piece.

    Headings, front matter, comments, rules (`***`) and link definitions are left out.

    Args:
        text: The article; any string.
        name: The title of an article without one: its file's name without the suffix.
        count: A function from a text to its number of tokens; called a few times for each part.
        budget: The most tokens of a piece. A code block, table or HTML block may have more, alone
            in its piece, and so may a single character.
    """
    text = re.sub(r"\r\n?", "\n", text.removeprefix("\ufeff"))
    title, text = _front(text)
    offsets = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))

    def fits(start: int, end: int) -> bool:
        # A long text need not be read to know: no token is so long on average.
        return end - start <= _LONGEST_TOKEN * budget and count(text[start:end]) <= budget

    # The parser can not encode a lone surrogate in a link; the lines themselves keep it.
    links: dict[str, Any] = {}
    tokens = _BLOCKS.parse(re.sub("[\ud800-\udfff]", "\ufffd", text), links)
    for path, blocks in _sections(_groups(tokens), title or name, links):
        parts: list[_Part] = []
        for block in blocks:
            first, last = block[0].map or (0, 0)
            before = -1
            for start, end in _spans(text, block, offsets[first], offsets[last], offsets, fits):
                parts.append(("\n\n" if before < 0 else text[before:start], start, end))
                before = end
        for first, last in _packed(text, parts, count, budget):
            line = bisect_right(offsets, parts[first][1])
            yield Piece(line, path, _joined(text, parts[first:last]))


def large_paragraph(text: str, limit: int) -> int | None:
    """Return the line of a paragraph that `exceeds` the limit; None without one."""
    if not exceeds(text, limit):
        return None
    start = 0
    for match in _BLANK.finditer(text):
        if exceeds(text[start : match.start()], limit):
            break
        start = match.end()
    else:
        if not exceeds(text[start:], limit):
            return None
    return text.count("\n", 0, start) + 1


def plain_pieces(
    text: str, *, name: str, count: Callable[[str], int], budget: int
) -> Iterator[Piece]:
    """Yield the pieces of a plain text, as `pieces` does: blank lines separate its paragraphs."""
    text = re.sub(r"\r\n?", "\n", text)
    offsets = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))

    def fits(start: int, end: int) -> bool:
        # A long text need not be read to know: no token is so long on average.
        return end - start <= _LONGEST_TOKEN * budget and count(text[start:end]) <= budget

    parts: list[_Part] = []
    for match in _PARAGRAPH.finditer(text):
        before = -1
        for start, end in _cut(text, match.start(), match.end(), _CUTS, fits):
            parts.append(("\n\n" if before < 0 else text[before:start], start, end))
            before = end
    for first, last in _packed(text, parts, count, budget):
        line = bisect_right(offsets, parts[first][1])
        yield Piece(line, (name,), _joined(text, parts[first:last]))


def _front(text: str) -> tuple[str, str]:
    """Return the front matter's title, or "", and the text with empty lines in its place."""
    match = _FRONT.match(text)
    if not match:
        return "", text
    try:
        # All values as written: `title: 1984` is no number, `title: No` no boolean.
        values = yaml.load(match["yaml"], yaml.BaseLoader)  # constructs text, lists and dicts only
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        values = {}
    if values and not isinstance(values, dict):  # prose between two rules
        return "", text
    title = values.get("title") if values else None
    title = " ".join(title.split()) if isinstance(title, str) else ""
    return title, "\n" * match[0].count("\n") + text[match.end() :]


def _groups(tokens: Sequence[Token]) -> list[list[Token]]:
    """Return the outermost blocks of these tokens, each with all of its tokens."""
    groups: list[list[Token]] = []
    for token in tokens:
        if token.level == tokens[0].level and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    return groups


def _sections(groups: list[list[Token]], title: str, links: dict[str, Any]) -> Iterator[_Section]:
    """Yield the article's sections, including those without a block of text.

    `links` has the definitions of links, as the parser of blocks found them.
    """
    headings: list[tuple[int, str]] = []
    blocks: list[list[Token]] = []
    begun = False
    for group in groups:
        token = group[0]
        comment = token.type == "html_block" and not _COMMENT.sub("", token.content).strip()
        if comment or token.type == "hr":
            continue
        if token.type == "heading_open":
            yield (title, *(heading for _, heading in headings)), blocks
            level, heading, blocks = int(token.tag[1]), _plain(group[1].content, links), []
            if level == 1 and not begun:
                title = heading or title
            headings = [above for above in headings if above[0] < level]
            if heading and (level, heading) != (1, title):
                headings.append((level, heading))
        else:
            blocks.append(group)
        begun = True
    yield (title, *(heading for _, heading in headings)), blocks


def _plain(heading: str, links: dict[str, Any]) -> str:
    [inline] = _INLINE.parseInline(heading[:_LONGEST_HEADING], links)
    words = (
        token.content
        if token.type in ("text", "code_inline", "image")
        else " " * ("break" in token.type)
        for token in inline.children or []
    )
    return " ".join("".join(words).split())


def _spans(
    text: str, block: list[Token], start: int, end: int, offsets: list[int], fits: _Fits
) -> Iterator[_Span]:
    """Yield a block where it fits or must stay whole, else its inner blocks or sentences."""
    end = start + len(text[start:end].rstrip())
    inner = _groups(block[1:-1]) if block[0].type in _NESTS else []
    if start == end:
        return
    if fits(start, end) or block[0].type in _WHOLE:
        yield start, end
    elif inner:
        # From start to start, so that text between and before blocks is kept.
        starts = [start, *(offsets[(group[0].map or (0,))[0]] for group in inner[1:]), end]
        for group, (first, last) in zip(inner, pairwise(starts), strict=True):
            yield from _spans(text, group, first, last, offsets, fits)
    else:
        yield from _cut(text, start, end, _CUTS, fits)


def _cut(
    text: str, start: int, end: int, cuts: tuple[re.Pattern[str], ...], fits: _Fits
) -> Iterator[_Span]:
    """Yield parts of prose, cut at the first kind of place that makes them fit."""
    part = text[start:end].strip()
    start += text[start:end].index(part)
    end = start + len(part)
    if not part or fits(start, end):
        yield from [(start, end)] if part else []
    elif not cuts:
        yield from _hard(text, start, end, fits)
    else:
        ends = (match.end() for match in cuts[0].finditer(part) if match["cut"])
        places = [0, *(at for at in ends if at < len(part) and not _extends(part[at])), len(part)]
        for first, last in pairwise(places):
            yield from _cut(text, start + first, start + last, cuts[1:], fits)


def _hard(text: str, start: int, end: int, fits: _Fits) -> Iterator[_Span]:
    """Yield the longest parts that fit, cut between grapheme clusters."""
    places: list[int] = []
    for match in _CHARACTER.finditer(text, start, end):
        at = match.start()
        if at == start or not (_extends(text[at]) or text[at - 1] == "\u200d"):
            places.append(at)
    places.append(end)
    first, size = 0, 1  # of the piece before, which the next one is like
    while (rest := len(places) - 1 - first) > 0:
        begin = first

        def exceeds_budget(count: int, begin: int = begin, rest: int = rest) -> bool:
            return count > rest or not fits(places[begin], places[begin + count])

        low = high = size
        step = 1
        if exceeds_budget(size):
            low = max(size - step, 0)
            while low and exceeds_budget(low):
                high, step = low, 2 * step
                low = max(low - step, 0)
        else:
            high = low + step
            while not exceeds_budget(high):
                low, step = high, 2 * step
                high = low + step
        size = max(low + bisect_right(range(low + 1, high), False, key=exceeds_budget), 1)
        first += size
        if not text[places[begin] : places[first]].isspace():
            yield places[begin], places[first]


def _extends(character: str) -> bool:
    """Return True for accents, joiners, skin tones, Hangul vowels: they extend the one before."""
    return (
        unicodedata.category(character).startswith("M")
        or character == "\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or "\u1160" <= character <= "\u11ff"
    )


def _packed(
    text: str, parts: list[_Part], count: Callable[[str], int], budget: int
) -> Iterator[_Span]:
    """Yield the parts of each piece, as the numbers of its first and of the one behind its last."""
    costs = [count(gap + text[start:end]) for gap, start, end in parts]
    first = 0
    while first < len(parts):
        total, last = count(_joined(text, parts[first : first + 1])), first + 1
        while last < len(parts) and (total := total + costs[last]) <= budget:
            last += 1
        # The tokens of parts do not add up exactly.
        if last - first > 1 and count(_joined(text, parts[first:last])) > budget:
            begin, ends = first, range(first + 1, last)
            fitting = bisect_right(
                ends[1:], False, key=lambda at: count(_joined(text, parts[begin:at])) > budget
            )
            last = ends[fitting]
        yield first, last
        first = last


def _joined(text: str, parts: list[_Part]) -> str:
    return "".join(gap + text[start:end] for gap, start, end in parts).removeprefix(parts[0][0])
