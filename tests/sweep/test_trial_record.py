"""Records of trials: their states, and their files."""

import json
from pathlib import Path

from athanor.sweep.trial_record import TrialRecord, TrialStatus


def record(number: int = 3, command: str = "first") -> TrialRecord:
    return TrialRecord(
        number=number,
        digest="d1",
        run="r1",
        values={"train.learning_rate": 1e-4, "train": "lora"},
        label="lr 1e-4, train lora",
        command=command,
        status=TrialStatus.RUNNING,
        seed=0,
        tested="test-1",
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    failed = record().died().failed("out of memory", "second")
    assert failed.write(tmp_path) is failed
    path = tmp_path / "points/d1.json"
    assert TrialRecord.read(path) == failed
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "number": 3,
        "digest": "d1",
        "run": "r1",
        "values": {"train.learning_rate": 1e-4, "train": "lora"},
        "label": "lr 1e-4, train lora",
        "command": "second",
        "status": "FAILED",
        "seed": 0,
        "tested": "test-1",
        "reason": "out of memory",
        "deaths": 1,
    }


def test_another_start_keeps_number_and_deaths_of_a_trial() -> None:
    before = record().died().failed("out of memory", "first")
    again = record(number=7, command="second").started(before)
    assert (again.number, again.deaths, again.command) == (3, 1, "second")
    assert again.status is TrialStatus.RUNNING and again.reason is None
    assert record(number=7).started(None).number == 7


def test_a_trial_ends_in_a_state_of_mlflow() -> None:
    ends = [record().finished(), record().killed(), record().failed("x" * 5000, "first")]
    assert [end.status for end in ends] == ["FINISHED", "KILLED", "FAILED"]
    assert ends[2].reason == "x" * 2000
    assert record().finished().chosen("id").run_id == "id"
