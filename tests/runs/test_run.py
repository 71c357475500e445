"""What was said to MLflow arrives there once, however often it took to get it there."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from athanor.paths import Workspace
from athanor.runs import client as client_module
from athanor.runs import run as run_module
from athanor.runs.outbox import Journal
from athanor.runs.run import Dataset, Run, resume_run, start_run


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that can't be reached as long as this file is in its folder's place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_TRIES", 0)
    in_the_way = tmp_path / "away"
    in_the_way.write_text("", encoding="utf-8")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{in_the_way}/runs.db")
    return in_the_way


def recorded() -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(client_module.uri())
    experiment = client.get_experiment_by_name("athanor")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


def start(run: str | None = None) -> Run:
    datasets = [Dataset("train.jsonl", "training", "0" * 64, 6)]
    return start_run("tiny lora", {"seed": 0}, {"device": "cpu"}, datasets, run)


def waiting() -> list[str]:
    return sorted(path.name for path in Workspace.here().outbox.glob("*"))


def test_what_a_store_that_is_away_missed_is_sent_by_the_next_stage(
    away: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = Path("adapters")
    adapters.mkdir()
    (adapters / "adapters.safetensors").write_text("first", encoding="utf-8")
    with start() as run:
        run.metrics(1, {"train_loss": 2.5})
        run.artifact(adapters, "adapters")
        run.text("seed: 0", "params.yaml")
        assert run.opened() is None
    said = capsys.readouterr().err
    assert "took no record" in said
    assert "sent by the next stage" in said
    assert len(waiting()) == 2  # a journal and its lock
    # What the folder holds by then is another training's.
    (adapters / "adapters.safetensors").unlink()
    (adapters / "adapters.safetensors").write_text("second", encoding="utf-8")

    away.unlink()
    with resume_run(run.name, None) as test:
        test.metrics(40, {"test_loss": 1.5})
    client, [found] = recorded()
    assert test.id == found.info.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {"seed": "0"}
    assert found.data.metrics == {"train_loss": 2.5, "test_loss": 1.5}
    assert found.inputs.dataset_inputs[0].dataset.name == "train.jsonl"
    kept = client.download_artifacts(found.info.run_id, "adapters/adapters.safetensors")
    assert Path(kept).read_text(encoding="utf-8") == "first"
    assert waiting() == []


def test_a_store_that_comes_back_gets_all_of_it(away: Path) -> None:
    with start() as run:
        run.metrics(1, {"train_loss": 3.0})
        assert run.opened() is None
        away.unlink()
        run.metrics(2, {"train_loss": 2.0})
    client, [found] = recorded()
    points = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.0), (2, 2.0)]
    assert waiting() == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many metrics each call to the store brought."""
    found: list[int] = []
    really = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **more: Any) -> None:
        if metrics:
            found.append(len(metrics))
        really(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return found


def test_what_waited_goes_in_few_calls(away: Path, calls: list[int]) -> None:
    with start() as run:
        assert run.opened() is None
        for step in range(1, 1001):
            run.metrics(step, {"train_loss": 1.0, "grad_norm": 1.0, "peak_memory": 1.0})
        calls.clear()
        away.unlink()
    assert sum(calls) == 3000
    assert len(calls) <= 8  # of 500 each, and what was cut short when the store came back


def test_what_is_said_in_a_row_goes_together(
    away: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    away.unlink()
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SENDS", 1000)
    with start() as run:
        assert run.opened()
        for step in range(1, 51):
            run.metrics(step, {"train_loss": 1.0})
            time.sleep(0.01)
        assert len(calls) <= 1
    assert sum(calls) == 50
    assert len(calls) <= 2


def test_a_training_that_goes_on_says_nothing_twice(away: Path) -> None:
    away.unlink()
    with pytest.raises(KeyboardInterrupt), start("mine") as run:
        run.metrics(5, {"train_loss": 3.0, "tokens_per_second": 100.0}, once=True)
        raise KeyboardInterrupt("after iteration 5")
    _, [found] = recorded()
    assert found.info.status == "KILLED"
    assert found.data.tags["failure"] == "after iteration 5"
    with start("mine") as again:
        again.metrics(5, {"train_loss": 3.0, "tokens_per_second": 90.0}, once=True)
        again.metrics(6, {"train_loss": 2.0}, once=True)
    client, [found] = recorded()
    assert again.id == run.id == found.info.run_id
    assert found.info.status == "FINISHED"
    assert "failure" not in found.data.tags
    for key, expected in (("train_loss", [3.0, 2.0]), ("tokens_per_second", [100.0])):
        points = client.get_metric_history(found.info.run_id, key)
        assert [point.value for point in points] == expected


def test_a_journal_that_was_cut_off_is_sent_as_far_as_it_goes(away: Path) -> None:
    journal = Journal("dead")
    opening = {"do": "start", "run": "dead", "store": client_module.of_journals(), "time": 1}
    opening |= {"experiment": "athanor", "name": "it", "params": {}, "tags": {}, "datasets": []}
    opening["tags"] = {"athanor.run": "dead"}
    journal.append(opening)
    journal.append({"do": "metrics", "step": 1, "values": {"a": 1.0}, "once": True, "time": 2})
    with (journal.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"do": "tags", "values": {}})[:9])
    journal.close()
    away.unlink()
    with start() as run:
        run.metrics(1, {"a": 2.0})
    _, found = recorded()
    states = {one.info.run_name: (one.info.status, one.data.metrics["a"]) for one in found}
    assert states == {"it": ("KILLED", 1.0), "tiny lora": ("FINISHED", 2.0)}
    assert waiting() == []


def test_what_was_said_to_another_store_waits_for_that_one(
    away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as run:
        assert run.opened() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{away.parent}/other.db")
    with start():
        pass
    _, found = recorded()
    assert len(found) == 1
    assert run.name in waiting()


def test_a_file_that_the_store_refuses_holds_up_nothing_else(
    away: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place for artifacts can't be written, as a bucket without its keys."""
    away.unlink()
    closed = away.parent / "closed"
    closed.write_text("", encoding="utf-8")
    client_module.client()
    client = MlflowClient(client_module.uri())
    client.create_experiment("closed", artifact_location=closed.as_uri())

    def begin() -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client, "EXPERIMENT", "closed")
            return start("mine")

    with begin() as run:
        run.text("seed: 0", "params.yaml")
        run.metrics(1, {"train_loss": 2.0})
    assert "did not take params.yaml" in capsys.readouterr().err
    found = client.get_run(str(run.id))
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"train_loss": 2.0}
    closed.unlink()
    with start():
        pass
    kept = client.download_artifacts(str(run.id), "params.yaml")
    assert Path(kept).read_text(encoding="utf-8") == "seed: 0"
    assert client.get_run(str(run.id)).info.status == "FINISHED"
    assert waiting() == []


def test_a_table_that_is_sent_twice_is_there_once(away: Path) -> None:
    """It is the table that MLflow's own log_table writes, which would add the rows again."""
    away.unlink()
    columns: dict[str, list[Any]] = {
        "prompt": ["月亮哪天最圆", "<b>"],
        "tuned": ["星期八", ""],
        "stopped": [True, False],
    }
    with start("mine") as run:
        run.table({"prompt": ["before"]}, "test/answers.json")
        run.table(columns, "test/answers.json")
        run.table({"other": [1]}, "other.json")
    client, [found] = recorded()
    again = client_module.Sender(Workspace.here().outbox / "mine", goes_on=False)
    opening = {"do": "resume", "run": "mine", "run_id": run.id, "experiment": "athanor"}
    again.send(deque([opening, {"do": "table", "columns": columns, "name": "test/answers.json"}]))

    by_mlflow = client.create_run(found.info.experiment_id).info.run_id
    client.log_table(by_mlflow, columns, "test/answers.json")
    client.log_table(by_mlflow, {"other": [1]}, "other.json")
    tables = [
        client.load_table(found.info.experiment_id, "test/answers.json", [run_id])
        for run_id in (str(run.id), by_mlflow)
    ]
    assert [table.to_dict("list") for table in tables] == [columns, columns]
    tags = [client.get_run(run_id).data.tags for run_id in (str(run.id), by_mlflow)]
    ours, theirs = (json.loads(tag["mlflow.loggedArtifacts"]) for tag in tags)
    assert ours == theirs
    contents = [
        json.loads(Path(client.download_artifacts(run_id, "test/answers.json")).read_text("utf-8"))
        for run_id in (str(run.id), by_mlflow)
    ]
    assert contents[0] == contents[1]


def test_a_line_cut_inside_a_character_spoils_no_other(away: Path) -> None:
    journal = Journal("torn")
    journal.append({"do": "text", "name": "月亮"})
    path = journal.folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.strip()[: whole.strip().index("亮".encode()) + 1])
    journal.append({"do": "tags", "values": {}})
    assert [said["do"] for said in journal.lines()] == ["text", "tags"]
    journal.close()
    away.unlink()
    with start():
        pass
    assert waiting() == []


def test_a_journal_that_can_not_be_opened_holds_up_no_other(away: Path) -> None:
    away.unlink()
    for name in ("theirs", "theirs.lock"):
        (Workspace.here().outbox / name).mkdir(parents=True)
    with start() as run:
        run.metrics(1, {"train_loss": 2.0})
    _, [found] = recorded()
    assert found.data.metrics == {"train_loss": 2.0}


def test_a_later_stage_waits_for_the_trainings_own_record(away: Path) -> None:
    with start() as training:
        training.metrics(1, {"train_loss": 2.0})
    away.unlink()
    busy = Journal(training.name)  # another stage is sending it right now
    with resume_run(training.name, None) as test:
        test.metrics(1, {"test_loss": 1.0})
    assert len(waiting()) == 4
    busy.close()
    with resume_run(training.name, None):
        pass
    _, [found] = recorded()
    assert found.data.metrics == {"train_loss": 2.0, "test_loss": 1.0}
    assert waiting() == []


def test_a_training_that_goes_on_in_another_experiment_or_store(
    away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its points are there, and what it leaves behind does not stay RUNNING."""
    away.unlink()
    dead = Journal("mine")
    opening = {"do": "start", "run": "mine", "store": client_module.of_journals(), "time": 1}
    opening |= {"experiment": "athanor", "name": "it", "params": {}, "datasets": []}
    dead.append({**opening, "tags": {"athanor.run": "mine"}})
    dead.append({"do": "metrics", "step": 1, "values": {"a": 1.0}, "once": True, "time": 2})
    dead.close()
    monkeypatch.setattr(client_module, "EXPERIMENT", "other")
    with start("mine") as run:
        for step in (1, 2):
            run.metrics(step, {"a": 1.0}, once=True)
    client, [left] = recorded()
    assert left.info.status == "KILLED"
    points = client.get_metric_history(str(run.id), "a")
    assert [point.step for point in points] == [1, 2]

    with start("again") as run:
        run.metrics(1, {"a": 1.0}, once=True)
    client.delete_run(str(run.id))
    with resume_run("again", run.id) as test:
        test.metrics(1, {"b": 1.0})
    assert waiting() == []
