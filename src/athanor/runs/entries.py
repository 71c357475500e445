"""The entries of a journal: calls to MLflow that wait to be sent, a JSON object each."""

from typing import Any, Literal

import msgspec

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Entry(msgspec.Struct, tag_field="do"):
    """A call to MLflow; its key `do` on disk names the kind."""


class Dataset(msgspec.Struct, frozen=True):
    """Rows that a run read, shown by MLflow as a dataset."""

    name: str
    context: str
    digest: str
    rows: int


class StartRun(Entry, tag="start"):
    """Create a run, or continue it if the store has it.

    `run` and `parent` are our names of runs, `store` is the journal's name of the store, and `time`
    is in milliseconds.
    """

    run: str
    store: str
    experiment: str
    name: str
    time: int
    params: dict[str, str]
    tags: dict[str, str]
    datasets: list[Dataset]
    parent: str | None = None


class ResumeRun(Entry, tag="resume"):
    """Open an existing run, by MLflow's id or, where that is unknown, by our name."""

    run: str
    run_id: str | None
    store: str
    experiment: str


class LogMetrics(Entry, tag="metrics"):
    """Log metrics at a step; with `once` only those without a value at that step."""

    step: int
    values: dict[str, float]
    once: bool
    time: int


class SetTags(Entry, tag="tags"):
    """Set tags."""

    values: dict[str, str]


class LogArtifact(Entry, tag="artifact"):
    """Log a file or a folder, `path` relative to the journal's folder."""

    path: str
    folder: str | None


class LogText(Entry, tag="text"):
    """Log a text as an artifact."""

    text: str
    name: str


class LogTable(Entry, tag="table"):
    """Log columns of equal lengths as a table, replacing any table of that name."""

    columns: dict[str, list[Any]]
    name: str


class LogModel(Entry, tag="model"):
    """Log a fused model, and register it where `registered_name` is given.

    `settings` are further values of its config, which served_model.py reads.
    """

    path: str
    digest: str
    question: str
    step: int
    tags: dict[str, str]
    pip: list[str]
    registered_name: str | None
    settings: dict[str, Any] = {}


class EndRun(Entry, tag="end"):
    """End a run with MLflow's status."""

    status: EndStatus
    time: int


class InvalidEntry(Entry, tag="invalid"):
    """A whole line that is no entry, such as one of another version; `error` tells why."""

    line: int
    error: str


AnyEntry = (
    StartRun
    | ResumeRun
    | LogMetrics
    | SetTags
    | LogArtifact
    | LogText
    | LogTable
    | LogModel
    | EndRun
    | InvalidEntry
)
