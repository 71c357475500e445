"""Rows as tokens and as arrays: what a model reads, and what is to be said at which positions."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one text, and which of them the loss is computed on.

    Args:
        ids: the tokens.
        supervised: for each token, whether it is learned.
        line: the number of the text's row in its file, from 1.
        answer_spans: where the answers are, their end tokens included: (start, stop).
        replaced_targets: by position, the token to learn there instead of the one that is read.
        prompts_match: whether the tokens before each answer are those of its generation prompt.
    """

    ids: list[int]
    supervised: list[bool]
    line: int = 0
    answer_spans: list[tuple[int, int]] = field(default_factory=list)
    replaced_targets: dict[int, int] = field(default_factory=dict)
    prompts_match: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> "TokenizedText":
        """At most the first `length` tokens; an answer that loses its end is not learned."""
        if len(self) <= length:
            return self
        supervised = self.supervised[:length]
        if not all(self.supervised):
            for first, behind in self.answer_spans:
                if behind > length:
                    supervised[first:] = [False] * len(supervised[first:])
        replaced = {place: id for place, id in self.replaced_targets.items() if place < length}
        return replace(
            self, ids=self.ids[:length], supervised=supervised, replaced_targets=replaced
        )

    def targets(self) -> list[int]:
        """What the loss asks for at each place, were it supervised."""
        return [self.replaced_targets.get(place, id) for place, id in enumerate(self.ids)]


class SupervisedBatch(NamedTuple):
    """Rows as arrays: the tokens that are read, and what is to be said at which positions.

    `inputs` is rows × positions; the others have a number for each of n supervised positions, in
    the order of the rows: its place in the flattened inputs, the token to be said after it, and 1,
    or 0 for one that is there to make up a round number.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    counts: mx.array


def pad_rows(rows: list[TokenizedText], multiple: int = 1) -> SupervisedBatch:
    """Rows side by side, as long as the longest, both lengths rounded up to a multiple."""
    width = _up(max(map(len, rows)) - 1, multiple)
    ids = np.zeros((len(rows), width), np.int32)
    positions: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = row.ids[:-1]
        said = row.targets() if row.replaced_targets else row.ids
        places = [place for place in range(1, len(row)) if row.supervised[place]]
        positions += [i * width + place - 1 for place in places]
        targets += [said[place] for place in places]
    spare = _up(len(positions), multiple) - len(positions)
    return SupervisedBatch(
        mx.array(ids),
        mx.array(positions + [0] * spare, mx.int32),
        mx.array(targets + [0] * spare, mx.int32),
        mx.array([1.0] * len(positions) + [0.0] * spare, mx.float32),
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
