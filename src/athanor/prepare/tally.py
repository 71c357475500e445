"""The numbers of each row that passed, which stay in memory while the rows do not."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from athanor.prepare.origins import Origin

# Rows that are handled together: enough for the tokenizer to use every core.
CHUNK = 1000
# Their encodings take a hundred times the memory of their texts.
CHUNK_BYTES = 500_000

# `record` numbers the records in the order of reading, from 0; augmented rows have the number of
# theirs. `whole`, `folded` and `question` are hashes of the row, its folded text and its question.
COLUMNS = np.dtype(
    [
        ("record", np.int64),
        ("augmented", np.bool_),
        ("origin", np.int32),
        ("line", np.int32),
        ("split", np.int8),
        ("tokens", np.int32),
        ("supervised", np.int32),
        ("cut", np.int32),
        ("end_cut", np.bool_),
        ("script", np.int8),
        ("label", np.int32),
        ("source", np.int32),
        ("whole", np.uint64),
        ("folded", np.uint64),
        ("question", np.uint64),
    ]
)


@dataclass
class Tally:
    """The counts of both passes. `rows` has a line of COLUMNS for each row that is still in."""

    rows: np.ndarray
    origins: list[Origin]
    read: list[int]
    formats: list[Counter[str]]
    labels: list[str]
    sources: list[str]
    cleaned: Counter[str]

    def where(self, row: np.void) -> str:
        """Return a row's place."""
        return f"{self.origins[row['origin']].name}:{row['line']}"


def chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield items in lists of CHUNK, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def sized_chunks(items: Iterable[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Yield items in lists of CHUNK, or shorter ones from CHUNK_BYTES on."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if len(chunk) == CHUNK or total > CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
