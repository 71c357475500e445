"""Processes that write to one SQLite store at once, and a store that fails for a moment."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from athanor.paths import Workspace
from athanor.runs import compare, tracking_store
from athanor.runs import run as run_module
from athanor.runs.entries import AnyEntry, Dataset, EndRun
from athanor.runs.outbox import Journal
from athanor.runs.run import start_run
from support import concurrent_runs, mlflow_store
from support.concurrent_runs import KEYS, PROCESSES, ROUNDS, STEPS
from support.records import create_run, make_record
from support.refused import refused


def test_eight_processes_at_once_on_a_store_that_is_not_there(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        (tmp_path / f"round {number}").mkdir()
    done = subprocess.run(
        [sys.executable, concurrent_runs.__file__, str(tmp_path)],
        env=os.environ | {"MLFLOW_LOGGING_LEVEL": "WARNING"},  # as tracking_store sets it
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for number in range(ROUNDS):
        assert_complete(tmp_path / f"round {number}")


def assert_complete(folder: Path) -> None:
    assert list((folder / "mlruns/outbox").iterdir()) == []
    client = mlflow_store.connect(folder)
    assert {experiment.name for experiment in client.search_experiments()} == {"Default", "athanor"}
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


def test_a_run_is_found_by_the_beginning_of_its_id(runs_store: Path, tmp_path: Path) -> None:
    empty = runs_store.rename(tmp_path / "empty.db")
    with refused("runs.no_store"):
        compare.load_record("a", tmp_path)
    assert not runs_store.exists()
    empty.rename(runs_store)
    with refused("runs.no_runs"):
        compare.load_record("a", tmp_path)
    ids = [create_run(run_name=f"run {i}") for i in range(17)]
    assert compare.load_record(ids[0][:12], tmp_path).name == "run 0"
    with refused("runs.no_such_run", prefix="zz") as refusal:
        compare.load_record("zz", tmp_path)
    assert "run 16 (RUNNING)" in refusal.value.facts["runs"]
    # Of 17 ids in hexadecimal two have the same first digit.
    shared = next(x[0] for x in ids if [y[0] for y in ids].count(x[0]) > 1)
    with refused("runs.ambiguous_run", prefix=shared):
        compare.load_record(shared, tmp_path)
    with refused("runs.no_such_run", prefix="%"):
        compare.load_record("%", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:secret@host/db",
        "postgresql://me:sec/secret@host/db",
        "mysql+pymysql://me:p@secret@host:1/db is away",
        "postgresql://host/db?user=me&password=secret&sslmode=require",
        "http://host?TOKEN=secret",
        "failed to resolve host 'secret@host'",
    ],
)
def test_no_password_is_shown(text: str) -> None:
    shown = tracking_store.hide_passwords(text)
    assert "secret" not in shown
    assert "host" in shown


@pytest.mark.parametrize(
    "uri", ["foo://me:secret@host/db", "postgresql://me:secret@127.0.0.1:9/db"]
)
def test_a_store_that_is_away_is_reported_in_a_line(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = make_record(tmp_path)
    for load in (
        lambda: compare.load_record("ab", tmp_path),
        lambda: run.fetch_artifact("params.yaml"),
    ):
        with refused("runs.store_failed") as caught:
            load()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
