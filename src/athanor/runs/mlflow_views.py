"""Links to pages of MLflow's UI, and views that it shows of an experiment.

A view is a tag of its experiment, `mlflow.sharedViewState.<key>`, which the UI of MLflow 3.17 lists
in its menu of views and opens by `?viewStateShareKey=<key>`. The value is the UI's own: JSON with a
name, times and the state (filter, order, columns, charts), which may be compressed; see
`savedViewEnvelope.ts`, `ExperimentPageUIState.tsx` and `runs-charts.types.ts` in MLflow's sources.
A UI that cannot read a view reports that and shows the experiment.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

TAG = "mlflow.sharedViewState."

# Columns to compare runs by; a run without such a metric has an empty cell.
MEASURED = ("kept_val_loss", "train_loss", "test_valid_exact_match", "peak_memory", "train_seconds")
SETTINGS = ("train.method", "train.learning_rate", "train.num_layers", "train.rank", "seed")
# From Okabe and Ito's and Tol's palettes, which the color-blind can tell apart; the UI's own colors
# follow from run ids, and soon repeat.
COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#882255", "#999933"),
    *("#332288", "#aa4499", "#44aa99", "#661100"),
)


def link_runs(base: str, experiment_id: str, run_id: str | None = None, query: str = "") -> str:
    """Return the link to a run's page, or that of its experiment's runs, on the server at `base`.

    `query`, as `save_sweep_view` or `save_runs_view` returns it, opens that view of the experiment.
    """
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs"
    page += f"/{run_id}" if run_id else ""
    # Else the UI shows its menu for prompts and traces.
    return f"{page}?{'&'.join(filter(None, ['workflowType=machine_learning', query]))}"


def link_comparison(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the link to the comparison of runs: parallel coordinates, contour, differences."""
    query = {
        "runs": json.dumps(list(run_ids), separators=(",", ":")),
        "experiments": json.dumps([experiment_id], separators=(",", ":")),
        "workflowType": "machine_learning",
    }
    return f"{base.rstrip('/')}/#/compare-runs?{urlencode(query)}"


def save_sweep_view(
    client: Any, experiment_id: str, parent_run_id: str, keys: Sequence[str], metric: str
) -> str:
    """Save the view of a sweep: its children, best first, and charts of `metric` by `keys`.

    `keys` are the dotted names of the swept params; a lower `metric` is better. Children get
    different colors. Saving it again changes nothing.

    Returns:
        The query that opens its charts, for `link_runs`.
    """
    children = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    runs = client.search_runs([experiment_id], children, order_by=["attributes.start_time ASC"])
    for number, run in enumerate(runs):
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
        *({"type": "SCATTER", "xaxis": param, "yaxis": by_metric} for param in params),
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
    return build_sweep_query(parent_run_id)


def build_sweep_query(parent_run_id: str) -> str:
    """Return the query that opens the view of `save_sweep_view`."""
    return f"viewStateShareKey=sweep-{parent_run_id}&compareRunsMode=CHART"


def save_runs_view(client: Any, experiment_id: str) -> str:
    """Save the view of all runs: the newest first, with settings and results.

    Returns:
        The query that opens it, for `link_runs`.
    """
    state = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        **_columns(SETTINGS, ["val_loss", *MEASURED, "test_exact_match"]),
    }
    created = client.get_experiment(experiment_id).creation_time
    _save(client, experiment_id, "runs", "settings and results", created, state)
    return "viewStateShareKey=runs"


def _columns(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the state of the table: these columns, wide enough for their names."""
    named = [f"params.`{key}`" for key in params] + [f"metrics.`{key}`" for key in metrics]
    return {
        "selectedColumns": [*named, "attributes.`Duration`"],
        "columnOrder": ["attributes.`Run Name`", *named, "attributes.`Duration`"],
        "columnWidths": {name: 40 + 8 * len(name.split("`")[1]) for name in named},
    }


def _charts(section: str, charts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of the charts: a section of these, with all other charts folded below."""
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
