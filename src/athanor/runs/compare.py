"""Records of runs, and the differences between two: rows, configurations, weights, metrics.

Artifacts are fetched from the tracking store to a folder of the caller's when they are needed.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import files
from athanor.errors import UserError
from athanor.runs import lineage, tracking_store

if TYPE_CHECKING:
    import numpy as np

# Machine-dependent metrics, which differ between equal trainings.
MEASURED = {
    *("iterations_per_second", "tokens_per_second", "train_seconds"),
    *("peak_memory", "active_memory"),
}
# Metrics of the rows, not of the training.
COUNTS = {"train_rows", "valid_rows", "test_rows", "rejected_rows"}


@dataclass(frozen=True)
class RunRecord:
    """MLflow's record of a run; `folder` receives the artifacts that are fetched."""

    id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    datasets: dict[str, str]
    folder: Path

    def fetch_artifact(self, path: str) -> Path | None:
        """Return a fetched artifact, None if the run has none of that name.

        Raises:
            UserError: if the store, or the place of its artifacts, is unreachable.
        """
        parent = path.rpartition("/")[0]
        with tracking_store.report_errors():
            client = tracking_store.connect()
            if path not in {kept.path for kept in client.list_artifacts(self.id, parent or None)}:
                return None
            return Path(client.download_artifacts(self.id, path, str(self.folder)))

    @cached_property
    def rows(self) -> "dict[str, np.ndarray]":
        """The digests of its rows by split; empty if they were not recorded."""
        import numpy as np

        path = self.fetch_artifact(f"data/{lineage.ROWS}")
        if path is None:
            return {}
        with np.load(path) as kept:
            return {split: kept[split] for split in kept.files}

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions of libraries and machine by name; empty if they were not recorded."""
        path = self.fetch_artifact(lineage.VERSIONS)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path else {}


@dataclass(frozen=True)
class RowChanges:
    """Differences between two lists of rows; rows are counted from 1, as lines of a file are."""

    only_a: list[int]
    only_b: list[int]
    same: int
    reordered: bool

    def differ(self) -> bool:
        """Return whether there is any difference."""
        return bool(self.only_a or self.only_b or self.reordered)


def load_record(prefix: str, folder: Path) -> RunRecord:
    """Return the record of the run whose id begins with `prefix`.

    Raises:
        UserError: as tracking_store.find_run does.
    """
    run = tracking_store.find_run(prefix)
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        datasets={read.dataset.name: read.dataset.digest for read in run.inputs.dataset_inputs},
        folder=folder,
    )


def fetch_adapters(prefix: str, folder: Path) -> tuple[str, Path]:
    """Fetch the adapters of the run whose id begins with `prefix`; return its id and their folder.

    `folder` has a folder for each run; adapters that are there are not fetched again.

    Raises:
        UserError: as `load_record` does, and where the run has no adapters.
    """
    with tempfile.TemporaryDirectory() as temporary:
        record = load_record(prefix, Path(temporary))
        target = folder / record.id
        if not target.exists():
            kept = record.fetch_artifact("adapters")
            if kept is None:
                raise UserError("runs.no_adapters", run=record.id, name=record.name)
            with files.whole_folder(target) as new:
                shutil.copytree(kept, new, dirs_exist_ok=True)
    return record.id, target


def list_children(record: RunRecord) -> str:
    """Return a line for each of the five children of a run with the lowest validation loss."""
    with tracking_store.report_errors():
        client = tracking_store.connect()
        children = client.search_runs(
            [client.get_run(record.id).info.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{record.id}'",
            max_results=5,
            order_by=["metrics.kept_val_loss ASC"],
        )
    return tracking_store.list_runs([tracking_store.summarize_run(run) for run in children])


def compare_rows(a: "np.ndarray", b: "np.ndarray") -> RowChanges:
    """Return the differences between two splits by their rows' digests, uint64 in order.

    A row that both contain several times counts as often.
    """
    first, second = a.tolist(), b.tolist()
    only_a, only_b = _list_missing(first, second), _list_missing(second, first)
    gone, new = set(only_a), set(only_b)
    common_a = [digest for line, digest in enumerate(first, 1) if line not in gone]
    common_b = [digest for line, digest in enumerate(second, 1) if line not in new]
    return RowChanges(only_a, only_b, len(common_a), common_a != common_b)


def _list_missing(digests: list[int], other: list[int]) -> list[int]:
    """Return the lines of the digests that `other` lacks."""
    left = Counter(other)
    lines = []
    for line, digest in enumerate(digests, 1):
        if left[digest]:
            left[digest] -= 1
        else:
            lines.append(line)
    return lines


def list_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both; None stands for a missing key."""
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def select_results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that an equal training repeats: no speeds, memory or counts of rows."""
    return {k: v for k, v in metrics.items() if k not in MEASURED and k not in COUNTS}


def measure_weight_difference(a: Path, b: Path) -> float | None:
    """Return the greatest difference of two files of weights, relative to `a`'s greatest weight.

    None if their names or shapes differ.
    """
    first, second = (_load_weights(path) for path in (a, b))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return None
    greatest = max(float(abs(value).max()) for value in first.values())
    difference = max(float(abs(first[name] - second[name]).max()) for name in first)
    return difference / greatest if greatest else difference


def _load_weights(path: Path) -> dict[str, Any]:
    import mlx.core as mx

    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    return {name: value.astype(mx.float32) for name, value in weights.items()}
