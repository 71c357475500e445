"""The mean loss of a model over texts, and the answers that it generates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import Forward


@dataclass(frozen=True)
class Answer:
    """Generated tokens, and whether an end token, which is not among them, stopped the answer."""

    ids: list[int]
    stopped: bool


def measure_loss(
    forward: Forward,
    rows: list[TokenizedText],
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Return the mean loss in nats over all supervised tokens of all rows, and their number.

    The sum is in float64 and in the order of the rows' lengths, whatever the batches. (nan, 0) if
    no token is supervised.
    """
    total, count = 0.0, 0
    in_order = sorted((row for row in rows if any(row.supervised[1:])), key=len)
    for start in range(0, len(in_order), batch_size):
        losses = forward.token_losses(forward.prepare(in_order[start : start + batch_size]))
        total += float(losses.sum(dtype=np.float64))
        count += len(losses)
        on_batch()
    return (total / count if count else math.nan), count


def generate_answers(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    batch_size: int,
    temp: float = 0.0,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda done: None,
) -> list[Answer]:
    """Answer tokenized prompts, in their order, with the likeliest tokens or by sampling at `temp`.

    Tokens are sampled for a batch at a time, so sampled answers depend on all arguments.

    Args:
        on_step: called after each token with the number of prompts answered so far; one that is
            being answered counts as its share of `max_tokens`.
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
