"""Which tokens a base model can say: what the rows of its head tell of their training.

A token that was never trained on keeps the row that it was initialised with, or is where weight
decay and the other tokens' gradients have pushed all unused rows (Land and Bartolo 2024, "Fishing
for Magikarp"). Adapters of the layers may not make a model say such a token, and where another
token has the very same row they can't.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from athanor.model.source import read_config
from athanor.model.stored import dequantize, read_weights

if TYPE_CHECKING:
    import mlx.core as mx

# Rows as short as this share of the usual one, or as near to the mean of all, say nothing.
SHORT = 0.25
# Rows that belong to no token show where the unused ones are, if there are so many of them.
ENOUGH = 16
# How far from their middle a row still is one of them, in distances of their farthest.
NEAR = 1.25
# Where more than this share of the tokens look unused, looks tell nothing.
AT_MOST = 0.05
ROWS_AT_A_TIME = 16384

# The head, else the embedding that serves as one, by the ends of their names.
HEADS = (
    *("lm_head", "embed_out", "output"),
    *("embed_tokens", "wte", "word_embeddings", "tok_embeddings"),
)


def find_untrained_tokens(folder: Path, size: int, tokens: Iterable[int]) -> dict[int, str] | None:
    """Those of `tokens` that the base was never trained to say, each with what shows it.

    `size` is the number of the tokenizer's tokens: rows beyond it belong to none. None where the
    folder has no weights, or none under a known name.
    """
    head = _head(folder)
    if head is None:
        return None
    size = min(size, head.shape[0])
    width = head.shape[1]
    lengths = _distances(head, np.zeros(width, np.float32))
    middle = sum(block[: max(size - start, 0)].sum(axis=0) for start, block in _blocks(head)) / size
    from_middle = _distances(head, middle)
    unused = _like_unused(head, size)
    found = {}
    for token in tokens:
        if token >= head.shape[0]:
            found[token] = f"the head has {head.shape[0]} rows, and none of it"
            continue
        length = lengths[token] / np.median(lengths[:size])
        distance = from_middle[token] / np.median(from_middle[:size])
        if length < SHORT:
            found[token] = f"its row of the head has {length:.2g} of the usual length"
        elif distance < SHORT:
            found[token] = f"its row of the head is the mean of all, but for {distance:.2g}"
        elif (twin := _twin(head, lengths[:size], token)) is not None:
            found[token] = f"its row of the head is that of token {twin}, to the bit"
        elif unused is not None and unused[token]:
            found[token] = "its row of the head is among those that belong to no token"
    return found


def _head(folder: Path) -> "mx.array | None":
    """The matrix that gives the logits, tokens × width; weights in few bits are unpacked."""
    if not list(folder.glob("model*.safetensors")):
        return None
    found = read_weights(folder)
    for head in HEADS:
        name = next(
            (name for name in found if re.fullmatch(rf"(\D*\.)?{head}\.weight", name)), None
        )
        if name is None:
            continue
        return dequantize(found, name, read_config(folder))
    return None


def _blocks(head: "mx.array") -> Iterator[tuple[int, np.ndarray]]:
    import mlx.core as mx

    for start in range(0, head.shape[0], ROWS_AT_A_TIME):
        yield start, np.array(head[start : start + ROWS_AT_A_TIME].astype(mx.float32))


def _distances(head: "mx.array", place: np.ndarray) -> np.ndarray:
    """Each row's distance from a place, float32."""
    return np.concatenate([np.linalg.norm(rows - place, axis=1) for _, rows in _blocks(head)])


def _like_unused(head: "mx.array", size: int) -> np.ndarray | None:
    """For each row whether it is among those beyond `size`; None where they tell nothing."""
    beyond = np.concatenate([rows[max(size - start, 0) :] for start, rows in _blocks(head)])
    if len(beyond) < ENOUGH:
        return None
    middle = beyond.mean(axis=0)
    far = np.linalg.norm(beyond - middle, axis=1).max()
    near: np.ndarray = _distances(head, middle) <= NEAR * far
    return near if near[:size].mean() <= AT_MOST else None


def _twin(head: "mx.array", lengths: np.ndarray, token: int) -> int | None:
    """Another token with the very same row: training never makes two alike."""
    for other in np.flatnonzero(lengths == lengths[token]).tolist():
        if other != token and bool((head[other] == head[token]).all()):
            return int(other)
    return None
