"""The record of a trial in its sweep: artifacts/sweep/<key>/points/<digest>.json."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec.structs import replace

from athanor import files


class TrialStatus(StrEnum):
    """The state of a trial, in MLflow's words."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class TrialRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A trial of a sweep and its state.

    Attributes:
        number: its place in the sweep, from 0.
        digest: the digest of everything that decides its training.
        run: our name for its MLflow run; `run_id` is MLflow's, once the trial is chosen.
        values: the swept keys' values; `label` are the same for a person: "lr 3e-4, layers all".
        command: the start of the sweep that the state is from.
        seed: the seed of training and test; None where the configuration is invalid.
        tested: the name of the folder of its test results; None where `seed` is.
        reason: the cause of a failure.
        deaths: how many processes died while they ran it.
    """

    number: int
    digest: str
    run: str
    values: dict[str, Any]
    label: str
    command: str
    status: TrialStatus
    seed: int | None = None
    tested: str | None = None
    reason: str | None = None
    deaths: int = 0
    run_id: str | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record from its file."""
        return msgspec.convert(files.read_json(path), cls)

    def write(self, folder: Path) -> Self:
        """Write the record to its file below the sweep's folder, and return it."""
        path = folder / "points" / f"{self.digest}.json"
        files.write_json(path, msgspec.to_builtins(self))
        return self

    def started(self, before: "TrialRecord | None") -> Self:
        """Return it as running, with the number and the deaths of its record from before."""
        number, deaths = (before.number, before.deaths) if before else (self.number, 0)
        return replace(self, status=TrialStatus.RUNNING, number=number, deaths=deaths)

    def finished(self) -> Self:
        """Return it as finished."""
        return replace(self, status=TrialStatus.FINISHED)

    def failed(self, reason: str, command: str) -> Self:
        """Return it as failed in a start of the sweep."""
        return replace(self, status=TrialStatus.FAILED, reason=reason[:2000], command=command)

    def killed(self) -> Self:
        """Return it as stopped by Ctrl-C or SIGTERM."""
        return replace(self, status=TrialStatus.KILLED)

    def died(self) -> Self:
        """Return it with one death more."""
        return replace(self, deaths=self.deaths + 1)

    def chosen(self, run_id: str | None) -> Self:
        """Return it with MLflow's id of its run, which only the chosen trial's record has."""
        return replace(self, run_id=run_id)
