"""MLflow's side: the client of the store, and what is sent to it, once.

MLflow is imported only where it is used: that takes seconds.
"""

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from athanor import console, files, switches
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import registry
from athanor.runs.outbox import Said

EXPERIMENT = os.environ.get("MLFLOW_EXPERIMENT_NAME", "athanor")
METRICS_A_CALL = 500


def uri() -> str:
    """MLFLOW_TRACKING_URI, or else the SQLite store in mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Workspace.here().runs}/mlflow.db"


def name() -> str:
    """The store as it may be shown: without a password."""
    return without_password(uri())


def of_journals() -> str:
    """The store as journals name it; the embedded one moves with the repository."""
    return name() if os.environ.get("MLFLOW_TRACKING_URI") else "embedded"


class NotYet(Exception):
    """What something is to be added to waits itself to be sent."""


class Sender:
    """Sends what was said to the store; a thing that it has already is not there twice.

    `folder` is the journal's, where artifacts are; `goes_on` is whether the run is at work, and not
    one of a process that is gone.
    """

    def __init__(self, folder: Path, goes_on: bool) -> None:
        self.run: str | None = None
        self.refused: list[str] = []
        self.registered: str | None = None
        self.client: Any = None
        self._folder, self._goes_on = folder, goes_on
        self._there: set[tuple[str, int]] = set()

    def send(self, waiting: "deque[Said]") -> None:
        """Sends what waits, and takes away what was sent."""
        if self.client is None:
            self.client = client()
        while waiting:
            # What is sent together is taken away together.
            together = _together(waiting)
            try:
                self._send(together)
            except Exception as error:
                # A place for files can be away, or closed to us, where the store is not.
                of_files = together[0]["do"] in ("artifact", "text", "table", "model")
                if not of_files or not self._answers():
                    raise
                name = together[0].get("name") or Path(together[0]["path"]).name
                self.refused.append(f"{name} ({short(error)})")
            for _ in together:
                waiting.popleft()

    def _answers(self) -> bool:
        for _ in range(2):  # a server that could not keep a file drops the connection
            with suppress(Exception):
                self.client.search_experiments(max_results=1)
                return True
        return False

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
        elif first["do"] == "table":
            self._table(first)
        elif first["do"] == "artifact":
            path = self._folder / first["path"]
            add = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            add(self.run, str(path), first["folder"])
        elif first["do"] == "model":
            self._model(first)
        elif first["do"] == "end":
            self.client.set_terminated(self.run, first["status"], first["time"])

    def _open(self, said: Said) -> None:
        parent = self._parent(said)
        before, found = self.run, self._find(said)
        if found is None and said["do"] == "start":
            self._there = set()
            self.run = str(
                self.client.create_run(
                    _experiment(self.client, said["experiment"]),
                    start_time=said["time"],
                    run_name=said["name"],
                    tags=said["tags"] | parent,
                ).info.run_id
            )
            self._describe(said)
        elif found is None:
            if (self._folder.parent / said["run"]).is_dir():
                raise NotYet("the training's own record is not there yet")
            self.run = None
            console.warn(
                f"run {said['run_id'] or said['run']} is not in {name()}: it was deleted "
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
                for key, value in parent.items():  # another one, where a person deleted the first
                    self.client.set_tag(self.run, key, value)
        if before is not None and before != self.run:  # it goes on in another experiment
            self.client.set_terminated(before, "KILLED")

    def _parent(self, said: Said) -> dict[str, str]:
        """The tag that makes a run part of another; none where that was deleted."""
        if said.get("parent") is None:
            return {}
        found = self._find({"run": said["parent"], "experiment": said["experiment"]})
        if found is None and (self._folder.parent / said["parent"]).is_dir():
            raise NotYet("the sweep's own record is not there yet")
        return {} if found is None else {"mlflow.parentRunId": str(found.info.run_id)}

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

    def _table(self, said: Said) -> None:
        """What client.log_table writes, but in place of a table of that name, not behind its rows.

        So that sending it again changes nothing.
        """
        names, columns = list(said["columns"]), said["columns"].values()
        rows = [list(row) for row in zip(*columns, strict=True)]
        text = json.dumps({"columns": names, "data": rows}, ensure_ascii=False)
        self.client.log_text(self.run, text, said["name"])
        tags = self.client.get_run(self.run).data.tags
        logged = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": said["name"], "type": "table"}) not in logged:
            tag = json.dumps([*logged, entry])
            self.client.set_tag(self.run, "mlflow.loggedArtifacts", tag)

    def _model(self, said: Said) -> None:
        name = said["registered_name"]
        model = registry.log(
            self.client,
            str(self.run),
            self._folder / said["path"],
            self._folder / "model",
            name=name or "fused",
            digest=said["digest"],
            question=said["question"],
            pip=said["pip"],
            step=said["step"],
            tags=said["tags"],
        )
        if name is not None:
            # Two experiments that end at once would both see no better one than their own.
            with alone():
                self.registered = registry.register(self.client, name, model, said["tags"])


@contextmanager
def alone() -> Iterator[None]:
    """While the block runs no other process is in one of the same SQLite store; others wait."""
    if not uri().startswith("sqlite:///"):
        yield
        return
    folder = Path(uri().removeprefix("sqlite:///")).parent
    with files.lock(folder / ".lock"):
        yield


def client() -> Any:
    """A client of the store; the embedded one is created by one process, the others wait.

    A schema whose making was cut off can't be mended, so it gets its name when it is whole.
    """
    switches.configure_mlflow()
    from mlflow import MlflowClient

    if uri().startswith(("http://", "https://")):
        return MlflowClient(uri())
    if not uri().startswith("sqlite:///"):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 0  # else it tries for a minute or more, and no setting changes that
        return MlflowClient(uri())
    path = Path(uri().removeprefix("sqlite:///"))
    with alone():
        if not path.exists():
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        client = MlflowClient(uri())
        _experiment(client, EXPERIMENT)
    return client


def refuse_absent() -> None:
    """Refuses an SQLite store that is not there, which a client would make.

    Raises:
        UserError: where it is not there.
    """
    if uri().startswith("sqlite:///") and not Path(uri().removeprefix("sqlite:///")).exists():
        elsewhere = (
            not os.environ.get("MLFLOW_TRACKING_URI")
            and not (Workspace.here().home / "conf").is_dir()
        )
        mended = (
            "run this in the repository's folder"
            if elsewhere
            else "`uv run dvc repro --pull` makes one, MLFLOW_TRACKING_URI names another store"
        )
        raise UserError(f"there are no runs yet: {name()} is not there; {mended}")


@contextmanager
def said_shortly() -> Iterator[None]:
    """Turns what the store's client raises in the block into a line, without a password.

    Raises:
        UserError: for any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {name()}: {short(error)}; is MLFLOW_TRACKING_URI right?"
        ) from None


@said_shortly()
def find(beginning: str) -> Any:
    """MLflow's run whose id begins so, as git finds commits.

    Raises:
        UserError: where none or several do, there is no store, or it is away.
    """
    refuse_absent()
    known = client()
    everywhere = [experiment.experiment_id for experiment in known.search_experiments()]
    by = f"attributes.run_id LIKE '{beginning.lower()}%'"
    found = (
        known.search_runs(everywhere, filter_string=by, max_results=5)
        if re.fullmatch(r"[0-9a-fA-F]+", beginning)
        else []
    )
    if len(found) == 1:
        return found[0]
    said = (
        f"several runs begin with {beginning}; type more of the id of one of them"
        if found
        else f"no run in {name()} begins with {beginning or 'nothing'}; the latest are"
    )
    latest = found or known.search_runs(
        everywhere, max_results=5, order_by=["attributes.start_time DESC"]
    )
    listed = [f"{one.info.run_id}  {one.info.run_name} ({one.info.status})" for one in latest]
    raise UserError(
        "\n  ".join([f"{said}:", *listed])
        if listed
        else f"there are no runs in {name()} yet: `uv run dvc repro --pull` makes one"
    )


def finished_parts(run_id: str) -> list[str]:
    """Our names for the runs that are part of another one, and ended well."""
    by = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'"
    known = client()
    experiment = known.get_run(run_id).info.experiment_id
    found: list[str] = []
    token = None
    while True:
        page = known.search_runs([experiment], filter_string=by, page_token=token)
        found += [run.data.tags["athanor.run"] for run in page if "athanor.run" in run.data.tags]
        if not (token := page.token):
            return found


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    embedded = not os.environ.get("MLFLOW_TRACKING_URI")
    place = (Workspace.here().runs / "artifacts").as_uri() if embedded else None
    # Without its kind MLflow's UI opens an experiment as one of prompts and traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return str(client.create_experiment(name, artifact_location=place, tags=tags))
    except Exception:
        # Of several that start at once on a server, one makes it.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


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


def without_password(text: str) -> str:
    """A text with no password of an address in it, neither before the host nor in the query."""
    # To the last @: people put / and @ there as they are. A driver quotes what it took for a host.
    text = re.sub(r"(//|')\S*@", r"\1", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token|sslpassword)=)[^&\s]*", r"\1…", text)


def short(error: Exception) -> str:
    lines = without_password(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
