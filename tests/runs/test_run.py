"""Entries arrive in MLflow once, however often they are sent."""

import json
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from athanor.paths import Workspace
from athanor.runs import run as run_module
from athanor.runs import tracking_store
from athanor.runs.entries import (
    AnyEntry,
    Dataset,
    EndRun,
    LogArtifact,
    LogMetrics,
    LogModel,
    LogTable,
    LogText,
    ResumeRun,
    SetTags,
    StartRun,
)
from athanor.runs.outbox import Journal, read_entries
from athanor.runs.run import Run, resume_run, start_run
from athanor.runs.sender import Sender
from support import mlflow_store


class Store:
    """An SQLite store that cannot be reached as long as a file is in its folder's place."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self._folder, self._empty = folder, empty
        folder.write_text("", encoding="utf-8")

    def come_back(self) -> None:
        """Put a store in the file's place, at once: the sender tries all the time."""
        store = self._folder.with_name("store")
        store.mkdir()
        shutil.copyfile(self._empty, store / "runs.db")
        link = self._folder.with_name("link")
        link.symlink_to(store)
        link.replace(self._folder)


@pytest.fixture
def away(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that cannot be reached until it comes back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_TRIES", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/away/runs.db")
    return Store(tmp_path / "away", empty_store)


def recorded() -> list[Any]:
    return mlflow_store.list_runs(tracking_store.uri())


def read_metric(run_id: str | None, key: str) -> list[tuple[int, float]]:
    return mlflow_store.read_metric(tracking_store.uri(), run_id, key)


def read_artifact(run_id: str | None, path: str) -> str:
    path_here = mlflow_store.fetch_artifact(tracking_store.uri(), run_id, path)
    return path_here.read_text(encoding="utf-8")


def opening(name: str) -> StartRun:
    """The first entry of a training's journal."""
    return StartRun(
        run=name,
        store=tracking_store.journal_store(),
        experiment="athanor",
        name="tiny",
        time=1,
        params={},
        tags={"athanor.run": name},
        datasets=[],
    )


def start(run: str | None = None) -> Run:
    datasets = [Dataset("train.jsonl", "training", "0" * 64, 6)]
    return start_run("tiny lora", {"seed": 0}, {"device": "cpu"}, datasets, run)


def waiting() -> list[str]:
    return sorted(path.name for path in Workspace.here().outbox.glob("*"))


def test_the_next_stage_sends_what_an_unreachable_store_missed(
    away: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = Path("adapters")
    adapters.mkdir()
    (adapters / "adapters.safetensors").write_text("first", encoding="utf-8")
    with start() as run:
        run.log_metrics(1, {"train_loss": 2.5})
        run.log_artifact(adapters, "adapters")
        run.log_text("seed: 0", "params.yaml")
        assert run.wait_for_id() is None
    warning = capsys.readouterr().err
    assert "took no record" in warning
    assert "the next stage sends it" in warning
    assert len(waiting()) == 2  # a journal and its lock
    # What the folder holds by then is another training's.
    (adapters / "adapters.safetensors").unlink()
    (adapters / "adapters.safetensors").write_text("second", encoding="utf-8")

    away.come_back()
    with resume_run(run.name, None) as test:
        test.log_metrics(40, {"test_loss": 1.5})
    [recorded_run] = recorded()
    assert test.id == recorded_run.info.run_id
    assert recorded_run.info.status == "FINISHED"
    assert recorded_run.data.params == {"seed": "0"}
    assert recorded_run.data.metrics == {"train_loss": 2.5, "test_loss": 1.5}
    assert recorded_run.inputs.dataset_inputs[0].dataset.name == "train.jsonl"
    assert read_artifact(test.id, "adapters/adapters.safetensors") == "first"
    assert waiting() == []


def test_a_store_that_comes_back_gets_all_of_it(away: Store) -> None:
    with start() as run:
        run.log_metrics(1, {"train_loss": 3.0})
        assert run.wait_for_id() is None
        away.come_back()
        run.log_metrics(2, {"train_loss": 2.0})
    assert read_metric(run.id, "train_loss") == [(1, 3.0), (2, 2.0)]
    assert waiting() == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of metrics in each call to the store."""
    counts: list[int] = []
    really = MlflowClient.log_batch

    def log_batch(self: Any, run_id: str, metrics: Any = (), **more: Any) -> None:
        if metrics:
            counts.append(len(metrics))
        really(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return counts


def test_waiting_metrics_go_in_few_calls(away: Store, calls: list[int]) -> None:
    with start() as run:
        assert run.wait_for_id() is None
        for step in range(1, 1001):
            run.log_metrics(step, {"train_loss": 1.0, "grad_norm": 1.0, "peak_memory": 1.0})
        calls.clear()
        away.come_back()
    assert sum(calls) == 3000
    assert len(calls) <= 8  # of 500 each, and what was cut short when the store came back


def test_metrics_in_quick_succession_go_together(
    away: Store, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    away.come_back()
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SENDS", 1000)
    with start() as run:
        assert run.wait_for_id()
        for step in range(1, 51):
            run.log_metrics(step, {"train_loss": 1.0})
            time.sleep(0.01)
        assert len(calls) <= 1
    assert sum(calls) == 50
    assert len(calls) <= 2


def test_a_continued_training_records_nothing_twice(away: Store) -> None:
    away.come_back()
    with pytest.raises(KeyboardInterrupt), start("mine") as run:
        run.log_metrics(5, {"train_loss": 3.0, "tokens_per_second": 100.0}, once=True)
        raise KeyboardInterrupt("after iteration 5")
    [recorded_run] = recorded()
    assert recorded_run.info.status == "KILLED"
    assert recorded_run.data.tags["failure"] == "after iteration 5"
    with start("mine") as again:
        again.log_metrics(5, {"train_loss": 3.0, "tokens_per_second": 90.0}, once=True)
        again.log_metrics(6, {"train_loss": 2.0}, once=True)
    [recorded_run] = recorded()
    assert again.id == run.id == recorded_run.info.run_id
    assert recorded_run.info.status == "FINISHED"
    assert "failure" not in recorded_run.data.tags
    assert read_metric(run.id, "train_loss") == [(5, 3.0), (6, 2.0)]
    assert read_metric(run.id, "tokens_per_second") == [(5, 100.0)]


def test_a_journal_that_was_cut_off_is_sent_as_far_as_it_goes(away: Store) -> None:
    journal = Journal("dead")
    journal.append(opening("dead"))
    journal.append(LogMetrics(step=1, values={"a": 1.0}, once=True, time=2))
    with (journal.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"do": "tags", "values": {}})[:9])
    journal.close()
    away.come_back()
    with start() as run:
        run.log_metrics(1, {"a": 2.0})
    states = {run.info.run_name: (run.info.status, run.data.metrics["a"]) for run in recorded()}
    assert states == {"tiny": ("KILLED", 1.0), "tiny lora": ("FINISHED", 2.0)}
    assert waiting() == []


def test_a_line_that_is_no_entry_is_reported_and_kept(
    away: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of another version of the program; what else the journal has is sent."""
    for name, first in (("tags", opening("tags")), ("start", None)):
        journal = Journal(name)
        if first is not None:
            journal.append(first)
        journal.append(SetTags({}))
        with (journal.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"do": "tags", "value": {"a": "b"}}\n')
        journal.append(LogMetrics(step=1, values={"a": 1.0}, once=True, time=2))
        journal.close()
    away.come_back()
    with start():
        pass
    warnings = capsys.readouterr().err
    assert warnings.count("did not take line") == 2
    assert "missing required field `values`" in warnings
    assert [run.data.metrics for run in recorded() if run.info.run_name == "tiny"] == [{"a": 1.0}]
    assert {"start", "tags"} <= set(waiting())


@pytest.mark.parametrize(
    ("answered", "named", "sent"),
    [
        (False, "other.db", True),  # the first address was a mistake, which is corrected
        (True, "other.db", False),  # the first store is away, and waited for
        (False, None, False),  # the default is no correction
    ],
)
def test_a_journal_of_another_store_waits_for_that_store_if_it_ever_answered(
    answered: bool,
    named: str | None,
    sent: bool,
    away: Store,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if answered:
        tracking_store.note_answer()
    with start() as run:
        assert run.wait_for_id() is None
    with resume_run(run.name, None) as test:
        test.log_metrics(1, {"test_loss": 1.0})
    (tmp_path / "mlruns").mkdir(exist_ok=True)
    for path in (tmp_path / "other.db", tmp_path / "mlruns/mlflow.db"):
        shutil.copyfile(empty_store, path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if named is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{named}")
    run_module._report_waiting.cache_clear()
    capsys.readouterr()
    run_module.send_left_journals()
    said = capsys.readouterr().err
    assert (run.name in waiting()) == (not sent)
    assert [one.data.metrics for one in recorded()] == ([{"test_loss": 1.0}] if sent else [])
    assert ("never answered" in said) == (not answered)
    if named is None:  # the command that it names
        assert f"MLFLOW_TRACKING_URI={tracking_store.uri()} uv run python -m athanor.ui" in said
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store.uri())
        run_module.send_left_journals()
        assert len(recorded()) == 1


def test_a_file_that_the_store_refuses_holds_up_nothing_else(
    away: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place of artifacts is not writable, as a bucket without its keys."""
    away.come_back()
    closed = tmp_path / "closed"
    closed.write_text("", encoding="utf-8")
    client = tracking_store.connect()
    client.create_experiment("closed", artifact_location=closed.as_uri())

    def begin() -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracking_store, "EXPERIMENT", "closed")
            return start("mine")

    with begin() as run:
        run.log_text("seed: 0", "params.yaml")
        run.log_metrics(1, {"train_loss": 2.0})
    assert "did not take params.yaml" in capsys.readouterr().err
    recorded_run = client.get_run(str(run.id))
    assert recorded_run.info.status == "FINISHED"
    assert recorded_run.data.metrics == {"train_loss": 2.0}
    closed.unlink()
    with start():
        pass
    assert read_artifact(run.id, "params.yaml") == "seed: 0"
    assert client.get_run(str(run.id)).info.status == "FINISHED"
    assert waiting() == []


def test_a_table_that_is_sent_twice_is_there_once(away: Store) -> None:
    """It is the table that MLflow's own log_table writes, which would add the rows again."""
    away.come_back()
    columns: dict[str, list[Any]] = {
        "prompt": ["月亮哪天最圆", "<b>"],
        "tuned": ["星期八", ""],
        "stopped": [True, False],
    }
    with start("mine") as run:
        run.log_table({"prompt": ["before"]}, "test/answers.json")
        run.log_table(columns, "test/answers.json")
        run.log_table({"other": [1]}, "other.json")
    client, [recorded_run] = tracking_store.connect(), recorded()
    again = Sender(Workspace.here().outbox / "mine", active=False)
    resume = ResumeRun("mine", run.id, tracking_store.journal_store(), "athanor")
    again.send(deque([resume, LogTable(columns, "test/answers.json")]))

    by_mlflow = client.create_run(recorded_run.info.experiment_id).info.run_id
    client.log_table(by_mlflow, columns, "test/answers.json")
    client.log_table(by_mlflow, {"other": [1]}, "other.json")
    tables = [
        client.load_table(recorded_run.info.experiment_id, "test/answers.json", [run_id])
        for run_id in (str(run.id), by_mlflow)
    ]
    assert [table.to_dict("list") for table in tables] == [columns, columns]
    tags = [client.get_run(run_id).data.tags for run_id in (str(run.id), by_mlflow)]
    ours, theirs = (json.loads(tag["mlflow.loggedArtifacts"]) for tag in tags)
    assert ours == theirs
    contents = [read_artifact(run_id, "test/answers.json") for run_id in (run.id, by_mlflow)]
    assert json.loads(contents[0]) == json.loads(contents[1])


def test_a_line_cut_inside_a_character_spoils_no_other(away: Store) -> None:
    journal = Journal("torn")
    journal.append(LogText("月亮", "moon.txt"))
    path = journal.folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.strip()[: whole.strip().index("亮".encode()) + 1])
    journal.append(SetTags({}))
    assert list(read_entries(journal.folder)) == [LogText("月亮", "moon.txt"), SetTags({})]
    journal.close()
    away.come_back()
    with start():
        pass
    assert waiting() == []


def test_a_journal_that_can_not_be_opened_holds_up_no_other(away: Store) -> None:
    away.come_back()
    for name in ("theirs", "theirs.lock"):
        (Workspace.here().outbox / name).mkdir(parents=True)
    with start() as run:
        run.log_metrics(1, {"train_loss": 2.0})
    [recorded_run] = recorded()
    assert recorded_run.data.metrics == {"train_loss": 2.0}


def test_a_later_stage_waits_for_the_trainings_own_record(away: Store) -> None:
    with start() as training:
        training.log_metrics(1, {"train_loss": 2.0})
    away.come_back()
    busy = Journal(training.name)  # another stage is sending it right now
    with resume_run(training.name, None) as test:
        test.log_metrics(1, {"test_loss": 1.0})
    assert len(waiting()) == 4
    busy.close()
    with resume_run(training.name, None):
        pass
    [recorded_run] = recorded()
    assert recorded_run.data.metrics == {"train_loss": 2.0, "test_loss": 1.0}
    assert waiting() == []


def test_a_training_that_goes_on_in_another_experiment_or_store(
    away: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its metrics are there, and the run that it leaves does not stay RUNNING."""
    away.come_back()
    dead = Journal("mine")
    dead.append(opening("mine"))
    dead.append(LogMetrics(step=1, values={"a": 1.0}, once=True, time=2))
    dead.close()
    monkeypatch.setattr(tracking_store, "EXPERIMENT", "other")
    with start("mine") as run:
        for step in (1, 2):
            run.log_metrics(step, {"a": 1.0}, once=True)
    [left] = recorded()
    assert left.info.status == "KILLED"
    assert read_metric(run.id, "a") == [(1, 1.0), (2, 1.0)]

    with start("again") as run:
        run.log_metrics(1, {"a": 1.0}, once=True)
    tracking_store.connect().delete_run(str(run.id))
    with resume_run("again", run.id) as test:
        test.log_metrics(1, {"b": 1.0})
    assert waiting() == []


def test_a_journal_names_each_call_and_its_values(away: Store) -> None:
    """Journals outlive the program that wrote them, so their keys stay."""
    journal = Journal("mine")
    written: list[AnyEntry] = [
        opening("mine"),
        LogMetrics(step=1, values={"train_loss": float("inf"), "val_loss": 2.0}, once=True, time=2),
        LogArtifact("files/a/adapters", None),
        LogModel("files/b/model", "d", "月亮", 5, {"val_loss": "1.5"}, ["mlx==1"], None),
        EndRun("FINISHED", 3),
    ]
    for entry in written:
        journal.append(entry)
    text = (journal.folder / "journal.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line]
    assert [line["do"] for line in lines] == ["start", "metrics", "artifact", "model", "end"]
    assert lines[1]["values"] == {"train_loss": float("inf"), "val_loss": 2.0}
    assert lines[4] == {"do": "end", "status": "FINISHED", "time": 3}
    assert list(read_entries(journal.folder)) == written
    journal.close()


@pytest.mark.parametrize("clock", [[-18_489_600.0], [1.75e9, 1.75e9 - 864_000], [0.0, 1.75e9]])
def test_a_clock_that_is_wrong_or_set_loses_no_entry(
    runs_store: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """A clock before 1970, one that is set back by ten days, and one that is set right."""
    monkeypatch.setattr(run_module, "_latest", (0.0, time.monotonic()))
    now = clock[0]
    monkeypatch.setattr(time, "time", lambda: now)
    with start_run("any", {}, {}, []) as run:
        run_id = run.wait_for_id()
        for step in range(1, 4):
            now = clock[min(step, len(clock)) - 1]
            run.log_metrics(step, {"train_loss": 1.0})
            time.sleep(0.002)
    client = mlflow_store.connect(f"sqlite:///{runs_store}")
    recorded = client.get_run(run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.info.end_time >= recorded.info.start_time
    times = [metric.timestamp for metric in client.get_metric_history(run_id, "train_loss")]
    assert times == sorted({0, *times})[-3:]
    assert times[-1] >= max(clock) * 1000
