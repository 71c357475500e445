"""Files as people have them, read record by record: .jsonl, .json, .csv, .parquet and .md.

A record is whatever stands for one row, with the line where it begins, and with what was wrong in
reading it. Reading never ends in the middle of a file over one bad record.
"""

import csv
import json
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from athanor.errors import UserError
from athanor.prepare import articles
from athanor.prepare.checks import Fault

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".md")

# Under these names a file is a split of its own; mlx-lm's names first, then other people's.
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "test": "test",
    "training": "train",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}

# train, and as hubs number the parts of a split: test-00000-of-00001.
SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:[-_.]?\d+(?:-of-\d+)?)?$")
# What lies in a folder of data and is no data.
ABOUT = re.compile(r"(readme|license|changelog|contributing|dataset_?card)\b.*\.md$", re.IGNORECASE)

# A JSON object is looked for over at most this many lines.
LINES_OF_AN_OBJECT = 1000

# No row is meant to be deeper.
DEEPEST = 100
BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Record:
    """One row as it was written: `value`, what was parsed, or the text where nothing could be.

    `line` counts from 1: lines in text files, rows in Parquet. `fixed` names what was mended.
    """

    path: str
    line: int
    value: Any
    faults: list[Fault] = field(default_factory=list)
    fixed: list[Fault] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The record's place, as editors and compilers write it."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Origin:
    """Where records come from: a file, or a split of a data set. `split` is None if not given."""

    name: str
    split: str | None
    read: Callable[[frozenset[str]], Iterator[Record]]
    lines: Callable[[], int]


def origins(
    folder: Path, count: Callable[[str], int], article_tokens: int, named: list[str]
) -> tuple[list[Origin], list[tuple[str, str]]]:
    """The files of a folder that are read, in the order of their names, and those that are not.

    `count` gives a text's number of tokens, for articles, which are cut into `article_tokens`;
    `named` are the patterns of data.formats.
    """
    found, passed_over = [], []
    for path in sorted(_files(folder)):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES:
            passed_over.append((str(path), f"expected one of {', '.join(SUFFIXES)}"))
        elif ABOUT.match(path.name) and not any(fnmatch(path.name, name) for name in named):
            text = f"about the data, not of it; data.formats: {{{path.name}: article}} reads it"
            passed_over.append((str(path), text))
        else:
            reader = _reader(path, count, article_tokens)
            found.append(Origin(str(path), _split(inside), reader, partial(_count_lines, path)))
    return found, passed_over


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden, behind links too."""
    seen = set()
    for name, folders, names in os.walk(folder, followlinks=True):
        real = Path(name).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [inside for inside in folders if not inside.startswith((".", "~"))]
        yield from (Path(name) / inside for inside in names if not inside.startswith((".", "~")))


def _split(path: Path) -> str | None:
    """The split that a file's name says, or the nearest of its folders' names."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        if found := SPLIT.match(name.lower()):
            return SPLIT_NAMES[found[1]]
    return None


def dataset(name: str, config: str | None, revision: str | None) -> list[Origin]:
    """The splits of a Hugging Face data set: of a folder here, or of a hub's repository.

    Raises:
        UserError: where it can't be loaded, the library for it is not installed, or it would be
            another one tomorrow.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.dataset needs Hugging Face's library: `uv sync --extra datasets`"
        ) from error
    if revision is None and not Path(name).exists():
        raise UserError(
            f"data.dataset: there is no folder {name}; for a data set of a hub "
            "data.dataset_revision has to say which state of it: a commit, or main, which changes"
        )
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # it raises what its many readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.dataset: {name} can't be loaded: {reason}") from error

    def reader(split: Any, where: str) -> Callable[[frozenset[str]], Iterator[Record]]:
        def read(fixes: frozenset[str]) -> Iterator[Record]:
            for line, row in enumerate(split, 1):
                yield Record(where, line, row)

        return read

    return [
        Origin(
            f"{name}/{key}",
            _split(Path(str(key))),
            reader(rows, f"{name}/{key}"),
            partial(len, rows),
        )
        for key, rows in splits.items()
    ]


def _count_lines(path: Path) -> int:
    """How far there is to go, for a progress bar: lines, or the rows of a table."""
    if path.suffix.lower() == ".parquet":
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 1 << 20), b""))


def _reader(
    path: Path, count: Callable[[str], int], article_tokens: int
) -> Callable[[frozenset[str]], Iterator[Record]]:
    def read(fixes: frozenset[str]) -> Iterator[Record]:
        try:
            if path.suffix.lower() != ".parquet" and _is_utf16(path):
                text = "the file is UTF-16: `iconv -f UTF-16 -t UTF-8 OLD > NEW`"
                yield Record(str(path), 1, None, [Fault("unreadable_file", text)])
                return
            match path.suffix.lower():
                case ".jsonl":
                    yield from _jsonl(path, fixes)
                case ".json":
                    yield from _json(path, fixes)
                case ".csv":
                    yield from _csv(path, fixes)
                case ".parquet":
                    yield from _parquet(path)
                case _:
                    yield from _markdown(path, fixes, count, article_tokens)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from error

    return read


def _is_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


# ---- JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Fault("duplicate_key", f"the key {twice!r} is there twice; JSON would take the last")
    return found


def _constant(text: str) -> None:
    raise Fault("not_a_number", f"{text} is no JSON number; write null, or leave the key out")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Fault("not_a_number", f"{text} is larger than any number here")
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
    """The JSON value that starts at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: where there is none.
        Fault: for what is wrong in spite of being JSON to Python.
    """
    too_deep = Fault("invalid_json", f"objects inside objects, more than {DEEPEST} deep")
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        raise too_deep from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise Fault("invalid_json", str(error)) from None
    # Python gives up at a depth that depends on who asks: later steps would, where this did not.
    opened = text.count("[", start, end) + text.count("{", start, end)
    if opened > DEEPEST and _depth(value) > DEEPEST:
        raise too_deep
    return value, end


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        hint = ""
        try:
            shown = data.decode("gb18030").strip()[:20]
            hint = f"; as GB18030 it reads {shown!r}: `iconv -f GB18030 -t UTF-8 OLD > NEW`"
        except UnicodeDecodeError:
            pass
        raise Fault(
            "invalid_utf8", f"byte {error.start + 1} of the line is no UTF-8{hint}"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def _without_mark(data: bytes, fixes: frozenset[str]) -> tuple[bytes, list[Fault], list[Fault]]:
    if not data.startswith(BOM):
        return data, [], []
    mark = Fault(
        "byte_order_mark", "the file starts with a byte order mark; save it as plain UTF-8"
    )
    is_mended = mark.name in fixes
    return data[len(BOM) :], [] if is_mended else [mark], [mark] if is_mended else []


def _jsonl(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    lines = _lines(path)
    ahead: deque[tuple[int, bytes]] = deque()
    name = str(path)
    faults: list[Fault] = []
    fixed: list[Fault] = []
    while True:
        following = ahead.popleft() if ahead else next(lines, None)
        if following is None:
            return
        number, data = following
        if number == 1:
            data, faults, fixed = _without_mark(data, fixes)
        if not data.strip():
            continue
        text = ""
        try:
            text = _decoded(data).strip()
            value, end = parse(text)
            if end == len(text):
                yield Record(name, number, value, faults, fixed)
            else:
                yield from _rest_of_line(
                    Record(name, number, value, faults, fixed), text, end, fixes
                )
        except Fault as fault:
            written = text or data.decode(errors="backslashreplace").rstrip("\r\n")
            yield Record(name, number, written, [*faults, fault])
        except json.JSONDecodeError as error:
            if joined := _joined(text, error, lines, ahead):
                over = Fault("split_object", f"an object over {joined[1]} lines: write it in one")
                mends = over.name in fixes
                yield Record(
                    name,
                    number,
                    joined[0],
                    faults if mends else [*faults, over],
                    [*fixed, over] if mends else fixed,
                )
            else:
                yield Record(name, number, text, [*faults, _no_json(text, error)])
        faults, fixed = [], []


def _no_json(text: str, error: json.JSONDecodeError) -> Fault:
    hint = ""
    if text.startswith("["):
        hint = "; a list of rows is read from a file that is named .json"
    return Fault("invalid_json", f"{error.msg} (column {error.colno}){hint}")


def _rest_of_line(first: Record, text: str, end: int, fixes: frozenset[str]) -> Iterator[Record]:
    """The objects of a line that has several; or what is wrong with what comes after the first."""
    values = [first.value]
    while rest := text[end:].lstrip(" \t,"):
        try:
            start = len(text) - len(rest)
            value, end = parse(text, start)
            values.append(value)
        except (json.JSONDecodeError, Fault):
            fault = Fault("invalid_json", f"something after the object (column {end + 1})")
            yield Record(first.path, first.line, text, [*first.faults, fault], first.fixed)
            return
    if len(values) == 1:
        fault = Fault("invalid_json", "a comma behind the object: lines of JSON have none")
        yield Record(first.path, first.line, text, [*first.faults, fault], first.fixed)
        return
    several = Fault("several_objects", f"{len(values)} objects on a line: one each is expected")
    if several.name not in fixes:
        yield Record(first.path, first.line, text, [*first.faults, several], first.fixed)
        return
    for number, value in enumerate(values):
        fixed = [*first.fixed, several] if number == 0 else []
        yield Record(first.path, first.line, value, first.faults if number == 0 else [], fixed)


def _joined(
    text: str,
    error: json.JSONDecodeError,
    lines: Iterator[tuple[int, bytes]],
    ahead: deque[tuple[int, bytes]],
) -> tuple[Any, int] | None:
    """An object that goes on over the following lines, and their number; None if there is none.

    The lines that were looked at in vain come back in `ahead`.
    """
    if not text.startswith("{") or error.pos < len(text):
        return None
    parts = [text]
    seen: list[tuple[int, bytes]] = []
    while len(seen) < LINES_OF_AN_OBJECT:
        following = ahead.popleft() if ahead else next(lines, None)
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


def _json(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    """A list of objects, or a single one; the whole file is held in memory."""
    name = str(path)
    data, faults, fixed = _without_mark(path.read_bytes(), fixes)
    # Bytes that are no UTF-8 come through as lone surrogates, and are found in their row.
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
            if wrong := _after_the_rows(text, position, is_list):
                yield Record(name, line, text[start:], [*faults, wrong], fixed)
            return
        try:
            value, position = parse(text, position)
            if not _is_utf8(text[start:position]):
                raise Fault("invalid_utf8", "bytes that are no UTF-8: save the file as UTF-8")
            yield Record(name, line, value, faults, fixed)
        except json.JSONDecodeError as error:
            rest = f"; the rest of the file, {len(text) - start:,} characters, can't be read"
            found = Fault("invalid_json", f"{error.msg} (column {error.colno}){rest}")
            yield Record(name, error.lineno, text[start:], [*faults, found], fixed)
            return
        except Fault as found:
            end = _end_of_value(text, start)
            yield Record(name, line, text[start:end], [*faults, found], fixed)
            if end is None:
                return
            position = end
        faults, fixed = [], []


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _after_the_rows(text: str, position: int, is_list: bool) -> Fault | None:
    """What is wrong with how a file ends: `position` is where no row is left."""
    if not is_list:
        return None
    if position == len(text):
        return Fault("invalid_json", "the list is not closed: the file may have been cut off")
    if text[position + 1 :].strip():
        return Fault("invalid_json", "something after the end of the list")
    return None


def _end_of_value(text: str, start: int) -> int | None:
    """Where a value that is JSON to Python ends; None where there is none."""
    try:
        return int(json.JSONDecoder().raw_decode(text, start)[1])
    except (ValueError, RecursionError):
        return None


def _next_value(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position


# ---- CSV, Parquet, Markdown


def _csv(path: Path, fixes: frozenset[str]) -> Iterator[Record]:
    name = str(path)
    csv.field_size_limit(sys.maxsize)
    fixed: list[Fault] = []
    header: list[str] | None = None
    read: list[str] = []  # the lines since the last record

    def text_lines() -> Iterator[str]:
        for _, data in _lines(path):
            # Bytes that are no UTF-8 come through as lone surrogates, and are found in the row.
            read.append(data.removeprefix(BOM).decode(errors="surrogateescape"))
            yield read[-1]

    with path.open("rb") as file:
        _, faults, fixed = _without_mark(file.read(len(BOM)), fixes)
    if faults:
        yield Record(name, 1, None, faults)
    reader = csv.reader(text_lines(), strict=True)
    while True:
        line = reader.line_num + 1
        read.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            over = f"; {len(read):,} lines were taken for one row" if len(read) > 1 else ""
            fault = Fault("wrong_columns", f"not CSV: {error}{over}")
            yield Record(name, line, "".join(read).rstrip("\r\n"), [fault])
            continue
        if cells is None:
            return
        if not cells:
            continue
        if wrong := _wrong_cells(cells, header):
            yield Record(name, line, cells, [wrong], fixed)
            if header is None:
                return  # what the columns are is not known
        elif header is None:
            header = [cell.strip() for cell in cells]
            continue
        else:
            yield Record(name, line, dict(zip(header, cells, strict=True)), [], fixed)
        fixed = []


def _wrong_cells(cells: list[str], header: list[str] | None) -> Fault | None:
    if not _is_utf8("".join(cells)):
        return Fault("invalid_utf8", "bytes that are no UTF-8: save the file as UTF-8")
    if header is None:
        names = [cell.strip() for cell in cells]
        if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
            text = f"its columns seem to be parted by {other!r}: save it with commas"
            return Fault("unreadable_file", text)
        if len(set(names)) < len(names):
            return Fault("unreadable_file", "the header names a column twice")
    elif len(cells) != len(header):
        return Fault("wrong_columns", f"{len(cells)} cells, and the header has {len(header)}")
    return None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    line += 1
                    yield Record(str(path), line, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Record(str(path), line + 1, None, [Fault("unreadable_file", f"no Parquet: {reason}")])


def _markdown(
    path: Path, fixes: frozenset[str], count: Callable[[str], int], budget: int
) -> Iterator[Record]:
    data, faults, fixed = _without_mark(path.read_bytes(), fixes)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = Fault("invalid_utf8", f"byte {error.start + 1} of the file is no UTF-8")
        yield Record(str(path), line, data.decode(errors="backslashreplace"), [*faults, fault])
        return
    for piece in articles.pieces(text, name=path.stem, count=count, budget=budget):
        value = {"path": list(piece.path), "text": piece.text}
        yield Record(str(path), piece.line, value, faults, fixed)
        faults, fixed = [], []
