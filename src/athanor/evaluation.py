"""What a model makes of rows: the loss on every supervised token, and the answers it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor.batches import padded
from athanor.supervision import Tokens


@dataclass(frozen=True)
class Answer:
    """Generated tokens without the one that ended them; `stopped` if one did, in time."""

    ids: list[int]
    stopped: bool


@mx.custom_function
def log_sum_exp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """log(sum(exp(logits))) over the last axis, and the softmax, which is its gradient.

    mlx's own computes every exponential again for the gradient. A CPU spends a sixth of a training
    step on that; a GPU does not, and has better uses for the memory. No second derivative.
    """
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    powers = mx.exp(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    return (mx.log(total) + top).squeeze(-1), powers / total


@log_sum_exp.vjp
def _(
    primals: tuple[mx.array], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> mx.array:
    return cotangents[0][..., None] * outputs[1]


def token_losses(model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The cross-entropy of each target in nats, float32, 0 where the mask is 0."""
    logits = model(inputs).astype(mx.float32)
    return nn.losses.cross_entropy(logits, targets) * mask


def summed_loss(model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The cross-entropy in nats, summed over the positions where the mask is 1."""
    if mx.default_device() != mx.Device(mx.cpu):
        return token_losses(model, inputs, targets, mask).sum()
    logits = model(inputs).astype(mx.float32)
    score = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    total, _ = cast("tuple[mx.array, mx.array]", log_sum_exp(logits))
    return ((total - score) * mask).sum()


def mean_loss(
    model: nn.Module,
    rows: list[Tokens],
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """The mean loss over all supervised tokens of all rows, in nats, and their number.

    The sum is taken in float64, in the order of the rows' lengths, whatever the batches. (nan, 0)
    where no token is supervised.
    """
    total, count = 0.0, 0
    in_order = sorted(rows, key=len)
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        total += float(np.array(token_losses(model, *padded(batch))).sum(dtype=np.float64))
        count += sum(sum(row.supervised[1:]) for row in batch)
        on_batch()
    return (total / count if count else math.nan), count


def answers(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    batch_size: int,
    temp: float = 0.0,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda answered: None,
) -> list[Answer]:
    """Answers to tokenized prompts, in their order: the likeliest tokens, or sampled at `temp`.

    Sampled ones are the same whenever all arguments are: tokens are drawn for a batch at a time.
    `on_step` is told after each token how many prompts are answered, with those under way as the
    share of `max_tokens` that they have.
    """
    if temp > 0:
        mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        sampler=make_sampler(temp),
        prefill_batch_size=batch_size,
        completion_batch_size=batch_size,
    )
    numbers = generator.insert(prompts, [max_tokens] * len(prompts))
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    stopped: dict[int, bool] = {}
    while responses := generator.next_generated():
        under_way = 0
        for response in responses:
            if response.finish_reason != "stop":
                ids[response.uid].append(response.token)
            if response.finish_reason is None:
                under_way += len(ids[response.uid])
            else:
                stopped[response.uid] = response.finish_reason == "stop"
        on_step(len(stopped) + under_way / max_tokens)
    generator.close()
    return [Answer(ids[number], stopped[number]) for number in numbers]
