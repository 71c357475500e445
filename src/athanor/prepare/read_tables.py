"""Records of tables: CSV, TSV, the first sheet of a workbook, and data sets of Hugging Face.

A table's first row that is not empty is its header. Empty rows, and empty cells under no name, as
spreadsheets have them at their edges, are left out.
"""

import csv
import re
import sys
from collections.abc import Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import IO, Any

from athanor.errors import UserError
from athanor.prepare.checks import Fault
from athanor.prepare.records import BOM, NOT_UTF8, Record, exceeds, is_utf8, strip_mark
from athanor.prepare.streams import read_lines, row_too_large

DELIMITERS = (",", ";", "\t", "|")
# Excel's own first line, which names the separator.
SEPARATOR = re.compile(r"sep=([,;\t|])\s*")


class Header:
    """The columns of a table."""

    def __init__(self, cells: list[str]) -> None:
        """Take the names of the columns.

        Raises:
            Fault: for a name that two columns have.
        """
        self.names = _trimmed([cell.strip() for cell in cells])
        named = [name for name in self.names if name]
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise Fault("unreadable_file", f"the header names a column twice: {twice!r}")
        self._all_named = len(named) == len(self.names)

    def row(self, cells: list[str]) -> dict[str, str]:
        """Return a row's cells by their columns' names.

        Raises:
            Fault: for a row that does not match the header.
        """
        width = len(self.names)
        if len(cells) == width and self._all_named:
            return dict(zip(self.names, cells, strict=True))
        if len(cells) < width or (len(cells) > width and len(_trimmed(cells)) > width):
            raise Fault("wrong_columns", f"{len(cells)} cells, but the header has {width}")
        pairs = [
            (name, cell)
            for name, cell in zip(self.names, cells, strict=False)
            if name or cell.strip()
        ]
        if len(pairs) > len(values := dict(pairs)):
            raise Fault("wrong_columns", "several cells in columns without a name")
        return values


def _trimmed(cells: list[str]) -> list[str]:
    """Return cells without the empty ones at the end."""
    end = len(cells)
    while end and not cells[end - 1].strip():
        end -= 1
    return cells[:end]


class _RowTooLarge(Exception):
    """A row of CSV that has more bytes than a row may have; its end has been passed."""


class _Lines:
    """The lines of a CSV file as texts; `since` has those since the last record."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._lines = read_lines(file, limit)
        self._limit = limit
        self.number = 0
        self.since: list[str] = []

    def __iter__(self) -> Iterator[str]:
        size = 0
        for data in self._lines:
            self.number += 1
            # Bytes that are not UTF-8 become lone surrogates, which are looked for in each row.
            line = data.removeprefix(BOM).decode(errors="surrogateescape")
            size = len(data) if not self.since else size + len(data)
            self.since.append(line)
            if size > self._limit:
                self._pass_row()
                raise _RowTooLarge
            yield line

    def _pass_row(self) -> None:
        """Read on to the line that ends the row: the one behind which no quote is open."""
        is_open = sum(line.count('"') for line in self.since) % 2
        while is_open and (data := next(self._lines, None)) is not None:
            self.number += 1
            is_open = (is_open + data.count(b'"')) % 2


def read_csv(
    file: IO[bytes], name: str, limit: int, delimiter: str, fixes: frozenset[str]
) -> Iterator[Record]:
    """Yield the rows of a CSV file below its header; `fixes` names the faults that are mended.

    Args:
        file: The file, in UTF-8.
        name: The file's name in records.
        limit: The most bytes of a row.
        delimiter: What its columns should be separated by; a header without one tells another.
        fixes: The names of the faults to mend.
    """
    csv.field_size_limit(sys.maxsize)
    _, faults, fixed = strip_mark(file.peek(len(BOM))[: len(BOM)], fixes)  # type: ignore[attr-defined]
    if faults:
        yield Record(name, 1, None, faults)
    lines = _Lines(file, limit)
    header: Header | None = None
    reader = csv.reader(iter(lines), strict=True, delimiter=delimiter)
    while True:
        line = lines.number + 1
        lines.since.clear()
        cells = None
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not any(map(str.strip, cells)):
                continue
            if not is_utf8("".join(cells)):
                raise Fault("invalid_utf8", NOT_UTF8)
            if header is not None:
                size = sum(map(len, cells))
                yield Record(name, line, header.row(cells), [], fixed, size)
                fixed = []
                continue
            if (stated := SEPARATOR.fullmatch("".join(lines.since))) is not None:
                reader = csv.reader(iter(lines), strict=True, delimiter=stated[1])
                continue
            if (other := _other_delimiter(cells)) is not None:
                text = f"the columns are separated by {other!r}; save the file with commas"
                if "delimiter" not in fixes:
                    raise Fault("delimiter", text)
                fixed = [*fixed, Fault("delimiter", text)]
                reader = csv.reader(iter(lines), strict=True, delimiter=other)
                cells = next(csv.reader(list(lines.since), strict=True, delimiter=other))
            header = Header(cells)
        except (Fault, _RowTooLarge, csv.Error) as error:
            fault = _fault_of_lines(error, len(lines.since), limit)
            written = cells or "".join(lines.since).rstrip("\r\n")
            yield Record(name, line, written, [fault], fixed)
            fixed = []
            if isinstance(error, _RowTooLarge):
                reader = csv.reader(iter(lines), strict=True, delimiter=reader.dialect.delimiter)
            elif isinstance(error, Fault) and header is None:
                return  # the columns are unknown


def _fault_of_lines(error: Exception, count: int, limit: int) -> Fault:
    """Return the fault of some lines that are no row."""
    spanned = f"; {count:,} lines were read as one row" if count > 1 else ""
    if isinstance(error, _RowTooLarge):
        spanned += "; is a quote not closed?" if spanned else ""
        return Fault("too_large", f"{row_too_large(limit)}{spanned}")
    if isinstance(error, Fault):
        return error
    return Fault("wrong_columns", f"invalid CSV: {error}{spanned}")


def _other_delimiter(cells: list[str]) -> str | None:
    """Return the separator of a header that was read as one cell, if it has another one."""
    return next((c for c in DELIMITERS if c in cells[0]), None) if len(cells) == 1 else None


def read_sheet(rows: Iterator[list[Any]], name: str, first: int, limit: int) -> Iterator[Record]:
    """Yield the rows of a sheet below its header; `first` is the number of its first row."""
    header: Header | None = None
    for line, values in enumerate(rows, first):
        cells = [_as_text(value) for value in values]
        if not any(map(str.strip, cells)):
            continue
        try:
            if header is None:
                header = Header(cells)
                continue
            if exceeds(text := "".join(cells), limit):
                raise row_too_large(limit)
            yield Record(name, line, header.row(cells), size=len(text))
        except Fault as fault:
            yield Record(name, line, cells, [fault])
            if header is None:
                return


def _as_text(value: Any) -> str:
    """Return the value of a cell as text; numbers that are whole have no decimal point."""
    match value:
        case bool():
            return str(value).upper()
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case datetime():
            return value.isoformat(" ")
        case date() | time():
            return value.isoformat()
        case None:
            return ""
    return str(value)


def load_dataset(name: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits of a Hugging Face data set by name: of a local folder, or of a hub.

    Raises:
        UserError: where it can't be loaded, its library is not installed, or no revision fixes
            the state of a hub's data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("prepare.datasets_missing") from error
    if revision is None and not Path(name).exists():
        raise UserError("prepare.dataset_without_revision", dataset=name)
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(name, config, revision=revision))
    except Exception as error:  # its many readers raise exceptions of any kind
        raise UserError(
            "prepare.dataset_unreadable", dataset=name, reason=first_line(error)
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
