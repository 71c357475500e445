"""The training loop: mlx-lm's models and adapter layers, our batches, loss, order and state.

What decides the result is passed in; nothing is read from a configuration. What an iteration does
depends on the weights, the optimizer's moments and the iteration's number alone: the order of rows
and the dropout come from (seed, epoch, position), and no generator has a state. So a training that
goes on from a checkpoint ends with the same bytes as one that was never interrupted, and looking at
it changes nothing.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from athanor import console, switches
from athanor.compute.arrays import TokenizedText
from athanor.compute.dropouts import replace_dropouts
from athanor.compute.evaluation import measure_loss
from athanor.compute.forward import Forward, PreparedBatch, trainable_weights
from athanor.errors import UserError
from athanor.train.batches import Batch
from athanor.train.checkpoints import Checkpoint, Checkpoints
from athanor.train.learner import Arrays, Learner

# So many updates without any gradient end a training, unless its loss in nats says that there is
# nothing left to learn.
DEAD_UPDATES = 5
LEARNED = 1e-4

LESS_MEMORY = (
    "try a smaller train.batch_size (with more train.grad_accumulation_steps), a smaller "
    "train.max_seq_length, fewer train.num_layers, or train.grad_checkpoint=true"
)


@dataclass(frozen=True)
class Point:
    """Metrics at an iteration, under mlx-lm's names; memory in GB, losses in nats a token."""

    iteration: int
    metrics: dict[str, float]


@dataclass
class State:
    """Where a training stands, besides its arrays. The window is what the next report is about.

    `seconds` are those that it took, all told.
    """

    iteration: int = 0
    trained_tokens: int = 0
    update_tokens: int = 0
    window_loss: float = 0.0
    window_tokens: int = 0
    grad_norm: float | None = None
    validated: int = -1
    best_loss: float = math.inf
    best_iteration: int = 0
    not_better: int = 0
    seconds: float = 0.0
    dead_updates: int = 0
    points: list[Point] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"best_loss": self.best_loss if self.best_iteration else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "State":
        loss = math.inf if value["best_loss"] is None else value["best_loss"]
        points = [Point(**point) for point in value["points"]]
        return cls(**value | {"best_loss": loss, "points": points})


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, met between two iterations."""


class Trainer:
    """Trains what of a model is trainable.

    The loss of an update is the mean over its supervised tokens, whatever rows, paddings,
    accumulated batches and processes they came in. Validation is over all of `valid`, before the
    first iteration, every `steps_per_eval` iterations and at the end.

    Args:
        forward: the model, as the loss and the gradient of a batch.
        batches: the batch of each iteration, from 1.
        optimizer: one that has not been used yet.
        max_grad_norm: the L2 norm that an update's gradient is scaled down to; None for no limit.
        patience: ends the training after so many validations in a row without a better one.
        checkpoints: where to save every `save_every` iterations and on Ctrl-C or SIGTERM.
        name_of: how to name a row, by its number, to a person.
        compile: whether to run the update through mx.compile.
    """

    def __init__(
        self,
        forward: Forward,
        batches: Callable[[int], Batch],
        valid: list[TokenizedText],
        optimizer: optim.Optimizer,
        *,
        seed: int,
        iters: int,
        batch_size: int,
        steps_per_report: int,
        steps_per_eval: int,
        grad_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        compile: bool = False,
        patience: int | None = None,
        save_every: int | None = None,
        checkpoints: Checkpoints | None = None,
        name_of: Callable[[int], str] = lambda row: f"row {row + 1}",
        on_iteration: Callable[[int], None] = lambda iteration: None,
        on_point: Callable[[Point], None] = lambda point: None,
    ) -> None:
        self.forward, self.batches, self.valid = forward, batches, valid
        self.seed, self.iters, self.batch_size = seed, iters, batch_size
        self.steps_per_report, self.steps_per_eval = steps_per_report, steps_per_eval
        self.grad_accumulation_steps = grad_accumulation_steps
        self.patience, self.save_every, self.checkpoints = patience, save_every, checkpoints
        self.name_of, self.on_iteration, self.on_point = name_of, on_iteration, on_point
        self.world = mx.distributed.init()
        self.state = State()
        self.best: Arrays = {}  # the weights after state.best_iteration
        self.dropouts = replace_dropouts(forward.model)
        self.learner = Learner(
            trainable_weights(forward.model), optimizer, max_grad_norm, compile=compile
        )
        self._next: tuple[Batch, PreparedBatch | None] | None = None

    def weights(self) -> Arrays:
        """What is learned, by its names."""
        return dict(self.learner.weights)

    def resume(self) -> int:
        """Goes on from the latest whole checkpoint; returns its iteration, 0 without one."""
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            return 0
        self.state = State.from_json(found.state)
        self.learner.put_back(found.arrays["adapters"], found.arrays["optimizer"])
        self.learner.gradient = found.arrays.get("gradient")
        self.forward.set_weights(self.learner.weights)
        self.best = found.arrays.get("best", {})
        return self.state.iteration

    def predicted_peak(self, longest: TokenizedText, rows: int) -> int:
        """The memory in bytes that an iteration on `rows` rows like the longest will need.

        What a batch needs grows by the same amount with each row of the same length, so one and two
        are computed; then an update is made and taken back. Nothing is trained.

        Raises:
            UserError: where not even that fits.
        """
        learner = self.learner
        weights, moments = self.weights(), dict(tree_flatten(learner.optimizer.state))
        self.forward.model.train()
        mx.eval(moments)
        peaks: list[int] = []
        for count in range(1, min(rows, 2) + 1):
            mx.clear_cache()
            mx.reset_peak_memory()
            with fits():
                ready = self.forward.prepare([longest] * count)
                _, gradient = self.forward.loss_and_gradient(learner.weights, ready)
                mx.eval(gradient)
            peaks.append(mx.get_peak_memory())
        learner.add(gradient)
        del gradient
        mx.reset_peak_memory()
        with fits():
            learner.update(mx.array(0.0))
            mx.eval(learner.weights, learner.optimizer.state)
        learner.put_back(weights, moments)
        self.forward.set_weights(learner.weights)
        size = sum(array.nbytes for array in weights.values())
        # Both phases may hold two more sets of weights: the best so far, and a sum of gradients.
        kept = size * (1 + (self.grad_accumulation_steps > 1))
        backward = peaks[0] + (rows - 1) * (peaks[-1] - peaks[0])
        return max(backward + kept, mx.get_peak_memory())

    def run(self) -> None:
        """Trains to the end; `state`, `best` and the model's own weights are then its result.

        Raises:
            UserError: when a loss or a gradient is no number any more, with the rows it came from.
            KeyboardInterrupt: after Ctrl-C or SIGTERM and a checkpoint.
        """
        switches.wire_memory()
        mx.reset_peak_memory()
        state = self.state
        began = time.perf_counter() - state.seconds
        self._watch = Stopwatch()
        self._saved = state.iteration
        self.forward.model.train()
        with console.defer_interrupts() as noted:
            self._noted = noted
            try:
                while True:
                    ended = state.iteration >= self.iters
                    due = ended or state.iteration % self.steps_per_eval == 0
                    if due and state.validated < state.iteration:
                        self._validate()
                    if self.patience is not None and state.not_better >= self.patience:
                        ended = True
                        if state.window_tokens:
                            self._report()
                    state.seconds = time.perf_counter() - began
                    # At the end, too: writing the results can still be interrupted.
                    if ended or (self.save_every and state.iteration % self.save_every == 0):
                        self._save()
                    if ended:
                        return
                    self._stop_if_asked()
                    self._step()
            except Stopped:
                self._save()
                saved = (
                    f"saved after iteration {self._saved}" if self._saved else "nothing saved yet"
                )
                raise Stopped(saved) from None

    def _step(self) -> None:
        state = self.state
        iteration = state.iteration + 1
        with fits():
            batch, ready = self._next or self._made_ready(iteration)
        self._next = None
        if self.dropouts:
            place = np.random.SeedSequence([self.seed, iteration, self.world.rank()])
            keys = mx.random.key(int(place.generate_state(1, np.uint32)[0]))
            for dropout, key in zip(
                self.dropouts, mx.random.split(keys, len(self.dropouts)), strict=True
            ):
                dropout.set_key(key)
        learner = self.learner
        with fits():
            loss, gradient = self._loss_and_gradient(ready)
            learner.add(gradient)
            del gradient  # an update can have its memory
            state.update_tokens += batch.tokens
            norm = None
            if iteration % self.grad_accumulation_steps == 0 or iteration == self.iters:
                norm = learner.update(mx.array(self.world.size() / state.update_tokens))
                state.update_tokens = 0
            loss = mx.distributed.all_sum(loss)
            asked = [learner.weights, learner.optimizer.state, learner.gradient, loss, norm]
            mx.async_eval(asked)
            if iteration < self.iters:  # while this one is computed
                self._next = self._made_ready(iteration + 1)
            mx.eval(asked)
        self.forward.set_weights(learner.weights)
        if norm is not None:
            state.grad_norm = _number(norm)
        self._refuse_nan(iteration, batch, _number(loss), state.grad_norm or 0.0)
        if norm is not None:
            self._refuse_dead(iteration, _number(loss) / max(batch.tokens, 1))

        state.iteration = iteration
        state.window_loss += _number(loss)
        state.window_tokens += batch.tokens
        self._watch.count(batch.tokens)
        self.on_iteration(iteration)
        if iteration % self.steps_per_report == 0 or iteration == self.iters:
            self._report()

    def _made_ready(self, iteration: int) -> tuple[Batch, PreparedBatch | None]:
        """The batch of an iteration; without arrays where it has no row for this rank."""
        batch = self.batches(iteration)
        return batch, self.forward.prepare(batch.rows) if batch.rows else None

    def _loss_and_gradient(self, ready: PreparedBatch | None) -> tuple[mx.array, Arrays]:
        if ready is None:
            weights = self.learner.weights
            return mx.array(0.0), {name: mx.zeros_like(one) for name, one in weights.items()}
        return self.forward.loss_and_gradient(self.learner.weights, ready)

    def _validate(self) -> None:
        state = self.state
        if not self.valid:
            return
        model = self.forward.model
        with self._watch.paused(), fits():
            model.eval()
            try:
                loss, _ = measure_loss(
                    self.forward, self.valid, self.batch_size, self._stop_if_asked
                )
            finally:
                model.train()
        state.validated = state.iteration
        if not math.isfinite(loss):
            raise UserError(
                f"iteration {state.iteration}: the validation loss is {loss}, so the training "
                f"diverged and was stopped; {self._try()}"
            )
        # Before the first iteration there is nothing yet that could be kept.
        if state.iteration > 0 and loss < state.best_loss:
            state.best_loss, state.best_iteration, state.not_better = loss, state.iteration, 0
            self.best = self.weights()
        elif state.iteration > 0:
            state.not_better += 1
        self._say({"val_loss": loss})

    def _report(self) -> None:
        state = self.state
        state.trained_tokens += state.window_tokens
        metrics = {
            "train_loss": state.window_loss / state.window_tokens,
            # float32 as a person would write it: 0.0002, not 0.00019999999494757503
            "learning_rate": float(f"{_number(self.learner.optimizer.learning_rate):.7g}"),
            "trained_tokens": state.trained_tokens,
        }
        if state.grad_norm is not None:
            metrics["grad_norm"] = state.grad_norm
        metrics |= self._watch.speeds()
        metrics |= {
            "peak_memory": mx.get_peak_memory() / 1e9,
            "active_memory": mx.get_active_memory() / 1e9,
        }
        state.window_loss, state.window_tokens = 0.0, 0
        self._say(metrics)

    def _say(self, metrics: dict[str, float]) -> None:
        point = Point(self.state.iteration, metrics)
        self.state.points.append(point)
        self.on_point(point)

    def _refuse_nan(self, iteration: int, batch: Batch, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, numbers = f"the loss is {loss}", batch.numbers
        if math.isfinite(loss):  # any of the batches that were summed can be the one
            what = f"the gradient is {norm} long"
            first = (iteration - 1) // self.grad_accumulation_steps * self.grad_accumulation_steps
            numbers = [row for i in range(first, iteration) for row in self.batches(i + 1).numbers]
        rows = ", ".join(self.name_of(row) for row in numbers[:16])
        rows += f" and {len(numbers) - 16} more" if len(numbers) > 16 else ""
        raise UserError(
            f"iteration {iteration}: {what}, so the training diverged and was stopped\n"
            f"  rows of this batch: {rows}\n  look at them, and {self._try()}"
        )

    def _refuse_dead(self, iteration: int, loss: float) -> None:
        """Stops where nothing is learned any more, as after a far too great learning rate.

        A model whose weights have grown beyond measure says the same to everything: its gradient is
        0 to the last bit, and its loss, often not the worst, stays for good.
        """
        dead = self.state.grad_norm == 0.0 and loss > LEARNED
        self.state.dead_updates = self.state.dead_updates + 1 if dead else 0
        if self.state.dead_updates == DEAD_UPDATES:
            raise UserError(
                f"iteration {iteration}: {DEAD_UPDATES} updates in a row had a gradient of 0 at a "
                f"loss of {loss:.4f}, so the training diverged and was stopped; {self._try()}"
            )

    def _try(self) -> str:
        rate = _number(self.learner.optimizer.learning_rate)
        return (
            f"try a smaller train.learning_rate (here it was {rate:g}), some train.warmup, or "
            "train.max_grad_norm"
        )

    def _save(self) -> None:
        if self.checkpoints is None or self.world.rank() != 0:
            return
        if self._saved >= self.state.iteration:
            return
        weights, gradient = self.weights(), self.learner.gradient
        if not all(mx.isfinite(array).all().item() for array in weights.values()):
            return  # the next iteration says so; what was saved before stays the last good state
        arrays = {
            "adapters": weights,
            "optimizer": dict(tree_flatten(self.learner.optimizer.state)),
            "gradient": gradient or {},
            "best": self.best,
        }
        found = Checkpoint(
            self.state.iteration,
            {group: named for group, named in arrays.items() if named},
            self.state.as_json(),
        )
        with self._watch.paused():
            if self.checkpoints.save(found):
                self._saved = found.iteration

    def _stop_if_asked(self) -> None:
        if self._noted():
            raise Stopped


def _number(array: mx.array) -> float:
    return cast(float, array.item())


@contextmanager
def fits() -> Iterator[None]:
    """Turns mlx's errors about memory into one that a person can act on."""
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error).lower() and "memory" not in str(error).lower():
            raise
        raise UserError(f"the memory does not suffice ({error}): {LESS_MEMORY}") from error


class Stopwatch:
    """How long the iterations since the last report took, without what came between them."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._tokens = time.perf_counter(), 0, 0

    def count(self, tokens: int) -> None:
        """Counts an iteration."""
        self._steps += 1
        self._tokens += tokens

    def speeds(self) -> dict[str, float]:
        """The speeds since the last call."""
        seconds = time.perf_counter() - self._start
        found = {
            "iterations_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._reset()
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what the block takes."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
