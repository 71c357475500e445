"""The differences between two runs, a line each."""

from pathlib import Path

import pytest

from athanor import diff
from athanor.runs import compare, tracking_store
from support.records import create_run
from support.refused import refused


def test_a_sweep_is_not_compared_with_a_training(runs_store: Path, tmp_path: Path) -> None:
    client = tracking_store.connect()
    sweep = create_run(tags={"athanor.sweep": "s"})
    parent = compare.load_record(sweep, tmp_path)
    with refused("diff.empty_sweep", run=sweep):
        diff.refuse_sweep(parent)
    child, better = (create_run(tags={"mlflow.parentRunId": sweep}) for _ in range(2))
    client.log_metric(child, "kept_val_loss", 2.0)
    client.log_metric(better, "kept_val_loss", 1.0)
    with refused("diff.sweep", run=sweep) as refusal:
        diff.refuse_sweep(parent)
    children = refusal.value.facts["children"].splitlines()
    assert [line.split()[0] for line in children] == [better, child]
    diff.refuse_sweep(compare.load_record(child, tmp_path))


def test_values_that_differ_are_named_shortly() -> None:
    first, second = {"betas": [0.9, 0.99], "eps": 1e-8}, {"betas": [0.9, 0.95], "eps": 1e-8}
    assert list(diff.describe_change("train.optimizer", str(first), str(second))) == [
        "train.optimizer.betas: [0.9, 0.99] -> [0.9, 0.95]"
    ]
    long = "a long prompt\n" * 20
    [line] = diff.describe_change("data.system", long + "one", long + "two")
    assert "\n" not in line
    assert len(line) < 160
    assert line.endswith("long prompt two")
    [line] = diff.describe_change("data.system", None, long)
    assert line.startswith("data.system: – -> a long prompt")
    assert len(line) < 90


def test_other_threads_are_one_line_of_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.RunRecord, "fetch_artifact", lambda self, path: None)
    a, b = (
        compare.RunRecord(
            *("1", "a run", "FINISHED"),
            {"device": f"cpu x86_64 (OpenBLAS 0.3.21 Zen, {threads})"},
            {"train.blas_threads": threads[0]},
            *({}, {}, tmp_path),
        )
        for threads in ("2 threads", "1 thread")
    )
    assert list(diff.list_differences(a, b)) == [
        "device: cpu x86_64 (OpenBLAS 0.3.21 Zen, 2 threads) -> "
        "cpu x86_64 (OpenBLAS 0.3.21 Zen, 1 thread)"
    ]
