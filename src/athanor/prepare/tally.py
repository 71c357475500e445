"""What is known of each row that goes on: numbers, in memory while the rows themselves are not."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from athanor.prepare.read_rows import Origin

# Rows that are looked at together: enough for the tokenizer to share out among the cores.
CHUNK = 1000

# What is known of each row that goes on; `record` numbers the records as they were read, from 0;
# `made` says that augmentation made the row of its record.
COLUMNS = np.dtype(
    [
        ("record", np.int64),
        ("made", np.bool_),
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
    """What both passes counted. `rows` has a row of COLUMNS for each that is still in."""

    rows: np.ndarray
    origins: list[Origin]
    read: list[int]
    formats: list[Counter[str]]
    labels: list[str]
    sources: list[str]
    cleaned: Counter[str] = field(default_factory=Counter)

    def where(self, row: np.void) -> str:
        """A row's place."""
        return f"{self.origins[row['origin']].name}:{row['line']}"


def chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Items in lists of CHUNK, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
