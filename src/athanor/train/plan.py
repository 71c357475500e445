"""The plan of a training: its numbers, and the functions that are called as it proceeds."""

from collections.abc import Callable
from dataclasses import dataclass

from athanor.config.schema import Config
from athanor.device.backend import on_cpu
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.train.metrics import Metrics

# A training of more iterations is one that train.iters asks for, not one that epochs come to.
MOST_BY_EPOCHS = 1_000_000


def count_iterations(iters: int | None, epochs: int | None, batches_per_epoch: int) -> int:
    """Return the iterations of a training of so many iterations, or epochs.

    Raises:
        UserError: where the epochs come to more than MOST_BY_EPOCHS.
    """
    if iters is not None:
        return iters
    assert epochs is not None  # the configuration's check: one of the two has a value
    iterations = epochs * batches_per_epoch
    if iterations > MOST_BY_EPOCHS:
        raise UserError(
            "train.too_many_iterations",
            iterations=iterations,
            epochs=epochs,
            batches=batches_per_epoch,
            most=MOST_BY_EPOCHS,
        )
    return iterations


def refuse_too_many_iterations(workspace: Workspace, epochs: int, batch_size: int) -> None:
    """Raise UserError where the epochs, over the prepared rows, come to too many iterations."""
    path = workspace.rows("train")
    if epochs and path.exists():
        with path.open("rb") as file:
            rows = sum(1 for _ in file)
        count_iterations(None, epochs, -(-rows // batch_size))


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of a training, under the names of the configuration's keys.

    `iters`, `steps_*`, `save_every` are in iterations. `max_grad_norm` is the L2 norm that an
    update's gradient is scaled down to, None for no limit; `patience` ends the training after so
    many validations in a row without a better one; `compile` runs the update through mx.compile.
    """

    seed: int
    iters: int
    batch_size: int
    steps_per_report: int
    steps_per_eval: int
    grad_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    compile: bool = False
    patience: int | None = None
    save_every: int | None = None

    @classmethod
    def from_config(cls, cfg: Config, batches_per_epoch: int) -> "TrainingPlan":
        """Return the plan of a configuration, whose epochs have so many batches.

        Raises:
            UserError: where the epochs come to too many iterations.
        """
        train = cfg.train
        return cls(
            seed=cfg.seed,
            iters=count_iterations(train.iters, train.epochs, batches_per_epoch),
            batch_size=train.batch_size,
            steps_per_report=train.steps_per_report,
            steps_per_eval=train.steps_per_eval,
            grad_accumulation_steps=train.grad_accumulation_steps,
            max_grad_norm=train.max_grad_norm,
            compile=train.compile if train.compile is not None else not on_cpu(),
            patience=train.patience,
            save_every=train.save_every,
        )

    @property
    def updates(self) -> int:
        """The number of updates: one each grad_accumulation_steps iterations and at the end."""
        return -(-self.iters // self.grad_accumulation_steps)


@dataclass(frozen=True)
class Hooks:
    """Functions that a training calls; `name_row` names a row of its batches in an error."""

    on_iteration: Callable[[int], None] = lambda iteration: None
    on_metrics: Callable[[Metrics], None] = lambda metrics: None
    name_row: Callable[[int], str] = lambda row: f"row {row + 1}"
