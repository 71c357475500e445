"""One MLflow run for each training, which later stages add to.

MLflow takes seconds to import, and its store can be slow or unreachable. So every call is written
to a journal in mlruns/outbox/ first, and a thread sends it from there, in order, while the work
goes on. A journal is removed when all of it was sent. The next stage that starts sends journals
left behind by an unreachable store or a killed process, and ends the runs of the killed ones.
Sending an entry twice leaves one record. Artifacts that the store refuses hold up nothing else.
"""

import queue
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from athanor import console, switches
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import entries, registry, tracking_store
from athanor.runs.outbox import Journal, read_entries, unique_name
from athanor.runs.sender import NotYet, Sender

SECONDS_BETWEEN_TRIES = 30  # at most; the first is 1, and each is twice the one before
TRIES_AT_THE_END = 3
SECONDS_FOR_A_LOCK = 120
# The time that an entry had last, and the monotonic clock at that moment, in seconds.
_latest = 0.0, time.monotonic()
# A call to the store costs as much as a hundred metrics in it do, so they go together.
SECONDS_BETWEEN_SENDS = 5


class Run:
    """A run that a thread writes to; use it as a context manager.

    A training's run ends FINISHED when the block ends, FAILED on an error, and KILLED on Ctrl-C or
    SIGTERM. A later stage only adds to it.
    """

    def __init__(self, journal: Journal, opening: entries.StartRun | entries.ResumeRun) -> None:
        self.id: str | None = None
        self.name = opening.run
        self.failure: Exception | None = None
        self._registered: str | None = None
        self._journal = journal
        self._refused: list[str] = []
        self._ends = isinstance(opening, entries.StartRun)
        self._opened = threading.Event()
        self._entries: queue.Queue[entries.AnyEntry | None] = queue.Queue()  # None ends it
        for left in read_entries(journal.folder):
            self._entries.put(left)
        self._append(opening)
        switches.switch_threads_often(True)
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._ends:
            status: entries.EndStatus = "FINISHED"
            if kind is not None:
                status = "FAILED" if issubclass(kind, Exception) else "KILLED"
                self.set_tags({"failure": tracking_store.hide_passwords(str(error))[:500]})
            self._append(entries.EndRun(status, _now()))
        self._entries.put(None)
        self._thread.join()
        switches.switch_threads_often(False)
        if self.failure is None and not self._refused:
            self._journal.remove()
            return
        self._journal.close()
        if self.failure is None:
            _report_refused(self._refused, self._journal.folder)
            return
        if isinstance(self.failure, UserError):
            console.warn(
                f"{tracking_store.summarize_error(self.failure)}. {self._journal.folder} keeps the "
                "record, and the next stage sends it"
            )
            return
        console.warn(
            f"MLflow at {tracking_store.shown_uri()} took no record "
            f"({tracking_store.summarize_error(self.failure)}); {self._journal.folder} keeps it, "
            "and the next stage sends it"
        )

    def wait_for_id(self) -> str | None:
        """Return MLflow's id of the run as soon as it has one, None if the store is unreachable."""
        self._opened.wait()
        return self.id

    def describe(self) -> str:
        """Return the run's id and store in words."""
        return f"{self.id} in {tracking_store.shown_uri()}" if self.id else "not recorded yet"

    def log_metrics(self, step: int, values: dict[str, float], once: bool = False) -> None:
        """Log metrics at a step; with `once` only those without a value at that step."""
        values = {key: float(value) for key, value in values.items()}
        self._append(entries.LogMetrics(step, values, once, _now()))

    def set_tags(self, values: dict[str, Any]) -> None:
        """Set tags."""
        self._append(entries.SetTags({key: str(value) for key, value in values.items()}))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or all files of a folder."""
        self._append(entries.LogArtifact(self._keep(path), folder))

    def log_model(
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
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Keep a fused model as the run's model, and as a version of a registered one.

        Its files are linked, not copied.

        Args:
            fused: the folder of the model.
            digest: the model's own; a run has each model once.
            question: the input example.
            step: the iteration that its weights are from.
            val_loss: their validation loss in nats.
            valid_digest: the digest of what the validation loss was measured on.
            tags: further tags of the model.
            registered_name: the registered model, None to register none.
            settings: how it renders conversations, where that is not as its template does.
        """
        tags = tags | {"val_loss": val_loss, "valid.digest": valid_digest}
        self._append(
            entries.LogModel(
                path=self._keep(fused),
                digest=digest,
                question=question,
                step=step,
                tags={key: str(value) for key, value in tags.items()},
                pip=registry.pin_requirements(),
                registered_name=registered_name,
                settings=settings or {},
            )
        )

    def describe_version(self) -> str:
        """Return the model's registered version in words; to be called after the block."""
        return self._registered or "not yet"

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as an artifact."""
        self._append(entries.LogText(text, name))

    def log_table(self, columns: dict[str, list[Any]], name: str) -> None:
        """Keep columns of equal lengths as a table, which MLflow's UI and load_table read.

        `name` ends in .json. A table of that name is replaced.
        """
        self._append(entries.LogTable(columns, name))

    def _keep(self, path: Path) -> str:
        try:
            return self._journal.keep(path)
        except OSError as error:
            console.warn(f"cannot keep {path} for MLflow ({error})")
            return str(path.resolve())

    def _append(self, entry: entries.AnyEntry) -> None:
        self._journal.append(entry)
        self._entries.put(entry)

    def _work(self) -> None:
        waiting: deque[entries.AnyEntry] = deque()
        sender, more = Sender(self._journal.folder, active=True), True
        self._refused = sender.refused
        sent_left, failures, not_before = False, 0, 0.0
        while more:
            pause = max(0.0, not_before - time.monotonic()) if waiting else None
            with suppress(queue.Empty):
                entry = self._entries.get(timeout=pause)
                more = entry is not None
                if entry is not None:
                    waiting.append(entry)
            if more and (not self._entries.empty() or time.monotonic() < not_before):
                continue
            try:
                if not sent_left:
                    # First, because it can contain the training's record that this one adds to.
                    send_left_journals()
                    sent_left = True
                sender.send(waiting)
                self.failure, failures = None, 0
                not_before = time.monotonic() + SECONDS_BETWEEN_SENDS
            except Exception as error:
                self.failure = error
                pause = min(2**failures, SECONDS_BETWEEN_TRIES)
                not_before = time.monotonic() + pause
                failures += 1
                if not more and sender.run is not None and failures <= TRIES_AT_THE_END:
                    time.sleep(pause)  # the store answered a moment ago
                    more = True
                    self._entries.put(None)
            finally:
                self.id, self._registered = sender.run, sender.registered
                self._opened.set()


def send_left_journals() -> None:
    """Send the journals of processes that ended, and end the runs that these left running.

    A journal that the store refuses stays, with a warning.

    Raises:
        Exception: the store's own, if it is unreachable.
    """
    tracking_store.connect().search_experiments(max_results=1)
    tracking_store.note_answer()
    left = [path for path in Workspace.here().outbox.glob("*") if path.is_dir()]
    # Parents before children, else in the order of their names.
    for folder in sorted(left, key=lambda path: (_is_child(path), path)):
        try:
            _send_left(folder)
        except (OSError, UserError) as error:  # another person's, say
            console.warn(f"cannot send {folder}: {tracking_store.summarize_error(error)}")


def _is_child(folder: Path) -> bool:
    return any(
        isinstance(entry, entries.StartRun) and entry.parent is not None
        for entry in read_entries(folder)
    )


def _store_of(folder: Path) -> str | None:
    """Return a journal's name of its store, None if it was cut off before its first entry."""
    for entry in read_entries(folder):
        if isinstance(entry, entries.StartRun | entries.ResumeRun):
            return entry.store
    return None


def _is_for_this_store(folder: Path, store: str) -> bool:
    """Return whether the present store gets a journal that names `store`.

    It also gets those of an address that has never answered, which was a mistake, if a person has
    named the present one. Any other journal waits for its own store.
    """
    if (name := tracking_store.name_store(store)) == tracking_store.journal_store():
        return True
    if name == tracking_store.EMBEDDED or tracking_store.has_answered(name) or _has_id(folder):
        return False
    if tracking_store.is_given():
        console.warn(
            f"{folder} was recorded for {store}, which never answered; "
            f"{tracking_store.shown_uri()} gets it instead"
        )
        return True
    _report_waiting(folder.parent, store)
    return False


@cache
def _report_waiting(outbox: Path, store: str) -> None:
    console.warn(
        f"records in {outbox} wait for {store}, which never answered; to send them to this store "
        f"instead: `MLFLOW_TRACKING_URI={tracking_store.uri_in_command()} "
        "uv run python -m athanor.ui`"
    )


def _has_id(folder: Path) -> bool:
    """Return whether a journal adds to a run that its store has."""
    return any(
        isinstance(entry, entries.ResumeRun) and entry.run_id is not None
        for entry in read_entries(folder)
    )


def _send_left(folder: Path) -> None:
    journal = Journal(folder.name)
    if not journal.is_ours():
        return
    sender = Sender(folder, active=False)
    try:
        store = _store_of(folder)
        if store is not None and not _is_for_this_store(folder, store):
            return
        waiting, ended = deque(read_entries(folder)), True
        for entry in waiting:
            if isinstance(entry, entries.StartRun | entries.EndRun):
                ended = isinstance(entry, entries.EndRun)
        if not ended:
            died = max(0, int((folder / "journal.jsonl").stat().st_mtime * 1000))
            waiting.append(entries.EndRun("KILLED", died))
        try:
            sender.send(waiting)
        except NotYet:
            return
        except Exception as error:
            sender.refused.append(tracking_store.summarize_error(error))
        if sender.refused:
            _report_refused(sender.refused, folder)
        else:
            journal.remove()
    finally:
        journal.close()


def start_run(
    name: str,
    params: dict[str, Any],
    tags: dict[str, Any],
    datasets: list[entries.Dataset],
    run: str | None = None,
    parent: str | None = None,
) -> Run:
    """Open the run of a training: a new one, or `run`, which it had before.

    `run` and `parent` are our names for the run and for the one that it is part of.
    """
    tracking_store.check_settings()
    run = run or uuid.uuid4().hex
    store = tracking_store.journal_store()
    journal = Journal(run)
    deadline = time.monotonic() + SECONDS_FOR_A_LOCK
    while not journal.is_ours() and time.monotonic() < deadline:
        time.sleep(0.2)  # a stage that has just started is sending what was left there
        journal = Journal(run)
    if not journal.is_ours():
        journal = Journal(unique_name(run))
    elif (left := _store_of(journal.folder)) and tracking_store.name_store(left) != store:
        journal.set_aside()
    opening = entries.StartRun(
        run=run,
        store=store,
        experiment=tracking_store.EXPERIMENT,
        name=name,
        time=_now(),
        params={key: str(value) for key, value in params.items()},
        tags={key: str(value) for key, value in tags.items()} | {"athanor.run": run},
        datasets=datasets,
        parent=parent,
    )
    return Run(journal, opening)


def resume_run(run: str, run_id: str | None) -> Run:
    """Open the run of a training to add to it, by our name and MLflow's id for it.

    If the store does not have the run (the training came out of DVC's cache, from another
    machine), nothing is logged, with a warning.
    """
    tracking_store.check_settings()
    opening = entries.ResumeRun(
        run=run,
        run_id=run_id,
        store=tracking_store.journal_store(),
        experiment=tracking_store.EXPERIMENT,
    )
    return Run(Journal(unique_name(run)), opening)


def _report_refused(refused: list[str], folder: Path) -> None:
    console.warn(
        f"MLflow at {tracking_store.shown_uri()} did not take {', '.join(refused)}; {folder} keeps "
        "it, and the next stage tries again"
    )


def _now() -> int:
    """Return the time in milliseconds; entries take it when they happen, not when they are sent.

    It never runs backwards in a process, even where the computer's clock is set back, and is never
    before 1970, which MLflow would refuse.
    """
    global _latest
    before, then = _latest
    monotonic = time.monotonic()
    _latest = max(time.time(), before + monotonic - then), monotonic
    return int(_latest[0] * 1000)
