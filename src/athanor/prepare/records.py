"""Records: rows as they were written in a file, before any format is known."""

from dataclasses import dataclass, field
from typing import Any

from athanor.prepare.checks import Fault

BOM = b"\xef\xbb\xbf"
NOT_UTF8 = "bytes that are not UTF-8; save the file as UTF-8"


@dataclass(slots=True)
class Record:
    """A row as it was written: its parsed value, or its text if it can't be parsed.

    `line` counts from 1: lines in text files, rows in Parquet. `fixed` holds the mended faults;
    `size` is about its number of bytes, 0 for a small one.
    """

    path: str
    line: int
    value: Any
    faults: list[Fault] = field(default_factory=list)
    fixed: list[Fault] = field(default_factory=list)
    size: int = 0

    @property
    def where(self) -> str:
        """The record's place, as editors and compilers write it."""
        return f"{self.path}:{self.line}"


def strip_mark(data: bytes, fixes: frozenset[str]) -> tuple[bytes, list[Fault], list[Fault]]:
    """Return a file's first bytes without a byte order mark; that fault, open or mended."""
    if not data.startswith(BOM):
        return data, [], []
    mark = Fault(
        "byte_order_mark", "the file starts with a byte order mark; save it as UTF-8 without one"
    )
    is_mended = mark.name in fixes
    return data[len(BOM) :], [] if is_mended else [mark], [mark] if is_mended else []


def without_filled_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Arrow's without the nulls inside it that its schema asks for.

    A struct has every field of its column, null where the row has none. Columns of the row itself
    and items of lists stay.
    """
    if not any(isinstance(item, dict | list) for item in value.values()):
        return value
    return {key: _strip(item) for key, item in value.items()}


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_strip(item) for item in value]
    return value


def is_utf8(text: str) -> bool:
    """Return False for a text with lone surrogates: bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def exceeds(text: str, limit: int) -> bool:
    """Return True for a text of more than `limit` bytes in UTF-8."""
    if 4 * len(text) <= limit:  # no character takes more bytes
        return False
    return len(text) > limit or len(text.encode(errors="surrogatepass")) > limit
