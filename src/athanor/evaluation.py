"""What a model makes of rows: the loss on every supervised token, and the answers it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor.chat import Tokens


@dataclass(frozen=True)
class Answer:
    """Generated tokens without the one that ended them; `stopped` if one did, in time."""

    ids: list[int]
    stopped: bool


def padded(rows: list[Tokens]) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs, targets and loss mask of a batch, each rows × (longest - 1).

    `targets[i, t]` is the token after `inputs[i, t]`; the mask is 1 where it is supervised, and 0
    on every padding position.
    """
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        mask[i, : len(row)] = row.supervised
    return mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(mask[:, 1:])


def summed_loss(model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The cross-entropy in nats, summed over the positions where the mask is 1."""
    logits = model(inputs).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, targets) * mask).sum()


def mean_loss(model: nn.Module, rows: list[Tokens], batch_size: int) -> tuple[float, int]:
    """The mean loss over all supervised tokens of all rows, in nats, and their number.

    (nan, 0) where no token is supervised.
    """
    total, count = 0.0, 0
    in_order = sorted(rows, key=len)
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        total += cast(float, summed_loss(model, *padded(batch)).item())
        count += sum(sum(row.supervised[1:]) for row in batch)
    return (total / count if count else math.nan), count


def answers(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    batch_size: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Greedy answers to tokenized prompts, in their order."""
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        prefill_batch_size=batch_size,
        completion_batch_size=batch_size,
    )
    numbers = generator.insert(prompts, [max_tokens] * len(prompts))
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    stopped: dict[int, bool] = {}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                ids[response.uid].append(response.token)
            if response.finish_reason is not None:
                stopped[response.uid] = response.finish_reason == "stop"
                on_answer()
    generator.close()
    return [Answer(ids[number], stopped[number]) for number in numbers]
