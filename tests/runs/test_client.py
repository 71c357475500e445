"""Many processes write to one SQLite store at a time, which none of them finds there."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from athanor.paths import Workspace

PROCESSES, ROUNDS, STEPS = 8, 10, 60
KEYS = ("train_loss", "val_loss", "learning_rate", "tokens_per_second", "peak_memory")


def work(number: int) -> None:
    """A process: records a run in each folder that it is told, in that folder's own store."""
    import mlflow  # noqa: F401  # before the first round, so that all of them start it together

    from athanor.runs.run import Dataset, start_run

    print("ready", flush=True)
    for line in sys.stdin:
        os.chdir(line.strip())
        rows = Dataset("train.jsonl", "training", "0" * 64, 6)
        params = {f"train.key_{i}": i for i in range(30)}
        with start_run(f"run {number}", params, {"number": number}, [rows]) as run:
            for step in range(1, STEPS + 1):
                run.metrics(step, dict.fromkeys(KEYS, number * 1000 + step), once=True)
                if step == STEPS // 2:
                    run.tags({"half": "way"})
            run.text(f"seed: {number}", "params.yaml")
        print("done", flush=True)


def test_eight_processes_at_once_on_a_store_that_is_not_there(tmp_path: Path) -> None:
    complaints = [tmp_path / f"stderr.{number}" for number in range(PROCESSES)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(number)],
            env=os.environ | {"MLFLOW_LOGGING_LEVEL": "WARNING"},  # as store.client() sets it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=path.open("w"),
            text=True,
        )
        for number, path in enumerate(complaints)
    ]
    try:
        answers(workers, "ready")
        for number in range(ROUNDS):
            folder = tmp_path / f"round {number}"
            folder.mkdir()
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write(f"{folder}\n")
                worker.stdin.flush()
            answers(workers, "done")
            assert [path.read_text() for path in complaints] == [""] * PROCESSES
            assert list((folder / Workspace.here().outbox).iterdir()) == []
    finally:
        for worker in workers:
            worker.communicate()
    for number in range(ROUNDS):
        all_is_there(tmp_path / f"round {number}")


def answers(workers: "list[subprocess.Popen[str]]", expected: str) -> None:
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == f"{expected}\n"


def all_is_there(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name != "Default"]
    assert experiment.name == "athanor"
    runs: dict[int, Any] = {
        int(run.data.tags["number"]): run for run in client.search_runs([experiment.experiment_id])
    }
    assert sorted(runs) == list(range(PROCESSES))
    for number, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["half"] == "way"
        assert run.data.params == {f"train.key_{i}": str(i) for i in range(30)}
        assert len(run.inputs.dataset_inputs) == 1
        for key in KEYS:
            points = client.get_metric_history(run.info.run_id, key)
            found = sorted((point.step, point.value) for point in points)
            assert found == [(step, number * 1000 + step) for step in range(1, STEPS + 1)], key
        text = Path(client.download_artifacts(run.info.run_id, "params.yaml")).read_text()
        assert text == f"seed: {number}"


if __name__ == "__main__":
    work(int(sys.argv[1]))


def test_a_run_that_was_just_created_when_its_store_failed_is_told_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where two processes add the same dataset at once, and neither has more to say."""
    from mlflow import MlflowClient

    from athanor.runs import client as client_module
    from athanor.runs.run import Dataset, Run, start_run

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_inputs = MlflowClient.log_inputs
    failed: list[str] = []

    def fails_once(self: Any, run: str, *given: Any) -> None:
        if not failed:
            failed.append(run)
            raise OSError("UNIQUE constraint failed")
        log_inputs(self, run, *given)

    heard = Run._heard
    ended: list[None] = []

    def when_all_is_said(self: Any, seconds: float | None) -> Any:
        while not ended:
            ended.extend(said for said in list(self._said.queue) if said is None)
            time.sleep(0.01)
        return heard(self, seconds)

    monkeypatch.setattr(MlflowClient, "log_inputs", fails_once)
    monkeypatch.setattr(Run, "_heard", when_all_is_said)
    rows = Dataset("train.jsonl", "training", "0" * 64, 6)
    with start_run("short", {"a": 1}, {}, [rows]):
        pass
    assert "took no record" not in capsys.readouterr().err
    run = client_module.client().get_run(failed[0])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"}
    assert len(run.inputs.dataset_inputs) == 1
    assert not any((tmp_path / Workspace.here().outbox).glob("*"))
