"""Texts as tokens and as arrays: the inputs of a model, and the targets of its loss."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import mlx.core as mx


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
        """Return the first `length` tokens; an answer that loses its end is not learned."""
        if len(self) <= length:
            return self
        supervised = self.supervised[:length]
        if not all(self.supervised):
            for start, stop in self.answer_spans:
                if stop > length:
                    supervised[start:] = [False] * len(supervised[start:])
        replaced = {place: id for place, id in self.replaced_targets.items() if place < length}
        return replace(
            self, ids=self.ids[:length], supervised=supervised, replaced_targets=replaced
        )

    def targets(self) -> list[int]:
        """Return the target at each position, as if all were supervised."""
        return [self.replaced_targets.get(place, id) for place, id in enumerate(self.ids)]


class SupervisedBatch(NamedTuple):
    """Texts as arrays: the tokens that are read, and the n positions of the loss."""

    inputs: "mx.array"  # [rows, width] of tokens
    positions: "mx.array"  # [n], in the flattened inputs, in the order of the rows
    targets: "mx.array"  # [n], the token that is to follow each position
    counts: "mx.array"  # [n], 1.0, or 0.0 for a position that is padding


def pad_rows(rows: list[TokenizedText], multiple: int = 1) -> SupervisedBatch:
    """Return texts as one batch; its width and number of positions are rounded up to a multiple."""
    import mlx.core as mx

    width = _round_up(max(map(len, rows)) - 1, multiple)
    ids = np.zeros((len(rows), width), np.int32)
    positions: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = row.ids[:-1]
        row_targets = row.targets() if row.replaced_targets else row.ids
        learned = [place for place in range(1, len(row)) if row.supervised[place]]
        positions += [i * width + place - 1 for place in learned]
        targets += [row_targets[place] for place in learned]
    spare = _round_up(len(positions), multiple) - len(positions)
    return SupervisedBatch(
        mx.array(ids),
        mx.array(positions + [0] * spare, mx.int32),
        mx.array(targets + [0] * spare, mx.int32),
        mx.array([1.0] * len(positions) + [0.0] * spare, mx.float32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
