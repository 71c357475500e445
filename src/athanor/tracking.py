"""MLflow: one run a training, which the later stages add to.

Importing MLflow takes seconds, and a store can be slow: everything is handed to a thread that
talks to it, in the order in which it was said, while the work goes on. A store that fails costs
its record and a warning, never the work.
"""

import fcntl
import getpass
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from athanor import __version__, console

EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "athanor")
METRICS_A_CALL = 500


def root() -> Path:
    """The repository's folder: DVC's, also when a queued experiment runs in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, or else the SQLite store in mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root()}/mlruns/mlflow.db"


def store_name() -> str:
    """The store as it may be shown: without a password."""
    return _without_password(store_uri())


@dataclass(frozen=True)
class Dataset:
    """What a run read: shown in MLflow as a dataset."""

    name: str
    context: str
    digest: str
    rows: int


class Run:
    """A run that a thread writes to; use it as a context manager.

    A run that was started here ends FINISHED when the block is left well, FAILED on an error and
    KILLED on Ctrl-C. A resumed one is a training's, whose end a later stage does not change.
    """

    def __init__(self, opening: Callable[[Any], str | None], resumed: bool) -> None:
        self.id: str | None = None
        self.failure: Exception | None = None
        self._opening = opening
        self._resumed = resumed
        self._opened = threading.Event()
        self._said: queue.Queue[Callable[[Any, str], None] | list[Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._resumed:
            status = "FINISHED"
            if kind is not None:
                status = "FAILED" if issubclass(kind, Exception) else "KILLED"
                self.tags({"failure": _without_password(str(error))[:500]})
            ended = _now()
            self._said.put(lambda client, run: client.set_terminated(run, status, ended))
        self._said.put(None)
        self._thread.join()
        if self.failure is not None:
            console.warn(
                f"MLflow at {store_name()} took no record ({_short(self.failure)}); "
                "the figures are in artifacts/"
            )

    def opened(self) -> str | None:
        """The run's id, as soon as it has one; None if the store can't be reached."""
        self._opened.wait()
        return self.id

    def shown(self) -> str:
        """The run in words."""
        return f"{self.id} in {store_name()}" if self.id else "not recorded"

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records metrics at a step."""
        now = _now()
        self._said.put([(key, float(value), now, step) for key, value in values.items()])

    def tags(self, values: dict[str, Any]) -> None:
        """Sets tags."""

        def say(client: Any, run: str) -> None:
            for key, value in values.items():
                client.set_tag(run, key, str(value))

        self._said.put(say)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keeps a file, or all files of a folder."""

        def say(client: Any, run: str) -> None:
            if path.is_dir():
                client.log_artifacts(run, str(path), folder)
            else:
                client.log_artifact(run, str(path), folder)

        self._said.put(say)

    def text(self, text: str, name: str) -> None:
        """Keeps a text as an artifact."""
        self._said.put(lambda client, run: client.log_text(run, text, name))

    def _work(self) -> None:
        try:
            client = _client()
            self.id = self._opening(client)
            self._opened.set()
            more = self.id is not None
            while more:
                more = self._write(client, self._said.get())
        except Exception as error:
            self.failure = error
        finally:
            self._opened.set()

    def _write(self, client: Any, said: Callable[[Any, str], None] | list[Any] | None) -> bool:
        """Writes one thing that was said, metrics together with those that wait behind them."""
        from mlflow.entities import Metric

        assert self.id is not None
        metrics: list[Any] = []
        while isinstance(said, list):
            metrics += [Metric(*point) for point in said]
            if self._said.empty() or len(metrics) >= METRICS_A_CALL:
                client.log_batch(self.id, metrics)
                return True
            said = self._said.get()
        if metrics:
            client.log_batch(self.id, metrics)
        if said is None:
            return False
        said(client, self.id)
        return True


def start(name: str, params: dict[str, Any], tags: dict[str, Any], datasets: list[Dataset]) -> Run:
    """Opens a new run."""
    started = _now()

    def opening(client: Any) -> str:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag, Param

        run = client.create_run(
            _experiment(client),
            start_time=started,
            run_name=name,
            tags={key: str(value) for key, value in tags.items()},
        )
        client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in params.items()])
        client.log_inputs(
            run.info.run_id,
            [
                DatasetInput(
                    MlflowDataset(
                        name=dataset.name,
                        digest=dataset.digest[:36],
                        source_type="local",
                        source=json.dumps({"uri": dataset.name}),
                        profile=json.dumps({"num_rows": dataset.rows}),
                    ),
                    [InputTag("mlflow.data.context", dataset.context)],
                )
                for dataset in datasets
            ],
        )
        return str(run.info.run_id)

    return Run(opening, resumed=False)


def resume(run_id: str | None) -> Run:
    """Opens the run of a training again, to add to it; without an id, one that keeps nothing.

    A run that this store does not have (the training came out of DVC's cache, from another
    machine) is not made anew: that is said, and nothing is logged.
    """

    def opening(client: Any) -> str | None:
        if run_id is None:
            console.warn("the training has no run in MLflow, so nothing is logged")
            return None
        found = client.search_runs(
            [e.experiment_id for e in client.search_experiments()],
            filter_string=f"attributes.run_id = '{run_id}'",
            max_results=1,
        )
        if not found:
            console.warn(
                f"run {run_id} is not in {store_name()}: the training was restored from DVC's "
                "cache; nothing is logged, the figures are in artifacts/"
            )
            return None
        return run_id

    return Run(opening, resumed=True)


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
    """A client of the store; the embedded one is created by one process, the others wait."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    if not store_uri().startswith("sqlite:///"):
        return MlflowClient(store_uri())
    folder = Path(store_uri().removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(store_uri())
        _experiment(client)
    return client


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    embedded = not os.environ.get("MLFLOW_TRACKING_URI")
    place = (root() / "mlruns" / "artifacts").as_uri() if embedded else None
    # Without its kind MLflow's UI opens an experiment as one of prompts and traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(EXPERIMENT, artifact_location=place, tags=tags))


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
