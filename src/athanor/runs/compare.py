"""Runs found again, and what differs between them: rows, configurations, weights, metrics.

Reads the store; artifacts that are needed are fetched to a folder of the caller's.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import switches
from athanor.runs import lineage, tracking_store

if TYPE_CHECKING:
    import numpy as np

# What depends on the machine's mood.
MEASURED = {
    *("iterations_per_second", "tokens_per_second", "train_seconds"),
    *("peak_memory", "active_memory"),
}
# Metrics that say of which rows they are, and nothing of what became of them.
COUNTS = {"train_rows", "valid_rows", "test_rows", "rejected_rows"}


@dataclass(frozen=True)
class RunRecord:
    """A run as its record has it; its artifacts are fetched to `folder` when they are asked for."""

    id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    datasets: dict[str, str]
    folder: Path

    def fetch_artifact(self, path: str) -> Path | None:
        """A file that the run keeps, fetched; None where it keeps none of that name.

        Raises:
            UserError: where the store, or where it keeps files, is away.
        """
        parent = path.rpartition("/")[0]
        switches.configure_mlflow()
        with tracking_store.report_errors():
            client = tracking_store.connect()
            if path not in {kept.path for kept in client.list_artifacts(self.id, parent or None)}:
                return None
            return Path(client.download_artifacts(self.id, path, str(self.folder)))

    @cached_property
    def rows(self) -> "dict[str, np.ndarray] | None":
        """The digests of its rows by split; None for a run of before they were kept."""
        import numpy as np

        path = self.fetch_artifact(f"data/{lineage.ROWS}")
        if path is None:
            return None
        with np.load(path) as kept:
            return {split: kept[split] for split in kept.files}

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions by name; of a run of before they were kept, those that its tags have."""
        path = self.fetch_artifact(lineage.VERSIONS)
        if path is not None:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        tagged = {"mlx": "mlx.version", "mlx-lm": "mlx_lm.version"}
        return {name: self.tags[tag] for name, tag in tagged.items() if tag in self.tags}


@dataclass(frozen=True)
class RowChanges:
    """How two lists of rows differ; places are counted from 1, as lines of a file are."""

    only_a: list[int]
    only_b: list[int]
    same: int
    reordered: bool

    def differ(self) -> bool:
        return bool(self.only_a or self.only_b or self.reordered)


def load_record(beginning: str, folder: Path) -> RunRecord:
    """The run whose id begins so; `folder` is for its artifacts.

    Raises:
        UserError: as store.find does.
    """
    run = tracking_store.find_run(beginning)
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        datasets={made.dataset.name: made.dataset.digest for made in run.inputs.dataset_inputs},
        folder=folder,
    )


def list_children(made: RunRecord, most: int = 5) -> list[str]:
    """A line for each part of a run, those with the lowest validation loss first."""
    with tracking_store.report_errors():
        client = tracking_store.connect()
        found = client.search_runs(
            [client.get_run(made.id).info.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{made.id}'",
            max_results=most,
            order_by=["metrics.kept_val_loss ASC"],
        )
    return [f"{run.info.run_id}  {run.info.run_name} ({run.info.status})" for run in found]


def compare_rows(a: "np.ndarray", b: "np.ndarray") -> RowChanges:
    """How the rows of two splits differ, by their digests: uint64, in their order.

    A row that is in both several times counts as often as it is.
    """
    first, second = a.tolist(), b.tolist()
    only_a, only_b = _not_in(first, second), _not_in(second, first)
    gone, new = set(only_a), set(only_b)
    kept = [digest for line, digest in enumerate(first, 1) if line not in gone]
    order = [digest for line, digest in enumerate(second, 1) if line not in new]
    return RowChanges(only_a, only_b, len(kept), kept != order)


def _not_in(these: list[int], those: list[int]) -> list[int]:
    left = Counter(those)
    places = []
    for line, digest in enumerate(these, 1):
        if left[digest]:
            left[digest] -= 1
        else:
            places.append(line)
    return places


def list_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both; None stands for a key that is not there."""
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def select_results(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that the same training has again: no speeds, memory or counts of rows."""
    return {k: v for k, v in metrics.items() if k not in MEASURED and k not in COUNTS}


def measure_weight_difference(a: Path, b: Path) -> float | None:
    """The greatest difference of two files of weights, relative to the greatest weight in `a`.

    None where they are not weights of the same names and shapes.
    """
    first, second = (_weights(path) for path in (a, b))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return None
    greatest = max(_greatest(value) for value in first.values())
    apart = max(_greatest(first[name] - second[name]) for name in first)
    return apart / greatest if greatest else apart


def _greatest(array: Any) -> float:
    import mlx.core as mx

    return float(mx.abs(array).max())


def _weights(path: Path) -> dict[str, Any]:
    import mlx.core as mx

    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return {name: value.astype(mx.float32) for name, value in loaded.items()}
