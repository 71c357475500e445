"""The sender of journal entries; sending an entry again changes nothing in the store."""

import json
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from athanor import console
from athanor.runs import entries, registry, tracking_store

METRICS_PER_CALL = 500


class NotYet(Exception):
    """The record that an entry belongs to has not been sent yet."""


class Sender:
    """A connection to the store that sends one journal's entries.

    `folder` is the journal's, which holds the artifacts; `active` says that the run is at work, not
    left behind by a process that ended.
    """

    def __init__(self, folder: Path, active: bool) -> None:
        self.run: str | None = None
        self.refused: list[str] = []
        self.registered: str | None = None
        self._client: Any = None
        self._folder, self._active = folder, active
        self._logged: set[tuple[str, int]] = set()  # metrics and steps that the run has

    def send(self, waiting: "deque[entries.AnyEntry]") -> None:
        """Send the waiting entries and remove them; note refused artifacts and invalid entries."""
        if self._client is None:
            self._client = tracking_store.connect()
        while waiting:
            metrics = _take_metrics(waiting)
            try:
                if metrics:
                    self._log_metrics(metrics)
                else:
                    self._send(waiting[0])
            except Exception as error:
                # Artifacts can lie where we cannot write while the store itself answers.
                name = _artifact_name(waiting[0])
                if name is None or not self._store_answers():
                    raise
                self.refused.append(f"{name} ({tracking_store.summarize_error(error)})")
            for _ in range(len(metrics) or 1):
                waiting.popleft()

    def _store_answers(self) -> bool:
        for _ in range(2):  # a server that could not keep a file drops the connection
            with suppress(Exception):
                self._client.search_experiments(max_results=1)
                return True
        return False

    def _send(self, entry: entries.AnyEntry) -> None:
        match entry:
            case entries.StartRun():
                self._start(entry)
            case entries.ResumeRun():
                self._resume(entry)
            case entries.InvalidEntry():
                raise ValueError(entry.error)
            case _ if self.run is None:
                pass  # the run is not in this store, as was reported
            case entries.SetTags():
                for key, value in entry.values.items():
                    self._client.set_tag(self.run, key, value)
            case entries.LogText():
                self._client.log_text(self.run, entry.text, entry.name)
            case entries.LogTable():
                self._log_table(entry)
            case entries.LogArtifact():
                path = self._folder / entry.path
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(self.run, str(path), entry.folder)
            case entries.LogModel():
                self._log_model(entry)
            case entries.EndRun():
                self._client.set_terminated(self.run, entry.status, entry.time)

    def _start(self, entry: entries.StartRun) -> None:
        previous, parent = self.run, self._parent_tag(entry)
        run = self._find_run(entry.experiment, entry.run)
        if run is None:
            self._logged = set()
            self.run = str(
                self._client.create_run(
                    tracking_store.ensure_experiment(self._client, entry.experiment),
                    start_time=entry.time,
                    run_name=entry.name,
                    tags=entry.tags | parent,
                ).info.run_id
            )
            self._log_inputs(entry)
        else:
            self._open(run)
            if self._active:
                self._client.update_run(self.run, status="RUNNING")
            if not run.data.params:  # killed right after it was created
                self._log_inputs(entry)
            if "failure" in run.data.tags:
                self._client.delete_tag(self.run, "failure")
            for key, value in parent.items():  # a new parent, where a person deleted the first
                self._client.set_tag(self.run, key, value)
        if previous is not None and previous != self.run:  # it continues in another experiment
            self._client.set_terminated(previous, "KILLED")

    def _resume(self, entry: entries.ResumeRun) -> None:
        run = self._find_run(entry.experiment, entry.run, entry.run_id)
        if run is not None:
            self._open(run)
        elif (self._folder.parent / entry.run).is_dir():
            raise NotYet("the training's own record has not been sent yet")
        else:
            self.run = None
            console.warn(
                f"run {entry.run_id or entry.run} is not in {tracking_store.shown_uri()}: it was "
                "deleted there, or the training was restored from DVC's cache. Nothing is logged; "
                "artifacts/ has the results"
            )

    def _open(self, run: Any) -> None:
        self.run = str(run.info.run_id)
        self._logged = {
            (key, metric.step)
            for key in run.data.metrics
            for metric in self._client.get_metric_history(self.run, key)
        }

    def _parent_tag(self, entry: entries.StartRun) -> dict[str, str]:
        """Return the tag that makes a run a child; empty where the parent was deleted."""
        if entry.parent is None:
            return {}
        parent = self._find_run(entry.experiment, entry.parent)
        if parent is None and (self._folder.parent / entry.parent).is_dir():
            raise NotYet("the sweep's own record has not been sent yet")
        return {} if parent is None else {"mlflow.parentRunId": str(parent.info.run_id)}

    def _find_run(self, experiment: str, name: str, run_id: str | None = None) -> Any:
        from mlflow.exceptions import MlflowException

        if run_id:
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return run if run.info.lifecycle_stage == "active" else None
        runs = self._client.search_runs(
            [tracking_store.ensure_experiment(self._client, experiment)],
            filter_string=f"tags.`athanor.run` = '{name}'",
            max_results=1,
        )
        return runs[0] if runs else None

    def _log_inputs(self, entry: entries.StartRun) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        self._client.log_inputs(
            self.run,
            [
                DatasetInput(
                    Dataset(
                        name=dataset.name,
                        digest=dataset.digest[:36],
                        source_type="local",
                        source=json.dumps({"uri": dataset.name}),
                        profile=json.dumps({"num_rows": dataset.rows}),
                    ),
                    [InputTag("mlflow.data.context", dataset.context)],
                )
                for dataset in entry.datasets
            ],
        )
        # Last, because a run with params is taken to have its datasets.
        params = [Param(key, value) for key, value in entry.params.items()]
        self._client.log_batch(self.run, params=params)

    def _log_metrics(self, batch: list[entries.LogMetrics]) -> None:
        from mlflow.entities import Metric

        if self.run is None:
            return
        metrics: list[Any] = []
        for entry in batch:
            for key, value in entry.values.items():
                if not (entry.once and (key, entry.step) in self._logged):
                    metrics.append(Metric(key, value, entry.time, entry.step))
                    self._logged.add((key, entry.step))
        try:
            self._client.log_batch(self.run, metrics)
        except Exception:
            self._logged -= {(metric.key, metric.step) for metric in metrics}
            raise

    def _log_table(self, entry: entries.LogTable) -> None:
        """Log a table as MlflowClient.log_table does, but replace one of that name.

        MLflow's own appends its rows, so sending it again would double them.
        """
        names, columns = list(entry.columns), entry.columns.values()
        rows = [list(row) for row in zip(*columns, strict=True)]
        text = json.dumps({"columns": names, "data": rows}, ensure_ascii=False)
        self._client.log_text(self.run, text, entry.name)
        tags = self._client.get_run(self.run).data.tags
        logged = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
        if (artifact := {"path": entry.name, "type": "table"}) not in logged:
            tag = json.dumps([*logged, artifact])
            self._client.set_tag(self.run, "mlflow.loggedArtifacts", tag)

    def _log_model(self, entry: entries.LogModel) -> None:
        fused, out = self._folder / entry.path, self._folder / "model"
        model = registry.log_model(self._client, str(self.run), fused, out, entry)
        if entry.registered_name is not None:
            # Two experiments that end at once would both see no better version than their own.
            with tracking_store.hold_lock():
                self.registered = registry.register_version(
                    self._client, entry.registered_name, model, entry.tags
                )


def _take_metrics(waiting: "deque[entries.AnyEntry]") -> list[entries.LogMetrics]:
    """Return the metrics at the front of the queue that go into one call."""
    metrics: list[entries.LogMetrics] = []
    count = 0
    for entry in waiting:
        if not isinstance(entry, entries.LogMetrics) or count >= METRICS_PER_CALL:
            break
        metrics.append(entry)
        count += len(entry.values)
    return metrics


def _artifact_name(entry: entries.AnyEntry) -> str | None:
    """Return the name of an entry that the store can refuse, None for any other."""
    match entry:
        case entries.LogText() | entries.LogTable():
            return entry.name
        case entries.LogArtifact() | entries.LogModel():
            return Path(entry.path).name
        case entries.InvalidEntry():
            return f"line {entry.line} of its journal"
        case _:
            return None
