"""Records of JSON files (one list or object) and of JSON Lines (an object on each line).

A bad record never ends the reading of JSON Lines; a list of JSON ends where it can't be parsed.
"""

import json
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

from athanor.prepare.checks import Fault
from athanor.prepare.json_values import parse
from athanor.prepare.records import NOT_UTF8, Record, exceeds, is_utf8, strip_mark
from athanor.prepare.streams import read_lines, row_too_large

# An object may span this many lines.
LINES_OF_AN_OBJECT = 1000
# Bytes of a file of JSON that are read at a time.
WINDOW = 1 << 20

Line = tuple[int, bytes]


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        text = f"byte {error.start + 1} of the line is not UTF-8"
        try:
            shown = data.decode("gb18030").strip()[:20]
            text += f"; as GB18030 it reads {shown!r}: `iconv -f GB18030 -t UTF-8 OLD > NEW`"
        except UnicodeDecodeError:
            pass
        raise Fault("invalid_utf8", text) from None


def read_json_lines(
    file: IO[bytes], name: str, limit: int, fixes: frozenset[str]
) -> Iterator[Record]:
    """Yield the records of JSON Lines; `fixes` names the faults that are mended.

    A line above `limit` bytes is a fault.
    """
    lines = enumerate(read_lines(file, limit), 1)
    ahead: deque[Line] = deque()
    faults: list[Fault] = []
    fixed: list[Fault] = []
    while following := _next_line(lines, ahead):
        number, data = following
        if number == 1:
            data, faults, fixed = strip_mark(data, fixes)
        if not data.strip():
            continue
        text = ""
        try:
            if len(data) > limit:
                raise row_too_large(limit)
            text = _decode(data).strip()
            value, end = parse(text)
            record = Record(name, number, value, faults, fixed, len(data))
            yield from _split_line(record, text, end, fixes) if end < len(text) else [record]
        except Fault as fault:
            written = text or data.decode(errors="backslashreplace").rstrip("\r\n")
            yield Record(name, number, written, [*faults, fault])
        except json.JSONDecodeError as error:
            if joined := _join_lines(text, error, lines, ahead, limit):
                reason = f"the object spans {joined[1]} lines; JSON Lines expects it on one"
                split = Fault("split_object", reason)
                (fixed if split.name in fixes else faults).append(split)
                yield Record(name, number, joined[0], faults, fixed)
            else:
                hint = "; a file with a list of rows must be named .json"
                reason = f"{error.msg} (column {error.colno}){hint * text.startswith('[')}"
                yield Record(name, number, text, [*faults, Fault("invalid_json", reason)])
        faults, fixed = [], []


def _next_line(lines: Iterator[Line], ahead: deque[Line]) -> Line | None:
    return ahead.popleft() if ahead else next(lines, None)


def _split_line(first: Record, text: str, end: int, fixes: frozenset[str]) -> Iterator[Record]:
    """Yield the objects of a line with several, or one record with the fault of the line."""
    values = [first.value]
    fault: Fault | None = None
    while fault is None and (start := _skip(text, end, " \t,")) < len(text):
        try:
            value, end = parse(text, start)
            values.append(value)
        except (json.JSONDecodeError, Fault):
            fault = Fault("invalid_json", f"unexpected text after the object (column {end + 1})")
    if fault is None and len(values) > 1:
        reason = f"{len(values)} objects on one line; JSON Lines expects one"
        fault = Fault("several_objects", reason)
    elif fault is None:
        reason = "trailing comma after the object; JSON Lines does not allow one"
        fault = Fault("invalid_json", reason)
    if fault.name not in fixes:
        yield Record(first.path, first.line, text, [*first.faults, fault], first.fixed)
        return
    yield Record(first.path, first.line, first.value, first.faults, [*first.fixed, fault])
    for value in values[1:]:
        yield Record(first.path, first.line, value)


def _join_lines(
    text: str,
    error: json.JSONDecodeError,
    lines: Iterator[Line],
    ahead: deque[Line],
    limit: int,
) -> tuple[Any, int] | None:
    """Return an object that spans several lines, and their number; None if there is none.

    Lines that were read in vain are put back into `ahead`.
    """
    if not text.startswith("{") or error.pos < len(text):
        return None
    parts = [text]
    seen: list[Line] = []
    while len(seen) < LINES_OF_AN_OBJECT and sum(map(len, parts)) <= limit:
        following = _next_line(lines, ahead)
        if following is None:
            break
        seen.append(following)
        try:
            part = following[1].decode()
        except UnicodeDecodeError:
            break
        parts.append(part)
        if part.startswith("{"):
            break
        if part.rstrip().endswith(("}", "},")):
            whole = "".join(parts).rstrip().removesuffix(",")
            try:
                value, end = parse(whole)
            except json.JSONDecodeError as broken:
                if broken.pos < len(whole):
                    break
                continue
            except Fault:
                continue
            if end == len(whole):
                return value, len(parts)
            break
    ahead.extendleft(reversed(seen))
    return None


def read_json(file: IO[bytes], name: str, limit: int, fixes: frozenset[str]) -> Iterator[Record]:
    """Yield the objects of a list, or a single one; a window of the file is held in memory.

    A value above `limit` bytes is a fault, and ends the file if its own end is not in the window.
    """
    window = _Window(file)
    faults, fixed = window.strip_mark(fixes)
    position = window.skip(0, " \t\r\n")
    is_list = window.text.startswith("[", position)
    position += is_list
    while True:
        start = position = window.drop(window.skip(position, " \t\r\n,"))
        line = window.line_at(position)
        if position == len(window.text) or (is_list and window.text[position] == "]"):
            if fault := _fault_of_end(window, position, is_list):
                yield Record(name, line, window.text[start:], [*faults, fault], fixed)
            return
        try:
            value, position = window.parse(start, limit)
            if not is_utf8(written := window.text[start:position]):
                raise Fault("invalid_utf8", NOT_UTF8)
            if exceeds(written, limit):
                raise row_too_large(limit)
            yield Record(name, line, value, faults, fixed, len(written))
        except json.JSONDecodeError as error:
            fault = Fault("invalid_json", f"{error.msg} (column {error.colno}){window.rest(start)}")
            yield Record(
                name, window.line_at(error.pos), window.text[start:], [*faults, fault], fixed
            )
            return
        except Fault as fault:
            end = _end_of_value(window.text, start)
            if end is None:
                fault = Fault(fault.name, fault.text + window.rest(start))
            yield Record(name, line, window.text[start:end], [*faults, fault], fixed)
            if end is None:
                return
            position = end
        faults, fixed = [], []


class _Window:
    """The part of a file's text that is being read: `text`, to the file's end if `is_whole`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # Bytes that are not UTF-8 become lone surrogates, which are looked for in each row.
        self._decoder = getincrementaldecoder("utf-8")("surrogateescape")
        self.text = ""
        self.is_whole = False
        self._line, self._counted = 1, 0

    def strip_mark(self, fixes: frozenset[str]) -> tuple[list[Fault], list[Fault]]:
        """Read the first block without its byte order mark; return that fault, open or mended."""
        data, faults, fixed = strip_mark(self._file.read(WINDOW), fixes)
        self._decode(data)
        return faults, fixed

    def skip(self, position: int, characters: str) -> int:
        """Return the first position from `position` on with none of these characters."""
        while (position := _skip(self.text, position, characters)) == len(self.text):
            if self.is_whole:
                break
            position = self.drop(position)
            self._grow()
        return position

    def line_at(self, position: int) -> int:
        """Return the line of a position, which is not before the last one that was asked for."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def drop(self, position: int) -> int:
        """Drop the text before a position if it is long; return the position in what is left."""
        if position < WINDOW:
            return position
        self.line_at(position)
        self.text, self._counted = self.text[position:], 0
        return 0

    def parse(self, start: int, limit: int) -> tuple[Any, int]:
        """Return the value that starts at `start` and its end, as the function `parse` does.

        Raises:
            Fault: as `parse` does, and for a value above the limit that does not end in the window.
        """
        while True:
            try:
                value, end = parse(self.text, start)
                if end < len(self.text) or self.is_whole:
                    return value, end
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if self.is_whole or not is_cut:
                    raise
            if len(self.text) - start > limit:
                raise row_too_large(limit)
            self._grow()

    def rest(self, start: int) -> str:
        """Return the words that end the message about a file whose rest is not read."""
        count = f" ({len(self.text) - start:,} characters)" if self.is_whole else ""
        return f"; the rest of the file{count} was not read"

    def _grow(self) -> None:
        self._decode(self._file.read(max(WINDOW, len(self.text))))

    def _decode(self, data: bytes) -> None:
        self.is_whole = not data
        self.text += self._decoder.decode(data, self.is_whole)


def _fault_of_end(window: _Window, position: int, is_list: bool) -> Fault | None:
    """Return the fault of a file's end, if any; `position` is behind the last row."""
    if not is_list:
        return None
    if position == len(window.text):
        return Fault("invalid_json", "the list is not closed; the file may be truncated")
    behind = window.skip(position + 1, " \t\r\n")
    if behind < len(window.text):
        return Fault("invalid_json", "unexpected text after the list")
    return None


def _end_of_value(text: str, start: int) -> int | None:
    """Return the end of a value that Python's own decoder can read, None if it can't."""
    try:
        return int(json.JSONDecoder().raw_decode(text, start)[1])
    except (ValueError, RecursionError):
        return None


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
