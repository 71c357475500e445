"""The results of trials for the sweep's record: failures, deaths of processes, and measurements."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from athanor import console, files
from athanor.errors import UserError
from athanor.runs import lineage
from athanor.runs.run import start_run
from athanor.sweep import choice, naming
from athanor.sweep.description import Sweep, trials_folder
from athanor.sweep.trial_record import TrialRecord, TrialStatus

CURVES = ("train_loss", "val_loss")


def record_failure(sweep: Sweep, record: TrialRecord, reason: str) -> None:
    """Record that a trial failed, and warn."""
    record.failed(reason, sweep.command).write(sweep.folder)
    console.warn(f"{record.label} failed, and the sweep goes on: {reason}")


def fail(sweep: Sweep, record: TrialRecord, reason: str) -> None:
    """Record that a trial failed that is not running here, and end its MLflow run as failed."""
    params = {key: naming.as_override(value) for key, value in record.values.items()}
    with (
        suppress(UserError),
        start_run(
            record.label, params, lineage.collect_tags(), [], run=record.run, parent=sweep.run
        ) as run,
    ):
        run.set_tags({"mlflow.note.content": f"failed: {reason}"})
        raise UserError("sweep.trial_failed", reason=reason)
    record_failure(sweep, record, reason)


def count_deaths(sweep: Sweep, cause: str) -> list[TrialRecord]:
    """Count a process's death for the trials that it ran; return those that it failed.

    A trial that was alone or dies again has failed; of several, any may be the cause. A trial whose
    results were complete has not.

    Raises:
        UserError: where none was running: another start would end in the same way.
    """
    records = [record.died().write(sweep.folder) for record in sweep.running()]
    if not records:
        raise UserError("sweep.died_without_trial", cause=cause)
    return [
        record
        for record in records
        if (len(records) == 1 or record.deaths > 1)
        and not (trials_folder() / record.digest / str(record.tested) / "metrics.json").exists()
    ]


def read_trial(record: TrialRecord, *tests: Path) -> choice.Trial:
    """Return a trial with its measurements, of training and of the tests in some folders."""
    trained: dict[str, Any] = {"metrics": {}, "history": []}
    if record.status is TrialStatus.FINISHED:
        trained = files.read_json(trials_folder() / record.digest / "trained.json")
    metrics = dict(trained["metrics"])
    history: dict[int, dict[str, float]] = {}
    for entry in trained["history"]:
        row = history.setdefault(entry["iteration"], {"iteration": entry["iteration"]})
        row |= {key: entry["values"][key] for key in CURVES if key in entry["values"]}
    for folder in tests:
        metrics |= files.read_json(folder / "metrics.json")
    return choice.Trial(
        record.number, record.values, record.status, record.reason, metrics, list(history.values())
    )
