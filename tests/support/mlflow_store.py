"""MLflow's tracking store as tests look into it: by its URI, or by the folder of a project."""

from pathlib import Path
from typing import Any


def connect(store: str | Path) -> Any:
    """Return an MlflowClient of a store; of a folder's embedded one, if it is a path."""
    from mlflow import MlflowClient

    if isinstance(store, Path):
        store = f"sqlite:///{store}/mlruns/mlflow.db".replace("%", "%25")
    return MlflowClient(store)


def list_runs(store: str | Path, experiment: str = "athanor") -> list[Any]:
    """Return the runs of an experiment, the newest first; none where there is no experiment."""
    client = connect(store)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def read_metric(store: str | Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """Return the steps of a run's metric with their values, ordered."""
    history = connect(store).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def fetch_artifact(store: str | Path, run_id: str | None, path: str) -> Path:
    """Return the path of a run's artifact, a file or a folder."""
    return Path(connect(store).download_artifacts(run_id, path))
