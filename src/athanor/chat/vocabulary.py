"""Tokens that a base model was never trained to say, judged by the rows of its head.

A token without training keeps its initial row, or has a row like all unused ones, where weight
decay and the gradients of other tokens have pushed it (Land and Bartolo 2024, "Fishing for
Magikarp"). Adapters of the layers may not make a model say such a token, and cannot if another
token has the same row.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from athanor.model.folder import read_config
from athanor.model.stored import dequantize, read_weights

if TYPE_CHECKING:
    import mlx.core as mx

# A row with less than this share of the usual length, or distance from the mean, is untrained.
SHORT = 0.25
# At least so many rows without a token show where unused rows are.
ENOUGH = 16
# A row within this multiple of their largest distance from their mean is like them.
NEAR = 1.25
# If more than this share of the tokens look unused, the comparison means nothing.
AT_MOST = 0.05
ROWS_AT_A_TIME = 16384

# Ends of names of the head, and of the embedding that serves as a tied head.
HEADS = (
    *("lm_head", "embed_out", "output"),
    *("embed_tokens", "wte", "word_embeddings", "tok_embeddings"),
)


@np.errstate(invalid="ignore", divide="ignore")  # of a head of zeros
def find_untrained_tokens(folder: Path, size: int, tokens: Iterable[int]) -> dict[int, str] | None:
    """Return the tokens that the base was never trained to say, each with the evidence.

    `size` is the number of the tokenizer's tokens; rows beyond belong to none. None if the folder
    has no weights, or no head under a known name.
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
    untrained = {}
    for token in tokens:
        if token >= head.shape[0]:
            untrained[token] = f"the head has {head.shape[0]} rows, and none for it"
            continue
        if token >= size:
            untrained[token] = "the tokenizer has no such token"
            continue
        length = lengths[token] / np.median(lengths[:size])
        distance = from_middle[token] / np.median(from_middle[:size])
        if length < SHORT:
            untrained[token] = f"its row of the head has {length:.2g} of the usual length"
        elif distance < SHORT:
            untrained[token] = f"its row of the head is the mean of all, but for {distance:.2g}"
        elif (twin := _twin(head, lengths[:size], token)) is not None:
            untrained[token] = f"its row of the head is that of token {twin}, to the bit"
        elif unused is not None and unused[token]:
            untrained[token] = "its row of the head is among those that belong to no token"
    return untrained


def _head(folder: Path) -> "mx.array | None":
    """Return the matrix [tokens, width] that gives the logits, dequantized; None if unknown."""
    if not list(folder.glob("model*.safetensors")):
        return None
    weights = read_weights(folder)
    for head in HEADS:
        name = next(
            (name for name in weights if re.fullmatch(rf"(\D*\.)?{head}\.weight", name)), None
        )
        if name is None:
            continue
        return dequantize(weights, name, read_config(folder))
    return None


def _blocks(head: "mx.array") -> Iterator[tuple[int, np.ndarray]]:
    import mlx.core as mx

    for start in range(0, head.shape[0], ROWS_AT_A_TIME):
        yield start, np.array(head[start : start + ROWS_AT_A_TIME].astype(mx.float32))


def _distances(head: "mx.array", place: np.ndarray) -> np.ndarray:
    """Return each row's distance from a point, in float32."""
    return np.concatenate([np.linalg.norm(rows - place, axis=1) for _, rows in _blocks(head)])


def _like_unused(head: "mx.array", size: int) -> np.ndarray | None:
    """Return which rows are like those from `size` on; None if these are no evidence."""
    beyond = np.concatenate([rows[max(size - start, 0) :] for start, rows in _blocks(head)])
    if len(beyond) < ENOUGH:
        return None
    middle = beyond.mean(axis=0)
    far = np.linalg.norm(beyond - middle, axis=1).max()
    near: np.ndarray = _distances(head, middle) <= NEAR * far
    return near if near[:size].mean() <= AT_MOST else None


def _twin(head: "mx.array", lengths: np.ndarray, token: int) -> int | None:
    """Return another token with the same row, which training never produces."""
    for other in np.flatnonzero(lengths == lengths[token]).tolist():
        if other != token and bool((head[other] == head[token]).all()):
            return int(other)
    return None
