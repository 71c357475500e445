"""Origins of records: files in the folder of data, or the splits of a data set.

Files are those of SUFFIXES, packed with gzip or not; their names, or those of their folders, may
name a split.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import IO, Any

from athanor import console
from athanor.errors import UserError
from athanor.prepare import articles
from athanor.prepare.checks import Fault
from athanor.prepare.folder import list_files
from athanor.prepare.read_json import read_json, read_json_lines
from athanor.prepare.read_parquet import read_parquet
from athanor.prepare.read_tables import load_dataset, read_csv
from athanor.prepare.read_workbook import read_workbook
from athanor.prepare.records import Record, strip_mark, without_filled_nulls
from athanor.prepare.streams import DataFile, Limits, read_whole, row_too_large

LINES = (".jsonl", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARTICLES = (".md", ".txt")
BINARY = (".parquet", ".xlsx")
SUFFIXES = (*LINES, ".json", *SEPARATORS, *BINARY, *ARTICLES)
# What to do with files that are not read.
HINTS = {
    "unpack it": ".zip .tar .tgz .7z .rar .bz2 .xz .zst .lz4",
    "save it as .xlsx or .csv": ".xls .xlsb .xlsm .ods .numbers",
    "convert it to .md or .txt, for example with pandoc": (
        ".doc .docx .odt .rtf .pdf .epub .html .htm .tex .rst .pptx .ppt"
    ),
    "write it as .parquet or .jsonl": ".arrow .feather .orc .avro .pkl .pickle .npy .npz .h5 .db",
    "write it as .jsonl": ".yaml .yml .toml .xml .sqlite .sql .log .dat",
}
HINT = {suffix: hint for hint, suffixes in HINTS.items() for suffix in suffixes.split()}

# Files of these names are a split; mlx-lm's names first, then other conventions.
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
# Files that describe data.
ABOUT = re.compile(
    r"(readme|license|changelog|contributing|dataset_?card)\b.*\.md$|dataset_(infos?|dict)\.json$",
    re.IGNORECASE,
)

Count = Callable[[str], int]


@dataclass(frozen=True)
class Origin:
    """A file, or a split of a data set. `split` is None where its name is not a split's.

    `read` takes the names of the faults to mend; `lines` counts lines for a progress bar.
    """

    name: str
    split: str | None
    read: Callable[[frozenset[str]], Iterator[Record]]
    lines: Callable[[], int]


def find_files(
    folder: Path, count: Count, article_tokens: int, named: list[str], limits: Limits
) -> tuple[list[Origin], list[tuple[str, str]]]:
    """Return the files of a folder by name, and those that are not read, with the reason.

    Args:
        folder: The folder of data.
        count: A function from a text to its number of tokens, for articles.
        article_tokens: The most tokens of a piece of an article.
        named: The patterns of data.formats.
        limits: The most bytes of a row, and of a file in memory.

    Raises:
        UserError: as list_files does.
    """
    paths, left = list_files(folder)
    origins, skipped = [], [(shown(path), reason) for path, reason in left]
    for path in paths:
        file, name = DataFile(path, limits), shown(path)
        if file.kind not in SUFFIXES:
            expected = f"unsupported type; expected {', '.join(SUFFIXES)}, or one of them with .gz"
            hint = HINT.get(path.suffix.lower())
            skipped.append((name, f"{expected}; {hint}" if hint else expected))
        elif ABOUT.match(path.name) and not any(fnmatch(path.name, name) for name in named):
            kind = "article" if path.suffix.lower() == ".md" else "auto"
            text = f"describes the data; to train on it: data.formats: {{{path.name}: {kind}}}"
            skipped.append((name, text))
        else:
            reader = partial(_read, file, name, count, article_tokens)
            split = _split(path.relative_to(folder))
            origins.append(Origin(name, split, reader, partial(_count_lines, file)))
    return origins, sorted(skipped)


def shown(path: Path) -> str:
    """Return a path as text that every file, page and terminal can show in one line."""
    return console.visible(str(path)).replace("\n", "\\n").replace("\t", "\\t")


def _split(path: Path) -> str | None:
    """Return the split that a file's name, or the nearest of its folders' names, tells."""
    stem = path.with_suffix("").stem if path.suffix.lower() == ".gz" else path.stem
    for name in (stem, *reversed(path.parts[:-1])):
        if match := SPLIT.match(name.lower()):
            return SPLIT_NAMES[match[1]]
    return None


def find_dataset(name: str, config: str | None, revision: str | None) -> list[Origin]:
    """Return the splits of a Hugging Face data set.

    Raises:
        UserError: as load_dataset does.
    """

    def read(rows: Any, where: str, fixes: frozenset[str]) -> Iterator[Record]:
        for line, row in enumerate(rows, 1):
            yield Record(where, line, without_filled_nulls(row))

    return [
        Origin(
            f"{name}/{key}",
            _split(Path(str(key))),
            partial(read, rows, f"{name}/{key}"),
            partial(len, rows),
        )
        for key, rows in load_dataset(name, config, revision).items()
    ]


def _count_lines(file: DataFile) -> int:
    """Return the lines of a text file; 0 for others."""
    try:
        return 0 if file.kind in BINARY else file.scan.lines
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: DataFile, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError("prepare.unreadable", path=shown(file.path), reason=reason)


def _read(
    file: DataFile, name: str, count: Count, article_tokens: int, fixes: frozenset[str]
) -> Iterator[Record]:
    try:
        if file.kind in BINARY:
            reader = read_parquet if file.kind == ".parquet" else read_workbook
            yield from reader(file, name)
            return
        with file.open(fixes) as text:
            records = _read_text(text, file, name, count, article_tokens, fixes)
            for record in records:
                record.fixed = [*file.mended(), *record.fixed]
                yield record
                break
            yield from records
    except Fault as fault:
        yield Record(name, 1, None, [fault])
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_text(
    text: IO[bytes],
    file: DataFile,
    name: str,
    count: Count,
    article_tokens: int,
    fixes: frozenset[str],
) -> Iterator[Record]:
    limit = file.limits.row
    if file.kind in LINES:
        return read_json_lines(text, name, limit, fixes)
    if file.kind in SEPARATORS:
        return read_csv(text, name, limit, SEPARATORS[file.kind], fixes)
    if file.kind == ".json":
        return read_json(text, name, limit, fixes)
    return _read_article(text, file, name, count, article_tokens, fixes)


def _read_article(
    binary: IO[bytes],
    file: DataFile,
    name: str,
    count: Count,
    budget: int,
    fixes: frozenset[str],
) -> Iterator[Record]:
    data, faults, fixed = strip_mark(read_whole(binary, file.limits.file), fixes)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = Fault("invalid_utf8", f"byte {error.start + 1} of the file is not UTF-8")
        yield Record(name, line, data.decode(errors="backslashreplace"), [*faults, fault])
        return
    if large := articles.large_paragraph(text, file.limits.row):
        yield Record(name, large, text[: file.limits.row], [row_too_large(file.limits.row)])
        return
    if file.kind == ".md" and text.count("\n") > articles.MOST_LINES:
        reason = f"more than {articles.MOST_LINES:,} lines of Markdown; split the file"
        yield Record(name, 1, None, [Fault("unreadable_file", reason)])
        return
    cut = articles.pieces if file.kind == ".md" else articles.plain_pieces
    for piece in cut(text, name=file.stem, count=count, budget=budget):
        value = {"path": list(piece.path), "text": piece.text}
        yield Record(name, piece.line, value, faults, fixed)
        faults, fixed = [], []
