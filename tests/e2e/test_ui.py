"""MLflow's UI is served on the right store, and its views are what a person asked for."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from athanor import ui
from athanor.runs import mlflow_views, tracking_store
from athanor.runs.run import start_run
from support.refused import refused


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The ids by name of runs in the embedded store of these tests' working directory.

    It was moved there after the runs were recorded.
    """
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        ids = {}
        for rate in ("1e-4", "3e-4", "1e-3"):
            params = {"train.learning_rate": rate, "train.num_layers": 2}
            with start_run(f"lr={rate}", params, {}, []) as run:
                run.log_metrics(1, {"val_loss": 2.0, "kept_val_loss": 2.0})
                run.log_text("seed: 0", "params.yaml")
            assert run.id is not None
            ids[f"lr={rate}"] = run.id
        patch.chdir(folder.rename(folder.with_name("moved")))
        client = tracking_store.connect()
        for child in ("lr=3e-4", "lr=1e-3"):
            client.set_tag(ids[child], "mlflow.parentRunId", ids["lr=1e-4"])
        yield ids


class Ui:
    """The process of `python -m athanor.ui`, which has printed its link."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "athanor.ui", "--no-browser", *arguments],
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.output = ""
        self.link = ""
        for line in self.process.stdout:
            self.output += line
            if line.startswith("http"):
                self.link = line.strip()
                break
        assert self.link, self.output
        self.base = self.link.split("/#")[0]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.base}/{path}") as answer:
            return json.loads(answer.read())


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
    return content


def decode_view(value: str) -> tuple[str, dict[str, Any]]:
    """The name and the state of a view, from its tag's value."""
    envelope = json.loads(value)
    compressed = base64.b64decode(envelope["state"].removeprefix("deflate;"))
    return envelope["name"], json.loads(zlib.decompress(compressed))


def test_it_serves_the_embedded_store_until_it_is_interrupted(runs: dict[str, str]) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    first, second = runs["lr=1e-4"], runs["lr=3e-4"]
    opened = Ui(first[:12], second, "--port", str(port))
    try:
        place = urlsplit(opened.base)
        assert place.hostname == "127.0.0.1"
        assert place.port is not None and port < place.port < port + 100
        query = parse_qs(urlsplit(opened.link).fragment.partition("?")[2])
        assert json.loads(query["runs"][0]) == [first, second]
        run = opened.get(f"ajax-api/2.0/mlflow/runs/get?run_id={first}")["run"]
        assert run["info"]["run_name"] == "lr=1e-4"
        kept = opened.get(f"ajax-api/2.0/mlflow/artifacts/list?run_id={first}")["files"]
        assert [file["path"] for file in kept] == ["params.yaml"]
        assert fetch(f"{opened.base}/get-artifact?path=params.yaml&run_uuid={first}") == b"seed: 0"
        assert opened.get("ajax-api/3.0/mlflow/ui-telemetry")["disable_ui_telemetry"] is True

        # A second one on the address of the first: only its link is printed.
        address = opened.base.replace("//", "//me:secret@")
        other = Ui(env={"MLFLOW_TRACKING_URI": address})
        assert other.process.wait() == 0
        assert other.link.startswith(f"{opened.base}/#/experiments/")
        assert "secret" not in other.output
    finally:
        taken.close()
        opened.process.send_signal(signal.SIGINT)
        rest, _ = opened.process.communicate(timeout=300)
    assert (opened.process.returncode, rest) == (0, "")
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{opened.base}/health", timeout=5)


def test_two_at_a_time_take_two_ports() -> None:
    """Also before the first one's server has bound its port."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        first = tried.getsockname()[1]
    with ui.hold_free_port(first) as port, ui.hold_free_port(first) as other:
        assert first <= port < other
    with ui.hold_free_port(port) as again:
        assert again == port


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "athanor.ui", "--no-browser"]
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}

    def run_ui() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "run the command in the repository's folder" in run_ui()
    (tmp_path / "conf").mkdir()
    assert "`uv run dvc repro --pull` creates it" in run_ui()
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_the_link_is_to_what_was_asked_for(runs: dict[str, str]) -> None:
    base = "http://127.0.0.1:5199"
    experiment = tracking_store.connect().get_experiment_by_name("athanor").experiment_id
    [run_id, *_] = runs.values()
    page = f"{base}/#/experiments/{experiment}/runs"
    assert ui.find_page(base, [run_id[:10]]).startswith(f"{page}/{run_id}?")
    assert "viewStateShareKey=runs" in ui.find_page(base, [])
    assert ui.find_page(base, list(runs.values())).startswith(f"{base}/#/compare-runs?runs=")
    with refused("runs.no_such_run", prefix="0" * 32):
        ui.find_page(base, ["0" * 32])
    with refused("runs.no_such_run", prefix="lr=1e-4"):
        ui.find_page(base, ["lr=1e-4"])


def test_a_sweeps_view_is_set_up_once_and_says_what_is_shown(runs: dict[str, str]) -> None:
    client = tracking_store.connect()
    experiment = client.get_experiment_by_name("athanor").experiment_id
    parent, *children = runs.values()
    keys = ["train.learning_rate", "train.num_layers"]

    def set_up() -> tuple[str, str]:
        query = mlflow_views.save_sweep_view(client, experiment, parent, keys, "kept_val_loss")
        key = parse_qs(query)["viewStateShareKey"][0]
        return query, client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{key}"]

    query, value = set_up()
    colors = [client.get_run(child).data.tags["mlflow.runColor"] for child in children]
    assert len(set(colors)) == 2
    client.set_tag(children[0], "mlflow.runColor", "#000000")  # a person's own choice
    assert set_up() == (query, value)
    assert client.get_run(children[0]).data.tags["mlflow.runColor"] == "#000000"
    assert "compareRunsMode=CHART" in query

    name, state = decode_view(value)
    assert name == "lr=1e-4"
    shown = client.search_runs([experiment], state["searchFilter"])
    assert {run.info.run_id for run in shown} == set(children)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`kept_val_loss`", True)
    assert state["selectedColumns"][:3] == [
        *("params.`train.learning_rate`", "params.`train.num_layers`", "metrics.`kept_val_loss`")
    ]
    charts = {chart["type"]: chart for chart in state["compareRunCharts"]}
    assert charts["PARALLEL"]["selectedParams"] == keys
    assert charts["PARALLEL"]["selectedMetrics"] == ["kept_val_loss"]
    axes = [charts["CONTOUR"][axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")]
    assert axes == [*keys, "kept_val_loss"]
    curves = [c["metricKey"] for c in state["compareRunCharts"] if c["type"] == "LINE"]
    assert curves == ["val_loss", "train_loss"]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= sections


def test_a_sweep_over_one_setting_has_no_contour(runs: dict[str, str]) -> None:
    client = tracking_store.connect()
    experiment = client.get_experiment_by_name("athanor").experiment_id
    parent = runs["lr=1e-4"]
    mlflow_views.save_sweep_view(
        client, experiment, parent, ["train.learning_rate"], "kept_val_loss"
    )
    tags = client.get_experiment(experiment).tags
    _, state = decode_view(tags[f"mlflow.sharedViewState.sweep-{parent}"])
    kinds = [chart["type"] for chart in state["compareRunCharts"]]
    assert kinds == ["PARALLEL", "LINE", "LINE", "SCATTER"]


def test_every_page_that_is_linked_is_one_of_the_uis_own() -> None:
    """The tag's prefix and the query's names are in the JavaScript that MLflow brings."""
    import mlflow

    folder = Path(mlflow.__file__).parent / "server/js/build/static/js"
    script = "".join(path.read_text("utf-8") for path in folder.glob("*.js"))
    for name in (
        mlflow_views.TAG,
        "viewStateShareKey",
        "compareRunsMode",
        "workflowType",
        '"deflate;"',
    ):
        assert name in script, name
    state = ("selectedColumns", "columnOrder", "columnWidths", "compareRunCharts", "runsHiddenMode")
    for name in (*state, "compareRunSections", "isAccordionReordered", "/compare-runs"):
        assert name in script, name
