"""The description of a sweep, which its processes read from artifacts/sweep/<key>/sweep.json."""

import hashlib
import os
from pathlib import Path

import msgspec

from athanor import files
from athanor.paths import Workspace
from athanor.sweep.trial_record import TrialRecord, TrialStatus

# The environment variable that names the sweep's folder to its processes.
FOLDER = "ATHANOR_SWEEP"


class Sweep(msgspec.Struct, frozen=True):
    """A sweep, as far as its trials have it in common.

    Attributes:
        folder: artifacts/sweep/<key>/.
        run: our name for its MLflow run.
        keys: the swept keys, or config groups.
        total: the number of trials.
        recorded: our names of the trials' runs that MLflow has whole.
        command: a unique name for this start of it.
        blas_threads: those of the process that started it, which all others use too.
    """

    folder: Path
    run: str
    keys: list[str]
    total: int
    recorded: list[str]
    command: str
    blas_threads: int | None

    def write(self) -> None:
        """Write sweep.json, and set the variable by which processes find it."""
        values = msgspec.to_builtins(self, enc_hook=str)
        files.write_json(self.folder / "sweep.json", values)
        os.environ[FOLDER] = str(self.folder)

    @classmethod
    def here(cls) -> "Sweep":
        """Return the sweep that this process belongs to."""
        values = files.read_json(Path(os.environ[FOLDER]) / "sweep.json")
        return msgspec.convert(values, cls, dec_hook=lambda kind, value: kind(value))

    def run_of(self, digest: str) -> str:
        """Return our name for a trial's MLflow run: the same at every start of the sweep."""
        return hashlib.sha256(f"{self.run} {digest}".encode()).hexdigest()[:32]

    def record(self, digest: str) -> TrialRecord | None:
        """Return the record of a trial, None before its first start."""
        path = self.folder / "points" / f"{digest}.json"
        return TrialRecord.read(path) if path.exists() else None

    def records(self) -> list[TrialRecord]:
        """Return the records of the trials by number."""
        records = map(TrialRecord.read, (self.folder / "points").glob("*.json"))
        return sorted(records, key=lambda record: record.number)

    def running(self) -> list[TrialRecord]:
        """Return the records of trials that this start of the sweep began and has not ended."""
        return [
            record
            for record in self.records()
            if record.status is TrialStatus.RUNNING and record.command == self.command
        ]


def trials_folder() -> Path:
    """Return the folder of the trials' results, which all sweeps share."""
    return Workspace.here().sweeps / "points"
