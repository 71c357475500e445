"""The length of a training: its iterations, or those that its epochs come to."""

from pathlib import Path

import pytest

from athanor.paths import Workspace
from athanor.train.plan import count_iterations, refuse_too_many_iterations
from support.refused import refused


@pytest.mark.parametrize(
    ("iters", "epochs", "batches", "count"),
    [
        (5, None, 3, 5),
        (None, 5, 3, 15),
        (None, 1_000_000, 1, 1_000_000),
        (5_000_000, None, 1, 5_000_000),  # asked for
    ],
)
def test_epochs_are_passes_over_all_batches(
    iters: int | None, epochs: int | None, batches: int, count: int
) -> None:
    assert count_iterations(iters, epochs, batches) == count


def test_epochs_without_an_end_are_refused_before_any_work(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    refuse_too_many_iterations(workspace, 10**9, 1)  # nothing is prepared, which is said elsewhere
    workspace.prepared.mkdir(parents=True)
    workspace.rows("train").write_bytes(b"{}\n" * 7)
    refuse_too_many_iterations(workspace, 500_000, 4)
    with refused("train.too_many_iterations", iterations=1_000_002, batches=2):
        refuse_too_many_iterations(workspace, 500_001, 4)
