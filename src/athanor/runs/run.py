"""MLflow: one run a training, which the later stages add to.

Importing MLflow takes seconds, and a store can be slow or away: whatever is said is written to a
journal in mlruns/outbox/ first, and a thread sends it from there, in its order, while the work goes
on. A journal is removed when all of it was sent. The next stage that starts sends what others left
behind, because the store was away or their process was killed, and ends the runs of those that
died. Sending twice leaves one record, so none of it depends on how far the sender had come. What a
store refuses is set aside, and does not hold up the rest.
"""

import queue
import threading
import time
import uuid
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from athanor import console, switches
from athanor.paths import Workspace
from athanor.runs import client, registry
from athanor.runs.client import Sender
from athanor.runs.outbox import Journal, Said, beside, said_in

SECONDS_BETWEEN_TRIES = 30  # at most; the first is 1, and each is twice the one before
TRIES_AT_THE_END = 3
SECONDS_FOR_A_LOCK = 120
# A call to the store costs as much as a hundred metrics in it do, so they go together.
SECONDS_BETWEEN_SENDS = 5


@dataclass(frozen=True)
class Dataset:
    """What a run read: shown in MLflow as a dataset."""

    name: str
    context: str
    digest: str
    rows: int


class Run:
    """A run that a thread writes to; use it as a context manager.

    A training's ends FINISHED when the block is left well, FAILED on an error and KILLED on Ctrl-C
    or SIGTERM. A later stage only adds to it.
    """

    def __init__(self, journal: Journal, opening: Said) -> None:
        self.id: str | None = None
        self.name = str(opening["run"])
        self.failure: Exception | None = None
        self._registered: str | None = None
        self._journal = journal
        self._refused: list[str] = []
        self._ends = opening["do"] == "start"
        self._opened = threading.Event()
        self._said: queue.Queue[Said | None] = queue.Queue()
        for left in journal.lines():
            self._said.put(left)
        self._say(opening)
        switches.switch_threads_often(True)
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._ends:
            status = "FINISHED"
            if kind is not None:
                status = "FAILED" if issubclass(kind, Exception) else "KILLED"
                self.tags({"failure": client.without_password(str(error))[:500]})
            self._say({"do": "end", "status": status, "time": _now()})
        self._said.put(None)
        self._thread.join()
        switches.switch_threads_often(False)
        if self.failure is None and not self._refused:
            self._journal.remove()
            return
        self._journal.close()
        if self.failure is None:
            console.warn(_refusal(self._refused, self._journal.folder))
            return
        console.warn(
            f"MLflow at {client.name()} took no record ({client.short(self.failure)}); "
            f"it is kept in {self._journal.folder} and sent by the next stage that starts"
        )

    def opened(self) -> str | None:
        """The run's id, as soon as it has one; None if the store can't be reached."""
        self._opened.wait()
        return self.id

    def shown(self) -> str:
        """The run in words."""
        return f"{self.id} in {client.name()}" if self.id else "not recorded yet"

    def metrics(self, step: int, values: dict[str, float], once: bool = False) -> None:
        """Records metrics at a step; with `once` only those that have no value there yet."""
        found = {key: float(value) for key, value in values.items()}
        self._say({"do": "metrics", "step": step, "values": found, "once": once, "time": _now()})

    def tags(self, values: dict[str, Any]) -> None:
        """Sets tags."""
        self._say({"do": "tags", "values": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keeps a file, or all files of a folder."""
        self._say({"do": "artifact", "path": self._kept(path), "folder": folder})

    def model(
        self,
        fused: Path,
        digest: str,
        *,
        question: str,
        step: int,
        val_loss: float,
        valid_digest: str,
        tags: dict[str, Any],
        registered_name: str | None = None,
    ) -> None:
        """Keeps a fused model as the run's model, and as a version of the model `registered_name`.

        `digest` is the model's own: a run has it once. `question` makes its input example. `step`
        is the iteration that its weights are from, `val_loss` their validation loss in nats, and
        `valid_digest` says what that was measured on. The file is named once, not copied.
        """
        measured = {"val_loss": val_loss, "valid.digest": valid_digest}
        self._say(
            {
                "do": "model",
                "path": self._kept(fused),
                "digest": digest,
                "question": question,
                "step": step,
                "tags": {key: str(value) for key, value in {**tags, **measured}.items()},
                "pip": registry.requirements(),
                "registered_name": registered_name,
            }
        )

    def registered(self) -> str:
        """The version that the model became, in words; to be asked when the block was left."""
        return self._registered or "not yet"

    def text(self, text: str, name: str) -> None:
        """Keeps a text as an artifact."""
        self._say({"do": "text", "text": text, "name": name})

    def table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Keeps columns of equal lengths as a table, which MLflow's UI and load_table read.

        `name` ends in .json. A table of that name is replaced.
        """
        self._say({"do": "table", "columns": columns, "name": name})

    def _kept(self, path: Path) -> str:
        try:
            return self._journal.keep(path)
        except OSError as error:
            console.warn(f"{path} can't be kept for MLflow ({error})")
            return str(path.resolve())

    def _say(self, said: Said) -> None:
        self._journal.append(said)
        self._said.put(said)

    def _heard(self, seconds: float | None) -> "list[Said | None]":
        """What is said next, if anything is within so many seconds."""
        try:
            return [self._said.get(timeout=seconds)]
        except queue.Empty:
            return []

    def _work(self) -> None:
        waiting: deque[Said] = deque()
        sender, more = Sender(self._journal.folder, goes_on=True), True
        self._refused = sender.refused
        swept, failures, not_before = False, 0, 0.0
        while more:
            pause = max(0.0, not_before - time.monotonic()) if waiting else None
            for said in self._heard(pause):
                more = said is not None
                if said is not None:
                    waiting.append(said)
            if more and (not self._said.empty() or time.monotonic() < not_before):
                continue
            try:
                if not swept:
                    # First, because a training's record may be among it, to which this one adds.
                    send_what_was_left()
                    swept = True
                sender.send(waiting)
                self.failure, failures = None, 0
                not_before = time.monotonic() + SECONDS_BETWEEN_SENDS
            except Exception as error:
                self.failure = error
                pause = min(2**failures, SECONDS_BETWEEN_TRIES)
                not_before = time.monotonic() + pause
                failures += 1
                if not more and sender.run is not None and failures <= TRIES_AT_THE_END:
                    time.sleep(pause)  # it was there a moment ago
                    more = True
                    self._said.put(None)
            finally:
                self.id, self._registered = sender.run, sender.registered
                self._opened.set()


def send_what_was_left() -> None:
    """Sends the journals whose processes are gone, and ends the runs that they left running.

    One that the store refuses stays, and that is said; a store that is away raises its own error.
    """
    client.client().search_experiments(max_results=1)
    left = [path for path in (Workspace.here().outbox).glob("*") if path.is_dir()]
    # What is part of another run comes after that; else in the order of their names.
    for folder in sorted(left, key=lambda path: (_is_part(path), path)):
        try:
            _send_left(folder)
        except OSError as error:  # another person's, say
            console.warn(f"{folder} can't be sent: {client.short(error)}")


def _is_part(folder: Path) -> bool:
    return any(one.get("parent") for one in said_in(folder) if one["do"] == "start")


def _send_left(folder: Path) -> None:
    journal = Journal(folder.name)
    if not journal.ours():
        return
    sender = Sender(folder, goes_on=False)
    try:
        said = list(journal.lines())
        spoken_to = next((one["store"] for one in said if "store" in one), None)
        if spoken_to is not None and spoken_to != client.of_journals():
            return
        starts = [i for i, one in enumerate(said) if one["do"] == "start"]
        if starts and not any(one["do"] == "end" for one in said[starts[-1] :]):
            died = int((folder / "journal.jsonl").stat().st_mtime * 1000)
            said.append({"do": "end", "status": "KILLED", "time": died})
        try:
            if spoken_to is not None:  # else it was cut off before anything was said
                sender.send(deque(said))
        except client.NotYet:
            return
        except Exception as error:
            sender.refused.append(client.short(error))
        if sender.refused:
            console.warn(_refusal(sender.refused, folder))
        else:
            journal.remove()
    finally:
        journal.close()


def start_run(
    name: str,
    params: dict[str, Any],
    tags: dict[str, Any],
    datasets: list[Dataset],
    run: str | None = None,
    parent: str | None = None,
) -> Run:
    """Opens the run of a training: a new one, or the one that it had before as `run`.

    `parent` is our name for the run that this is a part of.
    """
    run = run or uuid.uuid4().hex
    journal = Journal(run)
    deadline = time.monotonic() + SECONDS_FOR_A_LOCK
    while not journal.ours() and time.monotonic() < deadline:
        time.sleep(0.2)  # a stage that has just started is sending what was left there
        journal = Journal(run)
    if not journal.ours():
        journal = Journal(beside(run))
    elif any(
        said.get("store", client.of_journals()) != client.of_journals() for said in journal.lines()
    ):
        journal.set_aside()
    opening = {
        "do": "start",
        "run": run,
        "store": client.of_journals(),
        "experiment": client.EXPERIMENT,
        "name": name,
        "time": _now(),
        "params": {key: str(value) for key, value in params.items()},
        "tags": {key: str(value) for key, value in tags.items()} | {"athanor.run": run},
        "datasets": [asdict(dataset) for dataset in datasets],
        "parent": parent,
    }
    return Run(journal, opening)


def resume_run(run: str, run_id: str | None) -> Run:
    """Opens the run of a training again, by our name and MLflow's id for it, to add to it.

    A run that this store does not have (the training came out of DVC's cache, from another
    machine) is not made anew: that is said, and nothing is logged.
    """
    opening = {
        "do": "resume",
        "run": run,
        "run_id": run_id,
        "store": client.of_journals(),
        "experiment": client.EXPERIMENT,
    }
    return Run(Journal(beside(run)), opening)


def _refusal(refused: list[str], folder: Path) -> str:
    return (
        f"MLflow at {client.name()} did not take {', '.join(refused)}; it is kept in {folder}, and "
        "the next stage tries again"
    )


def _now() -> int:
    """Milliseconds, as MLflow counts them; taken when a thing happens, not when it is written."""
    return int(time.time() * 1000)
