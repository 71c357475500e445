"""The training loop: mlx-lm's models and adapter layers, our batches, loss, order and state.

Everything that decides the result is passed in; nothing is read from a configuration. An iteration
depends on the weights, the optimizer's moments and the iteration's number alone: the order of rows
and the dropout follow from (seed, epoch, position), and no generator has a state. So a training
that resumes from a checkpoint ends with the same bytes as one that was never interrupted, and
validating more often changes nothing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim
import msgspec
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
from athanor.train.memory import explain_out_of_memory
from athanor.train.metrics import Metrics, Stopwatch
from athanor.train.plan import Hooks, TrainingPlan

# So many updates without any gradient end a training, unless its loss in nats shows that nothing
# is left to learn.
DEAD_UPDATES = 5
LEARNED_LOSS = 1e-4
# An error names at most so many rows of a batch.
ROWS_NAMED = 16


@dataclass
class State:
    """The progress of a training, besides its arrays.

    The window is the iterations since the last report; `seconds` are those of all sessions;
    `best_loss` is None before the first validation that counts.
    """

    iteration: int = 0
    trained_tokens: int = 0
    update_tokens: int = 0
    window_loss: float = 0.0
    window_tokens: int = 0
    grad_norm: float | None = None
    validated: int = -1
    best_loss: float | None = None
    best_iteration: int = 0
    not_better: int = 0
    seconds: float = 0.0
    dead_updates: int = 0
    history: list[Metrics] = field(default_factory=list)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, met between two iterations."""


class Trainer:
    """Trains what of a model is trainable.

    The loss of an update is the mean over its supervised tokens, whatever rows, paddings and
    accumulated batches they came in. Validation is over all of `valid`, before the first iteration,
    every `steps_per_eval` iterations and at the end.

    Args:
        plan: its numbers.
        forward: the model, as the loss and the gradient of a batch.
        batches: the batch of each iteration, from 1.
        valid: the rows of the validation; none, no validation.
        optimizer: one that has not been used yet.
        checkpoints: the place to save every `save_every` iterations and on Ctrl-C or SIGTERM.
        hooks: functions that are called on the way.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        forward: Forward,
        batches: Callable[[int], Batch],
        valid: list[TokenizedText],
        optimizer: optim.Optimizer,
        checkpoints: Checkpoints | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.plan, self.forward, self.batches, self.valid = plan, forward, batches, valid
        self.checkpoints, self.hooks = checkpoints, hooks or Hooks()
        self.state = State()
        self.best: Arrays = {}  # the weights after state.best_iteration
        self.dropouts = replace_dropouts(forward.model)
        self.learner = Learner(
            trainable_weights(forward.model), optimizer, plan.max_grad_norm, compile=plan.compile
        )
        self._next: tuple[Batch, PreparedBatch] | None = None
        self._stopwatch = Stopwatch()
        self._saved = 0  # the iteration of the last checkpoint
        self._interrupted: Callable[[], bool] = lambda: False

    def resume(self) -> int:
        """Restore the latest whole checkpoint; return its iteration, 0 without one."""
        checkpoint = self.checkpoints.latest() if self.checkpoints else None
        if checkpoint is None:
            return 0
        arrays = checkpoint.arrays
        self.state = msgspec.convert(checkpoint.state, State)
        self.learner.put_back(arrays["adapters"], arrays["optimizer"])
        self.learner.gradient = arrays.get("gradient")
        self.forward.set_weights(self.learner.weights)
        self.best = arrays.get("best", {})
        return self.state.iteration

    def run(self) -> None:
        """Train to the end; `state`, `best` and the learner's weights are then the result.

        Raises:
            UserError: where a loss or a gradient is not finite, with the rows of the batch.
            KeyboardInterrupt: after Ctrl-C or SIGTERM and a checkpoint.
        """
        switches.wire_memory()
        mx.reset_peak_memory()
        state, plan = self.state, self.plan
        start = time.perf_counter() - state.seconds
        self._stopwatch = Stopwatch()
        self._saved = state.iteration
        self.forward.model.train()
        with console.defer_interrupts() as self._interrupted:
            try:
                while True:
                    ended = state.iteration >= plan.iters
                    due = ended or state.iteration % plan.steps_per_eval == 0
                    if due and state.validated < state.iteration:
                        self._validate()
                    if plan.patience is not None and state.not_better >= plan.patience:
                        ended = True
                        if state.window_tokens:
                            self._report()
                    state.seconds = time.perf_counter() - start
                    # Also at the end: writing the results can still be interrupted.
                    if ended or (plan.save_every and state.iteration % plan.save_every == 0):
                        self._save()
                    if ended:
                        return
                    self._stop_if_interrupted()
                    self._step()
            except Stopped:
                self._save()
                saved = (
                    f"saved after iteration {self._saved}" if self._saved else "nothing saved yet"
                )
                raise Stopped(saved) from None

    def _step(self) -> None:
        state, plan = self.state, self.plan
        iteration = state.iteration + 1
        with explain_out_of_memory():
            batch, ready = self._next or self._prepare_batch(iteration)
        self._next = None
        if self.dropouts:
            seeds = np.random.SeedSequence([plan.seed, iteration, 0])
            keys = mx.random.key(int(seeds.generate_state(1, np.uint32)[0]))
            for dropout, key in zip(
                self.dropouts, mx.random.split(keys, len(self.dropouts)), strict=True
            ):
                dropout.set_key(key)
        learner = self.learner
        with explain_out_of_memory():
            loss, gradient = self.forward.loss_and_gradient(learner.weights, ready)
            learner.add(gradient)
            del gradient  # an update can have its memory
            state.update_tokens += batch.tokens
            norm = None
            if iteration % plan.grad_accumulation_steps == 0 or iteration == plan.iters:
                norm = learner.update(mx.array(1 / state.update_tokens))
                state.update_tokens = 0
            computed = [learner.weights, learner.optimizer.state, learner.gradient, loss, norm]
            mx.async_eval(computed)
            if iteration < plan.iters:  # while this iteration is computed
                self._next = self._prepare_batch(iteration + 1)
            mx.eval(computed)
        self.forward.set_weights(learner.weights)
        if norm is not None:
            state.grad_norm = _number(norm)
        self._check_finite(iteration, batch, _number(loss), state.grad_norm or 0.0)
        if norm is not None:
            self._check_gradient(iteration, _number(loss) / max(batch.tokens, 1))

        state.iteration = iteration
        state.window_loss += _number(loss)
        state.window_tokens += batch.tokens
        self._stopwatch.count_iteration(batch.tokens)
        self.hooks.on_iteration(iteration)
        if iteration % plan.steps_per_report == 0 or iteration == plan.iters:
            self._report()

    def _prepare_batch(self, iteration: int) -> tuple[Batch, PreparedBatch]:
        batch = self.batches(iteration)
        return batch, self.forward.prepare(batch.rows)

    def _validate(self) -> None:
        state = self.state
        if not self.valid:
            return
        model = self.forward.model
        with self._stopwatch.paused(), explain_out_of_memory():
            model.eval()
            try:
                loss, _ = measure_loss(
                    self.forward, self.valid, self.plan.batch_size, self._stop_if_interrupted
                )
            finally:
                model.train()
        state.validated = state.iteration
        if not math.isfinite(loss):
            raise UserError(
                "train.validation_diverged", iteration=state.iteration, loss=loss, rate=self._rate()
            )
        # Before the first iteration there is nothing yet that could be kept.
        if state.iteration > 0 and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_iteration, state.not_better = loss, state.iteration, 0
            self.best = self.learner.weights
        elif state.iteration > 0:
            state.not_better += 1
        self._publish({"val_loss": loss})

    def _report(self) -> None:
        state = self.state
        state.trained_tokens += state.window_tokens
        metrics = {
            "train_loss": state.window_loss / state.window_tokens,
            "learning_rate": self._rate(),
            "trained_tokens": state.trained_tokens,
        }
        if state.grad_norm is not None:
            metrics["grad_norm"] = state.grad_norm
        metrics |= self._stopwatch.take_speeds()
        metrics |= {
            "peak_memory": mx.get_peak_memory() / 1e9,
            "active_memory": mx.get_active_memory() / 1e9,
        }
        state.window_loss, state.window_tokens = 0.0, 0
        self._publish(metrics)

    def _publish(self, values: dict[str, int | float]) -> None:
        metrics = Metrics(self.state.iteration, values)
        self.state.history.append(metrics)
        self.hooks.on_metrics(metrics)

    def _check_finite(self, iteration: int, batch: Batch, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                "train.loss_diverged",
                iteration=iteration,
                loss=loss,
                count=len(batch.numbers),
                rows=self._name_rows(batch.numbers),
                rate=self._rate(),
            )
        if not math.isfinite(norm):  # any of the batches that were summed can be the cause
            steps = self.plan.grad_accumulation_steps
            first = (iteration - 1) // steps * steps
            numbers = [row for i in range(first, iteration) for row in self.batches(i + 1).numbers]
            raise UserError(
                "train.gradient_diverged",
                iteration=iteration,
                norm=norm,
                count=len(numbers),
                rows=self._name_rows(numbers),
                rate=self._rate(),
            )

    def _name_rows(self, numbers: list[int]) -> list[str]:
        return [self.hooks.name_row(number) for number in numbers[:ROWS_NAMED]]

    def _check_gradient(self, iteration: int, loss: float) -> None:
        """Raise where nothing is learned any more, as after a far too great learning rate.

        A model whose weights have grown beyond measure answers every row alike: its gradient is 0
        to the last bit, and its loss, often not the worst, stays for good.
        """
        dead = self.state.grad_norm == 0.0 and loss > LEARNED_LOSS
        self.state.dead_updates = self.state.dead_updates + 1 if dead else 0
        if self.state.dead_updates == DEAD_UPDATES:
            raise UserError(
                "train.gradient_vanished",
                iteration=iteration,
                updates=DEAD_UPDATES,
                loss=loss,
                rate=self._rate(),
            )

    def _rate(self) -> float:
        """Return the learning rate in decimal: 0.0002, not float32's 0.00019999999494757503."""
        return float(f"{_number(self.learner.optimizer.learning_rate):.7g}")

    def _save(self) -> None:
        if self.checkpoints is None or self._saved >= self.state.iteration:
            return
        weights, gradient = self.learner.weights, self.learner.gradient
        if not all(mx.isfinite(array).all().item() for array in weights.values()):
            return  # the next iteration raises; the last good checkpoint stays
        arrays = {
            "adapters": weights,
            "optimizer": dict(tree_flatten(self.learner.optimizer.state)),
            "gradient": gradient or {},
            "best": self.best,
        }
        checkpoint = Checkpoint(
            self.state.iteration,
            {group: named for group, named in arrays.items() if named},
            asdict(self.state),
        )
        with self._stopwatch.paused():
            if self.checkpoints.save(checkpoint):
                self._saved = checkpoint.iteration

    def _stop_if_interrupted(self) -> None:
        if self._interrupted():
            raise Stopped


def _number(array: mx.array) -> float:
    return cast(float, array.item())
