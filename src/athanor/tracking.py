"""MLflow: one run a training, which the later stages add to.

Importing MLflow takes seconds, and a store can be slow or away: whatever is said is written to a
journal in mlruns/outbox/ first, and a thread sends it from there, in its order, while the work goes
on. A journal is removed when all of it was sent. The next stage that starts sends what others left
behind, because the store was away or their process was killed, and ends the runs of those that
died. Sending twice leaves one record, so none of it depends on how far the sender had come. What a
store refuses is set aside, and does not hold up the rest.
"""

import fcntl
import getpass
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from athanor import __version__, console, files
from athanor.paths import OUTBOX, root

EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "athanor")
METRICS_A_CALL = 500
SECONDS_BETWEEN_TRIES = 30
SECONDS_FOR_A_LOCK = 120

Said = dict[str, Any]


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, or else the SQLite store in mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root()}/mlruns/mlflow.db"


def store_name() -> str:
    """The store as it may be shown: without a password."""
    return _without_password(store_uri())


def _store_of_journals() -> str:
    """The store as journals name it; the embedded one moves with the repository."""
    return store_name() if os.environ.get("MLFLOW_TRACKING_URI") else "embedded"


@dataclass(frozen=True)
class Dataset:
    """What a run read: shown in MLflow as a dataset."""

    name: str
    context: str
    digest: str
    rows: int


class Journal:
    """What was said to a run, a JSON object a line, in a folder that one process writes at a time.

    Files are kept as hard links where the disk has them: the folder is the record until the store
    has it.
    """

    def __init__(self, name: str) -> None:
        self.folder = root() / OUTBOX / name
        self._lock_file = self.folder.with_name(f"{name}.lock")
        self._lock = files.lock(self._lock_file)
        self._unwritten: list[str] = []

    def ours(self) -> bool:
        """Whether this process may write it: no other one that is alive does."""
        return self._lock is not None

    def append(self, said: Said) -> None:
        """Adds a line, and those that a full disk had no room for before."""
        first = not self._unwritten
        # A line of its own also after one that was cut off.
        self._unwritten.append("\n" + json.dumps(said, ensure_ascii=False) + "\n")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            if first:
                console.warn(f"{self.folder} can't be written ({error}); the training goes on")
        else:
            self._unwritten = []

    def keep(self, path: Path) -> str:
        """Keeps a file or a folder as it is now; returns where, below this folder."""
        kept = self.folder / "files" / uuid.uuid4().hex[:8] / path.name
        kept.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=_link)
        else:
            _link(str(path), str(kept))
        return str(kept.relative_to(self.folder))

    def lines(self) -> Iterator[Said]:
        """What was said; a last line that a kill cut off was not."""
        path = self.folder / "journal.jsonl"
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def set_aside(self) -> None:
        """Leaves what is in it to whoever speaks to its own store, under another name."""
        if self.folder.exists():
            self.folder.rename(self.folder.with_name(_beside(self.folder.name)))

    def remove(self) -> None:
        """Removes it: the store has all of it."""
        # First what says that there is something to send.
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leaves it to the next process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Run:
    """A run that a thread writes to; use it as a context manager.

    A training's ends FINISHED when the block is left well, FAILED on an error and KILLED on Ctrl-C
    or SIGTERM. A later stage only adds to it.
    """

    def __init__(self, journal: Journal, opening: Said) -> None:
        self.id: str | None = None
        self.name = str(opening["run"])
        self.failure: Exception | None = None
        self._journal = journal
        self._refused: list[str] = []
        self._ends = opening["do"] == "start"
        self._opened = threading.Event()
        self._said: queue.Queue[Said | None] = queue.Queue()
        for left in journal.lines():
            self._said.put(left)
        self._say(opening)
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
                self.tags({"failure": _without_password(str(error))[:500]})
            self._say({"do": "end", "status": status, "time": _now()})
        self._said.put(None)
        self._thread.join()
        if self.failure is None and not self._refused:
            self._journal.remove()
            return
        self._journal.close()
        if self.failure is None:
            console.warn(_refusal(self._refused, self._journal.folder))
            return
        console.warn(
            f"MLflow at {store_name()} took no record ({_short(self.failure)}); "
            f"it is kept in {self._journal.folder} and sent by the next stage that starts"
        )

    def opened(self) -> str | None:
        """The run's id, as soon as it has one; None if the store can't be reached."""
        self._opened.wait()
        return self.id

    def shown(self) -> str:
        """The run in words."""
        return f"{self.id} in {store_name()}" if self.id else "not recorded yet"

    def metrics(self, step: int, values: dict[str, float], once: bool = False) -> None:
        """Records metrics at a step; with `once` only those that have no value there yet."""
        found = {key: float(value) for key, value in values.items()}
        self._say({"do": "metrics", "step": step, "values": found, "once": once, "time": _now()})

    def tags(self, values: dict[str, Any]) -> None:
        """Sets tags."""
        self._say({"do": "tags", "values": {key: str(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keeps a file, or all files of a folder."""
        try:
            kept = self._journal.keep(path)
        except OSError as error:
            console.warn(f"{path} can't be kept for MLflow ({error})")
            kept = str(path.resolve())
        self._say({"do": "artifact", "path": kept, "folder": folder})

    def text(self, text: str, name: str) -> None:
        """Keeps a text as an artifact."""
        self._say({"do": "text", "text": text, "name": name})

    def _say(self, said: Said) -> None:
        self._journal.append(said)
        self._said.put(said)

    def _work(self) -> None:
        waiting: deque[Said] = deque()
        sender, not_before, more = Sender(self._journal.folder, goes_on=True), 0.0, True
        self._refused = sender.refused
        swept = False
        while more:
            said = self._said.get()
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
                self.failure = None
            except Exception as error:
                self.failure = error
                not_before = time.monotonic() + SECONDS_BETWEEN_TRIES
            finally:
                self.id = sender.run
                self._opened.set()


class Sender:
    """Sends what was said to the store; a thing that it has already is not there twice.

    `folder` is the journal's, where artifacts are; `goes_on` is whether the run is at work, and not
    one of a process that is gone.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.run: str | None = None
        self.refused: list[str] = []
        self.client: Any = None
        self._folder, self._goes_on = folder, goes_on
        self._there: set[tuple[str, int]] = set()

    def send(self, waiting: "deque[Said]") -> None:
        """Sends what waits, and takes away what was sent."""
        if self.client is None:
            self.client = _client()
        while waiting:
            # What is sent together is taken away together.
            together = _together(waiting)
            try:
                self._send(together)
            except Exception as error:
                # A place for files can be away, or closed to us, where the store is not.
                if together[0]["do"] not in ("artifact", "text"):
                    raise
                name = together[0].get("name") or Path(together[0]["path"]).name
                self.refused.append(f"{name} ({_short(error)})")
            for _ in together:
                waiting.popleft()

    def _send(self, said: list[Said]) -> None:
        first = said[0]
        if first["do"] in ("start", "resume"):
            self._open(first)
        elif self.run is None:
            return  # a run that is not in this store, and that was said
        elif first["do"] == "metrics":
            self._metrics(said)
        elif first["do"] == "tags":
            for key, value in first["values"].items():
                self.client.set_tag(self.run, key, value)
        elif first["do"] == "text":
            self.client.log_text(self.run, first["text"], first["name"])
        elif first["do"] == "artifact":
            path = self._folder / first["path"]
            add = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            add(self.run, str(path), first["folder"])
        elif first["do"] == "end":
            self.client.set_terminated(self.run, first["status"], first["time"])

    def _open(self, said: Said) -> None:
        before, found = self.run, self._find(said)
        if found is None and said["do"] == "start":
            self._there = set()
            self.run = str(
                self.client.create_run(
                    _experiment(self.client, said["experiment"]),
                    start_time=said["time"],
                    run_name=said["name"],
                    tags=said["tags"],
                ).info.run_id
            )
            self._describe(said)
        elif found is None:
            if (self._folder.parent / said["run"]).is_dir():
                raise RuntimeError("the training's own record is not there yet")
            self.run = None
            console.warn(
                f"run {said['run_id'] or said['run']} is not in {store_name()}: it was deleted "
                "there, or the training was restored from DVC's cache; nothing is logged, the "
                "figures are in artifacts/"
            )
        else:
            self.run = str(found.info.run_id)
            self._there = {
                (key, point.step)
                for key in found.data.metrics
                for point in self.client.get_metric_history(self.run, key)
            }
            if said["do"] == "start":
                if self._goes_on:
                    self.client.update_run(self.run, status="RUNNING")
                if not found.data.params:  # killed right after it was created
                    self._describe(said)
                if "failure" in found.data.tags:
                    self.client.delete_tag(self.run, "failure")
        if before is not None and before != self.run:  # it goes on in another experiment
            self.client.set_terminated(before, "KILLED")

    def _find(self, said: Said) -> Any:
        from mlflow.exceptions import MlflowException

        if said.get("run_id"):
            try:
                run = self.client.get_run(said["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return run if run.info.lifecycle_stage == "active" else None
        by = f"tags.`athanor.run` = '{said['run']}'"
        experiment = _experiment(self.client, said["experiment"])
        found = self.client.search_runs([experiment], filter_string=by, max_results=1)
        return found[0] if found else None

    def _describe(self, said: Said) -> None:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag, Param

        self.client.log_inputs(
            self.run,
            [
                DatasetInput(
                    MlflowDataset(
                        name=dataset["name"],
                        digest=dataset["digest"][:36],
                        source_type="local",
                        source=json.dumps({"uri": dataset["name"]}),
                        profile=json.dumps({"num_rows": dataset["rows"]}),
                    ),
                    [InputTag("mlflow.data.context", dataset["context"])],
                )
                for dataset in said["datasets"]
            ],
        )
        # Last, because a run that has them is taken to have all of it.
        params = [Param(key, value) for key, value in said["params"].items()]
        self.client.log_batch(self.run, params=params)

    def _metrics(self, said: list[Said]) -> None:
        from mlflow.entities import Metric

        points: list[Any] = []
        for one in said:
            for key, value in one["values"].items():
                place = (key, one["step"])
                if not (one["once"] and place in self._there):
                    points.append(Metric(key, value, one["time"], one["step"]))
                    self._there.add(place)
        try:
            self.client.log_batch(self.run, points)
        except Exception:
            self._there -= {(point.key, point.step) for point in points}
            raise


def send_what_was_left() -> None:
    """Sends the journals whose processes are gone, and ends the runs that they left running.

    One that the store refuses stays, and that is said; a store that is away raises its own error.
    """
    _client().search_experiments(max_results=1)
    for folder in sorted(path for path in (root() / OUTBOX).glob("*") if path.is_dir()):
        try:
            _send_left(folder)
        except OSError as error:  # another person's, say
            console.warn(f"{folder} can't be sent: {_short(error)}")


def _send_left(folder: Path) -> None:
    journal = Journal(folder.name)
    if not journal.ours():
        return
    sender = Sender(folder, goes_on=False)
    try:
        said = list(journal.lines())
        store = next((one["store"] for one in said if "store" in one), None)
        if store is not None and store != _store_of_journals():
            return
        starts = [i for i, one in enumerate(said) if one["do"] == "start"]
        if starts and not any(one["do"] == "end" for one in said[starts[-1] :]):
            died = int((folder / "journal.jsonl").stat().st_mtime * 1000)
            said.append({"do": "end", "status": "KILLED", "time": died})
        try:
            if store is not None:  # else it was cut off before anything was said
                sender.send(deque(said))
        except Exception as error:
            sender.refused.append(_short(error))
        if sender.refused:
            console.warn(_refusal(sender.refused, folder))
        else:
            journal.remove()
    finally:
        journal.close()


def start(
    name: str,
    params: dict[str, Any],
    tags: dict[str, Any],
    datasets: list[Dataset],
    run: str | None = None,
) -> Run:
    """Opens the run of a training: a new one, or the one that it had before as `run`."""
    run = run or uuid.uuid4().hex
    journal = Journal(run)
    deadline = time.monotonic() + SECONDS_FOR_A_LOCK
    while not journal.ours() and time.monotonic() < deadline:
        time.sleep(0.2)  # a stage that has just started is sending what was left there
        journal = Journal(run)
    if not journal.ours():
        journal = Journal(_beside(run))
    elif any(
        said.get("store", _store_of_journals()) != _store_of_journals() for said in journal.lines()
    ):
        journal.set_aside()
    opening = {
        "do": "start",
        "run": run,
        "store": _store_of_journals(),
        "experiment": EXPERIMENT,
        "name": name,
        "time": _now(),
        "params": {key: str(value) for key, value in params.items()},
        "tags": {key: str(value) for key, value in tags.items()} | {"athanor.run": run},
        "datasets": [asdict(dataset) for dataset in datasets],
    }
    return Run(journal, opening)


def resume(run: str, run_id: str | None) -> Run:
    """Opens the run of a training again, by our name and MLflow's id for it, to add to it.

    A run that this store does not have (the training came out of DVC's cache, from another
    machine) is not made anew: that is said, and nothing is logged.
    """
    opening = {
        "do": "resume",
        "run": run,
        "run_id": run_id,
        "store": _store_of_journals(),
        "experiment": EXPERIMENT,
    }
    return Run(Journal(_beside(run)), opening)


def lineage() -> dict[str, str]:
    """Tags that say which code, data and libraries a run was made with."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"athanor.{Path(sys.argv[0]).stem}",
        "athanor.version": __version__,
        "mlx.version": version("mlx"),
        "mlx_lm.version": version("mlx-lm"),
    }
    commit = _git("rev-parse", "HEAD")
    if commit:
        outputs = (":(exclude)params.yaml", ":(exclude)dvc.lock")
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--", ".", *outputs))).lower()
    tracked = Path("data.dvc")
    if tracked.exists():
        tags["dvc.data"] = yaml.safe_load(tracked.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = experiment
    return tags


def _client() -> Any:
    """A client of the store; the embedded one is created by one process, the others wait.

    A schema whose making was cut off can't be mended, so it gets its name when it is whole.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    if not store_uri().startswith("sqlite:///"):
        return MlflowClient(store_uri())
    path = Path(store_uri().removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        client = MlflowClient(store_uri())
        _experiment(client, EXPERIMENT)
    return client


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = not os.environ.get("MLFLOW_TRACKING_URI")
    place = (root() / "mlruns" / "artifacts").as_uri() if embedded else None
    # Without its kind MLflow's UI opens an experiment as one of prompts and traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=place, tags=tags))


def _beside(name: str) -> str:
    """A journal's name that no other has; in an outbox it comes after `name` itself."""
    return f"{name.partition('.')[0]}.{uuid.uuid4().hex[:8]}"


def _refusal(refused: list[str], folder: Path) -> str:
    return (
        f"MLflow at {store_name()} did not take {', '.join(refused)}; it is kept in {folder}, and "
        "the next stage tries again"
    )


def _together(waiting: "deque[Said]") -> list[Said]:
    """The first thing that waits, and if it is metrics, those that follow it directly."""
    found: list[Said] = []
    for said in waiting:
        if found and (said["do"] != "metrics" or found[0]["do"] != "metrics"):
            break
        found.append(said)
        if sum(len(one.get("values", ())) for one in found) >= METRICS_A_CALL:
            break
    return found


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _now() -> int:
    """Milliseconds, as MLflow counts them; taken when a thing happens, not when it is written."""
    return int(time.time() * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return ""


def _short(error: Exception) -> str:
    lines = _without_password(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
