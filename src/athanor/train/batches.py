"""The order of the rows: a pure function of seed and epoch.

Every row comes once an epoch. Rows of similar length share a batch, so that little is padding, and
yet no two epochs are alike: rows are shuffled, sorted within windows of many batches, at least two
an epoch, and the batches are shuffled again. Only (seed, epoch) decides that, so that a training
can resume anywhere.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from athanor.compute.arrays import TokenizedText

# At most so many batches a window: with fewer, the rows of a batch differ more in length; with
# more, the same rows share a batch every epoch.
WINDOW = 256


@dataclass(frozen=True)
class Batch:
    """One iteration's rows, their numbers, and the count of their supervised tokens."""

    numbers: list[int]
    rows: list[TokenizedText]
    tokens: int


class Batches:
    """The batches of a training by iteration, from 1."""

    def __init__(self, rows: list[TokenizedText], batch_size: int, seed: int) -> None:
        self.rows = rows
        self.per_epoch = -(-len(rows) // batch_size)
        lengths = [len(row) for row in rows]
        # An epoch's batches are looked up in each of its iterations.
        self._epoch = lru_cache(2)(lambda epoch: plan_epoch(lengths, batch_size, seed, epoch))

    def __call__(self, iteration: int) -> Batch:
        epoch, position = divmod(iteration - 1, self.per_epoch)
        numbers = self._epoch(epoch)[position]
        rows = [self.rows[number] for number in numbers]
        return Batch(numbers, rows, sum(sum(row.supervised[1:]) for row in rows))


def plan_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the row numbers of each batch of an epoch: every row once, the remainder included."""
    draw = np.random.default_rng([seed, epoch])
    length_of = np.array(lengths)
    order = draw.permutation(len(lengths))
    batches: list[list[int]] = []
    per_epoch = -(-len(lengths) // batch_size)
    size = min(WINDOW, -(-per_epoch // 2)) * batch_size
    for start in range(0, len(order), size):
        window = order[start : start + size]
        window = window[np.argsort(length_of[window], kind="stable")]
        batches += [window[i : i + batch_size].tolist() for i in range(0, len(window), batch_size)]
    return [batches[i] for i in draw.permutation(len(batches))]
