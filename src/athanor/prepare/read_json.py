"""Records of JSON files (one list or object) and of JSON Lines (an object on each line).

A bad record never ends the reading of JSON Lines; a list of JSON ends where it can't be parsed.
"""

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor.prepare.checks import Fault
from athanor.prepare.records import NOT_UTF8, Record, is_utf8, strip_mark

# An object may span this many lines.
LINES_OF_AN_OBJECT = 1000
# No row is meant to be deeper.
DEEPEST = 100

Line = tuple[int, bytes]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        text = f"duplicate key {twice!r}; JSON parsers keep only its last value"
        raise Fault("duplicate_key", text)
    return value


def _constant(text: str) -> None:
    raise Fault("not_a_number", f"{text} is not a JSON number; write null, or remove the key")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Fault("not_a_number", f"{text} is too large for a 64-bit float")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        inside
        for item in level
        if isinstance(item, dict | list)
        for inside in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
    return depth


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that starts at `start`, and the position behind it.

    Raises:
        json.JSONDecodeError: where there is none.
        Fault: for values that only Python takes for JSON.
    """
    too_deep = Fault("invalid_json", f"nested more than {DEEPEST} levels deep")
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        raise too_deep from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise Fault("invalid_json", str(error)) from None
    # Python's own limit depends on the depth of the caller: later steps could fail where this
    # did not.
    opened = text.count("[", start, end) + text.count("{", start, end)
    if opened > DEEPEST and _depth(value) > DEEPEST:
        raise too_deep
    return value, end


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


def read_json_lines(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    """Yield the records of JSON Lines; `fixes` names the faults that are mended."""
    with path.open("rb") as file:
        lines = enumerate(file, 1)
        ahead: deque[Line] = deque()
        name = str(path)
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
                text = _decode(data).strip()
                value, end = parse(text)
                record = Record(name, number, value, faults, fixed)
                yield from _split_line(record, text, end, fixes) if end < len(text) else [record]
            except Fault as fault:
                written = text or data.decode(errors="backslashreplace").rstrip("\r\n")
                yield Record(name, number, written, [*faults, fault])
            except json.JSONDecodeError as error:
                if joined := _join_lines(text, error, lines, ahead):
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
    while fault is None and (rest := text[end:].lstrip(" \t,")):
        try:
            value, end = parse(text, len(text) - len(rest))
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
    text: str, error: json.JSONDecodeError, lines: Iterator[Line], ahead: deque[Line]
) -> tuple[Any, int] | None:
    """Return an object that spans several lines, and their number; None if there is none.

    Lines that were read in vain are put back into `ahead`.
    """
    if not text.startswith("{") or error.pos < len(text):
        return None
    parts = [text]
    seen: list[Line] = []
    while len(seen) < LINES_OF_AN_OBJECT:
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
            except (json.JSONDecodeError, Fault):
                continue
            if end == len(whole):
                return value, len(parts)
            break
    ahead.extendleft(reversed(seen))
    return None


def read_json(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    """Yield the objects of a list, or a single one; the whole file is held in memory."""
    name = str(path)
    data, faults, fixed = strip_mark(path.read_bytes(), fixes)
    # Bytes that are not UTF-8 become lone surrogates, which are looked for in each row.
    text = data.decode(errors="surrogateescape")
    del data
    position = len(text) - len(text.lstrip())
    is_list = text.startswith("[", position)
    line, counted = 1, 0
    position += is_list
    while True:
        position = _next_value(text, position)
        line += text.count("\n", counted, position)
        counted = start = position
        if position == len(text) or (is_list and text[position] == "]"):
            if fault := _fault_of_end(text, position, is_list):
                yield Record(name, line, text[start:], [*faults, fault], fixed)
            return
        try:
            value, position = parse(text, position)
            if not is_utf8(text[start:position]):
                raise Fault("invalid_utf8", NOT_UTF8)
            yield Record(name, line, value, faults, fixed)
        except json.JSONDecodeError as error:
            rest = f"; the rest of the file ({len(text) - start:,} characters) was not read"
            fault = Fault("invalid_json", f"{error.msg} (column {error.colno}){rest}")
            yield Record(name, error.lineno, text[start:], [*faults, fault], fixed)
            return
        except Fault as fault:
            end = _end_of_value(text, start)
            yield Record(name, line, text[start:end], [*faults, fault], fixed)
            if end is None:
                return
            position = end
        faults, fixed = [], []


def _fault_of_end(text: str, position: int, is_list: bool) -> Fault | None:
    """Return the fault of a file's end, if any; `position` is behind the last row."""
    if not is_list:
        return None
    if position == len(text):
        return Fault("invalid_json", "the list is not closed; the file may be truncated")
    if text[position + 1 :].strip():
        return Fault("invalid_json", "unexpected text after the list")
    return None


def _end_of_value(text: str, start: int) -> int | None:
    """Return the end of a value that Python's own decoder can read, None if it can't."""
    try:
        return int(json.JSONDecoder().raw_decode(text, start)[1])
    except (ValueError, RecursionError):
        return None


def _next_value(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
