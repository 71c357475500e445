"""Encodings of text files: UTF-8, or UTF-16, UTF-32 and GB18030 where that is beyond doubt.

A file that is not UTF-8 is read in another encoding only if all of it decodes, and only if
  - it begins with that encoding's mark; or
  - it has NUL bytes, which no text has, and as UTF-16 or UTF-32 it has none, no unassigned
    characters, and at least one ASCII character in twenty; or
  - as GB18030, at least nine in ten of its characters beyond ASCII are Chinese punctuation or among
    the 3,755 of GB 2312's first level, and four in ten of those are among the most common ones.
Latin-1, Big5, Shift-JIS, EUC-JP and EUC-KR fail the last: their bytes, where GB18030 decodes them
at all, are rare characters of it.
"""

import unicodedata
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterator

# The mark at a file's start, and its codec; UTF-32's begins with UTF-16's. UTF-8's is a check of
# its own.
MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\x84\x31\x95\x33": "gb18030",
}
# The names that people and iconv know.
NAMES = {
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
    "gb18030": "GB18030",
}
# Characters beyond this many do not change the answer.
MOST_COUNTED = 4_000_000

COMMON = frozenset(
    "的一是了不在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
    "美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
    "解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件"
    "计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象"
    "完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔答案吗呢"
    "请谁哪怎吧啊字句语言词写读六七八九百千半快慢红黑早晚买卖钱吃喝饭车站远近钟错"
)

Blocks = Callable[[], Iterator[bytes]]


def of_mark(start: bytes) -> str | None:
    """Return the codec whose mark a file begins with; None without one."""
    return next((codec for mark, codec in MARKS.items() if start.startswith(mark)), None)


def detect(blocks: Blocks, mark: str | None, nulls: int) -> str | None:
    """Return the codec that a file which is not UTF-8 is in beyond doubt; None if there is none.

    `mark` is the codec of its mark, if it has one; `nulls` the number of its NUL bytes.
    """
    if mark is not None:
        return mark if _characters(blocks, mark) is not None else None
    if nulls:
        wide = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        return next((codec for codec in wide if _is_wide(_characters(blocks, codec))), None)
    return "gb18030" if _is_chinese(_characters(blocks, "gb18030")) else None


def _characters(blocks: Blocks, codec: str) -> Counter[str] | None:
    """Return the counts of a file's characters; None where it does not decode."""
    decoder = getincrementaldecoder(codec)()
    counts: Counter[str] = Counter()
    counted = 0
    try:
        for block in blocks():
            text = decoder.decode(block)
            if counted < MOST_COUNTED:
                counts.update(text)
                counted += len(text)
        counts.update(decoder.decode(b"", True))
    except UnicodeError:
        return None
    return counts


def _is_wide(counts: Counter[str] | None) -> bool:
    if not counts:
        return False
    if any(unicodedata.category(c) in ("Cn", "Co", "Cc") for c in counts if c not in "\t\r\n"):
        return False
    ascii = sum(count for character, count in counts.items() if character.isascii())
    return 20 * ascii >= counts.total()


def _is_chinese(counts: Counter[str] | None) -> bool:
    if counts is None:
        return False
    levels: Counter[str] = Counter()
    for character, count in counts.items():
        if not character.isascii():
            levels[_level(character)] += count
    known = levels["common"] + levels["first"]
    return (
        10 * (known + levels["punctuation"]) >= 9 * levels.total()
        and known > 0
        and 10 * levels["common"] >= 4 * known
    )


def _level(character: str) -> str:
    """Return a character's place in GB 2312: common, first (level), punctuation, or other."""
    if character in COMMON:
        return "common"
    try:
        lead = character.encode("gb2312")[0]
    except UnicodeEncodeError:
        return "other"
    if 0xB0 <= lead <= 0xD7:
        return "first"
    return "punctuation" if lead in (0xA1, 0xA3) else "other"
