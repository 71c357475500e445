"""Where MLflow's UI shows a thing, and views of an experiment that are set up in it.

A view is a tag of its experiment, `mlflow.sharedViewState.<key>`, which the UI of MLflow 3.17 lists
in its menu of views and opens by `?viewStateShareKey=<key>`. The value is the UI's own: JSON with a
name, times and the state (filter, order, columns, charts), which may be compressed; see
`savedViewEnvelope.ts`, `ExperimentPageUIState.tsx` and `runs-charts.types.ts` in MLflow's sources.
A UI that can't read a view says so and shows the experiment.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

TAG = "mlflow.sharedViewState."

# What a person compares runs by; a run that has no such metric has an empty cell.
MEASURED = ("kept_val_loss", "train_loss", "test_valid_exact_match", "peak_memory", "train_seconds")
SETTINGS = ("train.method", "train.learning_rate", "train.num_layers", "train.rank", "seed")
# The UI's own colors are drawn by the run's id, and soon the same twice.
# Of Okabe and Ito's and Tol's palettes, which the color-blind can tell apart as well.
COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#882255", "#999933"),
    *("#332288", "#aa4499", "#44aa99", "#661100"),
)


def link(base: str, experiment_id: str, run_id: str | None = None, query: str = "") -> str:
    """A run's page, or the page of its experiment's runs, on the server at `base`.

    `query` is what `sweep_view` or `runs_view` returned; it opens that view of the experiment.
    """
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs"
    page += f"/{run_id}" if run_id else ""
    # The UI has two menus, and would show the one for prompts and traces.
    return f"{page}?{'&'.join(filter(None, ['workflowType=machine_learning', query]))}"


def compare_link(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that holds runs against one another: parallel coordinates, contour, differences."""
    asked = {
        "runs": json.dumps(list(run_ids), separators=(",", ":")),
        "experiments": json.dumps([experiment_id], separators=(",", ":")),
        "workflowType": "machine_learning",
    }
    return f"{base.rstrip('/')}/#/compare-runs?{urlencode(asked)}"


def sweep_view(
    client: Any, experiment_id: str, parent_run_id: str, keys: Sequence[str], metric: str
) -> str:
    """Sets up the view of a sweep: its children, best first, and charts of `metric` by `keys`.

    `keys` are the swept params by their dotted names; `metric` is one that is better when lower.
    Children get colors that differ. Setting it up again changes nothing that is as it should be.

    Returns:
        The query that opens its charts, for `link`.
    """
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    found = client.search_runs([experiment_id], children, order_by=["attributes.start_time ASC"])
    for number, run in enumerate(found):
        if "mlflow.runColor" not in run.data.tags:
            color = COLORS[number % len(COLORS)]
            client.set_tag(run.info.run_id, "mlflow.runColor", color)
    by_metric = {"key": metric, "type": "METRIC"}
    params = [{"key": key, "type": "PARAM"} for key in keys[:2]]
    plain = {"lineSmoothness": 0, "useGlobalLineSmoothing": False, "useGlobalXaxisKey": False}
    curves = {"type": "LINE", "xAxisKey": "step", "scaleType": "linear", **plain}
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "selectedParams": list(keys), "selectedMetrics": [metric]},
        {**curves, "metricKey": "val_loss"},
        {**curves, "metricKey": "train_loss"},
        *({"type": "SCATTER", "xaxis": one, "yaxis": by_metric} for one in params),
    ]
    if len(params) > 1:
        axes = {"xaxis": params[0], "yaxis": params[1], "zaxis": by_metric}
        charts.insert(1, {"type": "CONTOUR", **axes})
    state = {
        "searchFilter": children,
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": True,
        **_columns(keys, [metric, *(key for key in MEASURED if key != metric)]),
        **_charts("sweep", charts),
    }
    parent = client.get_run(parent_run_id).info
    key = f"sweep-{parent_run_id}"
    _save(client, experiment_id, key, parent.run_name, parent.start_time, state)
    return sweep_query(parent_run_id)


def sweep_query(parent_run_id: str) -> str:
    """The query that opens what `sweep_view` set up."""
    return f"viewStateShareKey=sweep-{parent_run_id}&compareRunsMode=CHART"


def runs_view(client: Any, experiment_id: str) -> str:
    """Sets up the view of all runs: the newest first, with what was set and what came of it.

    Returns:
        The query that opens it, for `link`.
    """
    state = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        **_columns(SETTINGS, ["val_loss", *MEASURED, "test_exact_match"]),
    }
    created = client.get_experiment(experiment_id).creation_time
    _save(client, experiment_id, "runs", "settings and results", created, state)
    return "viewStateShareKey=runs"


def decoded(value: str) -> tuple[str, dict[str, Any]]:
    """The name and the state of a view, from its tag's value."""
    envelope = json.loads(value)
    compressed = base64.b64decode(envelope["state"].removeprefix("deflate;"))
    return envelope["name"], json.loads(zlib.decompress(compressed))


def _columns(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """The state of the table: these columns, in this order, wide enough for their names."""
    named = [f"params.`{key}`" for key in params] + [f"metrics.`{key}`" for key in metrics]
    return {
        "selectedColumns": [*named, "attributes.`Duration`"],
        "columnOrder": ["attributes.`Run Name`", *named, "attributes.`Duration`"],
        "columnWidths": {one: 40 + 8 * len(one.split("`")[1]) for one in named},
    }


def _charts(section: str, charts: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of the charts: these in a section of their own, all others folded below it."""
    sections = [(section, True), ("Model metrics", False), ("System metrics", False)]
    plain = {"deleted": False, "isGenerated": False}
    return {
        "compareRunCharts": [
            {"uuid": f"{section}-{number}", "metricSectionId": section, **plain, **chart}
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": shown, "isReordered": True, **plain}
            for name, shown in sections
        ],
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
    }


def _save(
    client: Any, experiment_id: str, key: str, name: str, created: int, state: dict[str, Any]
) -> None:
    text = json.dumps(state, separators=(",", ":"), ensure_ascii=False)
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    envelope = {"name": name, "createdAt": created, "updatedAt": created}
    value = json.dumps({**envelope, "state": f"deflate;{packed}"}, ensure_ascii=False)
    if client.get_experiment(experiment_id).tags.get(TAG + key) != value:
        client.set_experiment_tag(experiment_id, TAG + key, value)
