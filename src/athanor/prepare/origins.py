"""Origins of records: files in the folder of data, or the splits of a data set.

Files are .jsonl, .json, .csv, .parquet and .md; their names, or those of their folders, may name
a split.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from athanor.errors import UserError
from athanor.prepare import articles
from athanor.prepare.checks import Fault
from athanor.prepare.read_json import read_json, read_json_lines
from athanor.prepare.read_tables import load_dataset, read_csv, read_parquet
from athanor.prepare.records import Record, strip_mark

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".md")

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
ABOUT = re.compile(r"(readme|license|changelog|contributing|dataset_?card)\b.*\.md$", re.IGNORECASE)

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
    folder: Path, count: Count, article_tokens: int, named: list[str]
) -> tuple[list[Origin], list[tuple[str, str]]]:
    """Return the files of a folder by name, and those that are not read, with the reason.

    Args:
        folder: The folder of data.
        count: A function from a text to its number of tokens, for articles.
        article_tokens: The most tokens of a piece of an article.
        named: The patterns of data.formats.
    """
    origins, skipped = [], []
    for path in sorted(_files(folder)):
        if path.suffix.lower() not in SUFFIXES:
            skipped.append((str(path), f"unsupported type; expected {', '.join(SUFFIXES)}"))
        elif ABOUT.match(path.name) and not any(fnmatch(path.name, name) for name in named):
            text = f"describes the data; to train on it: data.formats: {{{path.name}: article}}"
            skipped.append((str(path), text))
        else:
            reader = partial(_read, path, count, article_tokens)
            split = _split(path.relative_to(folder))
            origins.append(Origin(str(path), split, reader, partial(_count_lines, path)))
    return origins, skipped


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, following links."""
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
    """Return the split that a file's name, or the nearest of its folders' names, tells."""
    for name in (path.stem, *reversed(path.parts[:-1])):
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
            yield Record(where, line, row)

    return [
        Origin(
            f"{name}/{key}",
            _split(Path(str(key))),
            partial(read, rows, f"{name}/{key}"),
            partial(len, rows),
        )
        for key, rows in load_dataset(name, config, revision).items()
    ]


def _count_lines(path: Path) -> int:
    """Return the lines of a text file; 0 for Parquet."""
    if path.suffix.lower() == ".parquet":
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 1 << 20), b""))


def _read(path: Path, count: Count, article_tokens: int, fixes: frozenset[str]) -> Iterator[Record]:
    suffix = path.suffix.lower()
    try:
        if suffix != ".parquet" and _is_utf16(path):
            text = "the file is UTF-16; convert it: `iconv -f UTF-16 -t UTF-8 OLD > NEW`"
            yield Record(str(path), 1, None, [Fault("unreadable_file", text)])
            return
        match suffix:
            case ".jsonl":
                yield from read_json_lines(path, fixes)
            case ".json":
                yield from read_json(path, fixes)
            case ".csv":
                yield from read_csv(path, fixes)
            case ".parquet":
                yield from read_parquet(path)
            case _:
                yield from _read_article(path, count, article_tokens, fixes)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError("prepare.unreadable", path=path, reason=reason) from error


def _is_utf16(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


def _read_article(path: Path, count: Count, budget: int, fixes: frozenset[str]) -> Iterator[Record]:
    data, faults, fixed = strip_mark(path.read_bytes(), fixes)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = Fault("invalid_utf8", f"byte {error.start + 1} of the file is not UTF-8")
        yield Record(str(path), line, data.decode(errors="backslashreplace"), [*faults, fault])
        return
    for piece in articles.pieces(text, name=path.stem, count=count, budget=budget):
        value = {"path": list(piece.path), "text": piece.text}
        yield Record(str(path), piece.line, value, faults, fixed)
        faults, fixed = [], []
