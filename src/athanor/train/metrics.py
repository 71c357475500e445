"""The metrics of a training: values at an iteration, and the speeds among them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from athanor import files

# Machine-dependent metrics, left out of history.csv so that equal runs leave equal bytes.
MACHINE_DEPENDENT = {
    "iterations_per_second",
    "tokens_per_second",
    "peak_memory",
    "active_memory",
}


@dataclass(frozen=True)
class Metrics:
    """Values at an iteration, under mlx-lm's names; memory in GB, losses in nats a token."""

    iteration: int
    values: dict[str, int | float]  # a checkpoint restores counts as counts

    def __str__(self) -> str:
        formats = {
            "train_loss": "train loss {:.4f}",
            "val_loss": "validation loss {:.4f}",
            "tokens_per_second": "{:.0f} tokens/s",
            "peak_memory": "peak {:.2f} GB",
        }
        values = self.values
        shown = [form.format(values[key]) for key, form in formats.items() if key in values]
        return f"iteration {self.iteration:>5}  " + "  ".join(shown)


def history_csv(history: list[Metrics]) -> str:
    """Return metrics as CSV: a line an iteration, a column a metric, empty where it has no value.

    The machine-dependent ones are left out.
    """
    rows: dict[int, dict[str, float]] = {}
    for metrics in history:
        values = {k: v for k, v in metrics.values.items() if k not in MACHINE_DEPENDENT}
        rows.setdefault(metrics.iteration, {}).update(values)
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    return files.csv_text(
        ["iteration", *columns],
        ([iteration, *(row.get(key, "") for key in columns)] for iteration, row in rows.items()),
    )


class Stopwatch:
    """The speed of the iterations since the last report, without pauses between them."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._iterations, self._tokens = time.perf_counter(), 0, 0

    def count_iteration(self, tokens: int) -> None:
        """Count an iteration on so many supervised tokens."""
        self._iterations += 1
        self._tokens += tokens

    def take_speeds(self) -> dict[str, float]:
        """Return the speeds since the last call."""
        seconds = time.perf_counter() - self._start
        speeds = {
            "iterations_per_second": self._iterations / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._reset()
        return speeds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
