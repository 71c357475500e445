"""The training loop: mlx-lm's models and adapter layers, our batches, loss and order.

What decides the result is passed in; nothing is read from a configuration, and nothing is drawn
from a generator that anything else draws from.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import maybe_set_recommended_wired_limit

from athanor.chat import Tokens
from athanor.console import UserError
from athanor.evaluation import mean_loss, padded, summed_loss


@dataclass(frozen=True)
class Point:
    """Metrics at an iteration, under mlx-lm's names; memory in GB, losses in nats a token."""

    iteration: int
    metrics: dict[str, float]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in an epoch: a permutation of range(count) that (seed, epoch) decide."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(count)]


def batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: every row once an epoch, the last batch what is left."""
    epoch = 0
    while count:
        order = epoch_order(count, seed, epoch)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]
        epoch += 1


@contextmanager
def checkpointed(layer: nn.Module) -> Iterator[None]:
    """While the block runs, layers of this kind keep their inputs only and compute the rest again.

    That is mlx_lm.tuner.trainer's grad_checkpoint, which patches the class for good.
    """
    kind = type(layer)
    call = kind.__call__

    def compute(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        def inner(parameters: Any, *inputs: Any, **named: Any) -> Any:
            module.update(parameters)
            return call(module, *inputs, **named)

        return mx.checkpoint(inner)(module.trainable_parameters(), *inputs, **named)

    kind.__call__ = compute
    try:
        yield
    finally:
        kind.__call__ = call


def train(
    model: nn.Module,
    rows: list[Tokens],
    valid: list[Tokens],
    *,
    seed: int,
    batch_size: int,
    iters: int,
    learning_rate: float,
    val_batches: int,
    steps_per_report: int,
    steps_per_eval: int,
    grad_checkpoint: bool,
    grad_accumulation_steps: int,
    on_iteration: Callable[[int], None],
    on_point: Callable[[Point], None],
) -> None:
    """Trains the trainable parameters of `model` in place, with Adam (Kingma & Ba 2015).

    The loss of an update is the mean over its supervised tokens, whatever rows, paddings and
    accumulated batches they came in. `val_batches` counts batches of `batch_size` rows from the
    beginning of `valid`, the same ones each time; -1 takes them all. Validation is at iteration 0,
    every `steps_per_eval` iterations and at the end.

    Args:
        rows: tokenized rows, already cut; rows with no supervised token must have been left out.
        on_iteration: called after each iteration with its number, from 1.
        on_point: called with each set of metrics as it is known.

    Raises:
        UserError: when the loss is no longer a number.
    """
    held_out = valid if val_batches == -1 else valid[: val_batches * batch_size]
    optimizer = optim.Adam(learning_rate=learning_rate)
    loss_and_grad = nn.value_and_grad(model, summed_loss)

    def validate(iteration: int) -> None:
        model.eval()
        loss, _ = mean_loss(model, held_out, batch_size)
        model.train()
        on_point(Point(iteration, {"val_loss": loss}))

    maybe_set_recommended_wired_limit()  # Metal: keep a large model from being paged out
    mx.random.seed(seed)
    mx.reset_peak_memory()
    validate(0)
    gradient: Any = None
    update_tokens = window_tokens = trained_tokens = 0
    window_loss, window_start, window_steps = 0.0, time.perf_counter(), 0
    for iteration, numbers in enumerate(batches(len(rows), batch_size, seed), 1):
        inputs, targets, mask = padded([rows[i] for i in numbers])
        with checkpointed(model.layers[0]) if grad_checkpoint else nullcontext():
            loss, step_gradient = loss_and_grad(model, inputs, targets, mask)
        tokens = sum(sum(rows[i].supervised[1:]) for i in numbers)
        gradient = step_gradient if gradient is None else tree_map(mx.add, gradient, step_gradient)
        update_tokens += tokens
        if iteration % grad_accumulation_steps == 0 or iteration == iters:
            optimizer.update(model, tree_map(partial(mx.multiply, 1 / update_tokens), gradient))
            gradient, update_tokens = None, 0
        mx.eval(model.trainable_parameters(), optimizer.state, gradient, loss)

        window_loss += loss.item()
        window_tokens += tokens
        window_steps += 1
        on_iteration(iteration)
        if not math.isfinite(window_loss):
            raise UserError(
                f"the loss of iteration {iteration} is {window_loss}: the training diverged; "
                f"try a smaller train.learning_rate than {learning_rate:g}"
            )
        if iteration % steps_per_report == 0 or iteration == iters:
            seconds = time.perf_counter() - window_start
            trained_tokens += window_tokens
            on_point(
                Point(
                    iteration,
                    {
                        "train_loss": window_loss / window_tokens,
                        "learning_rate": learning_rate,
                        "iterations_per_second": window_steps / seconds,
                        "tokens_per_second": window_tokens / seconds,
                        "trained_tokens": trained_tokens,
                        "peak_memory": mx.get_peak_memory() / 1e9,
                    },
                )
            )
            window_loss, window_tokens, window_steps = 0.0, 0, 0
            window_start = time.perf_counter()
        if iteration % steps_per_eval == 0 or iteration == iters:
            paused = time.perf_counter()
            validate(iteration)
            window_start += time.perf_counter() - paused
        if iteration == iters:
            return
