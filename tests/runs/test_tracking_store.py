"""Processes that write to one SQLite store at once, and a store that fails for a moment."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from athanor.paths import Workspace
from athanor.runs import run as run_module
from athanor.runs import tracking_store
from athanor.runs.entries import AnyEntry, Dataset, EndRun
from athanor.runs.outbox import Journal
from athanor.runs.run import start_run

PROCESSES, ROUNDS, STEPS = 8, 5, 30
KEYS = ("train_loss", "val_loss")


def record(number: int, folder: Path, barrier: Any) -> None:
    """Record a run in each round's store, which none of the processes finds there."""
    rows = Dataset("train.jsonl", "training", "0" * 64, 6)
    params = {f"train.key_{i}": i for i in range(30)}
    for stored in range(ROUNDS):
        os.chdir(folder / f"round {stored}")
        barrier.wait()
        with start_run(f"run {number}", params, {"number": number}, [rows]) as run:
            for step in range(1, STEPS + 1):
                run.log_metrics(step, dict.fromkeys(KEYS, number * 1000 + step), once=True)
                if step == STEPS // 2:
                    run.set_tags({"half": "way"})
            run.log_text(f"seed: {number}", "params.yaml")


def record_together(folder: Path) -> int:
    """Fork the processes from one that has imported MLflow; return how many failed."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)
    workers = [
        context.Process(target=record, args=(number, folder, barrier))
        for number in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


def test_eight_processes_at_once_on_a_store_that_is_not_there(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        (tmp_path / f"round {number}").mkdir()
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"MLFLOW_LOGGING_LEVEL": "WARNING"},  # as tracking_store sets it
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for number in range(ROUNDS):
        assert_complete(tmp_path / f"round {number}")


def assert_complete(folder: Path) -> None:
    from support import mlflow_store

    assert list((folder / "mlruns/outbox").iterdir()) == []
    client = mlflow_store.connect(folder)
    assert {one.name for one in client.search_experiments()} == {"Default", "athanor"}
    runs = {int(run.data.tags["number"]): run for run in mlflow_store.list_runs(folder)}
    assert sorted(runs) == list(range(PROCESSES))
    for number, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["half"] == "way"
        assert run.data.params == {f"train.key_{i}": str(i) for i in range(30)}
        assert len(run.inputs.dataset_inputs) == 1
        for key in KEYS:
            values = mlflow_store.read_metric(folder, run.info.run_id, key)
            assert values == [(step, number * 1000 + step) for step in range(1, STEPS + 1)], key
        text = mlflow_store.fetch_artifact(folder, run.info.run_id, "params.yaml").read_text()
        assert text == f"seed: {number}"


def test_a_run_that_was_just_created_when_its_store_failed_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where two processes add the same dataset at once, and neither has more to record."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_TRIES", 0.2)
    log_inputs, append = MlflowClient.log_inputs, Journal.append
    ended = threading.Event()
    failed: list[str] = []

    def fail_until_the_end(self: Any, run: str, *inputs: Any) -> None:
        """Fail while the run is open, and once more when its last entry is there."""
        if len(failed) < 2:
            failed.append(run)
            ended.wait()
            raise OSError("UNIQUE constraint failed")
        log_inputs(self, run, *inputs)

    def append_and_note_the_end(self: Journal, entry: AnyEntry) -> None:
        append(self, entry)
        if isinstance(entry, EndRun):
            ended.set()

    monkeypatch.setattr(MlflowClient, "log_inputs", fail_until_the_end)
    monkeypatch.setattr(Journal, "append", append_and_note_the_end)
    rows = Dataset("train.jsonl", "training", "0" * 64, 6)
    with start_run("short", {"a": 1}, {}, [rows]):
        pass
    assert "took no record" not in capsys.readouterr().err
    assert failed[0] == failed[1]
    run = tracking_store.connect().get_run(failed[0])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"}
    assert len(run.inputs.dataset_inputs) == 1
    assert not any(Workspace.here().outbox.glob("*"))


if __name__ == "__main__":
    sys.exit(record_together(Path(sys.argv[1])))
