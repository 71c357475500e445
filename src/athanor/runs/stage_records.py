"""The records that the stages train, test and fuse send to the MLflow run of a training."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from athanor import files
from athanor.config.schema import Config
from athanor.config.values import effective_values
from athanor.device.backend import blas_threads, describe_device
from athanor.model.adapters import InitialAdapters
from athanor.model.folder import read_config
from athanor.model.source import Source
from athanor.paths import SPLITS, Workspace
from athanor.runs import lineage
from athanor.runs.entries import Dataset
from athanor.runs.run import Run, start_run

# The param of the number of trained layers; train.num_layers can be -1 for all.
LAYERS = "trained_layers"


def start_training(
    workspace: Workspace,
    cfg: Config,
    source: Source,
    folder: Path,
    name: str,
    digest: str,
    run: str,
    parent: str | None = None,
    initial: InitialAdapters | None = None,
) -> Run:
    """Open the MLflow run of a training, with everything that decides it.

    `source` and `folder` are those of the base model; `digest` is that of all that decides the
    training; `run` and `parent` are our names of the run and of its sweep's run; `initial` are
    the adapters that it begins with.
    """
    opened = start_run(
        name,
        {
            **effective_values(cfg),
            **_trained_layers(cfg, folder),
            "train.blas_threads": blas_threads(),  # what null stood for
        },
        {
            **lineage.collect_tags(),
            "model.path": source.path,
            "model.digest": source.digest,
            **({"model.commit": source.commit} if source.commit else {}),
            **_template_date(workspace),
            "device": describe_device(),
            "athanor.point": digest,
        },
        list_datasets(workspace),
        run=run,
        parent=parent,
    )
    with ExitStack() as stack:
        stack.push(opened)  # an interrupt also ends the run here
        # With the overrides of this command.
        opened.log_text(OmegaConf.to_yaml(cfg), workspace.params.name)
        # The reports of prepare are no deps of the stage: they decide nothing.
        for report in ("report.html", "report.json", "chat.json"):
            if (workspace.prepared / report).exists():
                opened.log_artifact(workspace.prepared / report, "data")
        lineage.record_lineage(opened, workspace.prepared)
        if initial is not None:
            _record_initial(opened, initial, nested=parent is None)
        stack.pop_all()
    return opened


def _record_initial(run: Run, initial: InitialAdapters, nested: bool) -> None:
    """Add the adapters that a training begins with; `nested` lists the run below theirs."""
    run.set_tags({"initial.digest": initial.digest})
    if initial.run is not None:
        run.set_tags({"initial.run": initial.run})
    if initial.run is not None and nested:
        run.set_tags({"mlflow.parentRunId": initial.run})
    for path in (initial.weights, initial.weights.with_name("adapter_config.json")):
        if path.is_file():
            run.log_artifact(path, lineage.INITIAL)


def list_datasets(workspace: Workspace) -> list[Dataset]:
    """Return the datasets of a training."""
    contexts = {workspace.rows("train"): "training", workspace.rows("valid"): "validation"}
    return [
        Dataset(str(path), context, files.digest([path]), files.count_lines(path))
        for path, context in contexts.items()
    ]


def record_training(run: Run, workspace: Workspace, out: Path, metrics: dict[str, float]) -> None:
    """Add the results of a training, written to `out`, to its run."""
    best, kept = int(metrics["best_iteration"]), int(metrics["kept_iteration"])
    run.log_metrics(best, {"best_val_loss": metrics["best_val_loss"]}, once=True)
    run.log_metrics(kept, {"kept_val_loss": metrics["kept_val_loss"]}, once=True)
    run.log_metrics(
        int(metrics["iterations"]), {"train_seconds": metrics["train_seconds"]}, once=True
    )
    # Not first: MLflow's page for several runs compares them by their first metric.
    if (workspace.prepared / "metrics.json").exists():
        counts = files.read_json(workspace.prepared / "metrics.json")
        rows = {f"{split}_rows": counts[split]["rows"] for split in SPLITS}
        run.log_metrics(0, rows | {"rejected_rows": counts["rows"]["rejected"]}, once=True)
    run.set_tags({"adapters.digest": lineage.hash_adapters(out / "adapters")})
    run.log_artifact(out / "adapters", "adapters")
    run.log_artifact(out / "other_adapters", "other_adapters")
    run.log_artifact(out / "history.csv")


def record_test(
    run: Run,
    out: Path,
    metrics: dict[str, float],
    answers: dict[str, list[Any]],
    confusion: str | None,
    iteration: int,
    once: bool = False,
) -> None:
    """Add the results of a test, written to `out`, to the run of a training.

    Args:
        answers: the answers as columns of a table, without rows where no question was asked.
        confusion: the confusion matrix as CSV, None without labels.
        iteration: the iteration of the tested adapters.
        once: record only the metrics without a value at that iteration.
    """
    run.log_metrics(iteration, metrics, once=once)
    run.log_artifact(out / "predictions.jsonl", "test")
    if any(answers.values()):
        run.log_table(answers, "test/answers.json")
    if confusion is not None:
        run.log_artifact(out / "labels.csv", "test")
        run.log_text(confusion, "test/confusion.csv")


def record_fused(run: Run, out: Path, fused: dict[str, Any], iteration: int) -> None:
    """Add a fused model's figures, the content of fused.json in `out`, to the run of a training."""
    run.set_tags(
        {"fused.digest": fused["digest"], "fused.dequantized": str(fused["dequantized"]).lower()}
    )
    metrics = {"fuse_max_logit_difference": fused["parity"]["difference"]}
    if fused["parity"]["share_lost"] is not None:
        metrics["fuse_share_lost"] = fused["parity"]["share_lost"]
    run.log_metrics(iteration, metrics)
    for name in ("fused.json", "Modelfile"):
        if (out / name).exists():
            run.log_artifact(out / name, "fuse")


def _template_date(workspace: Workspace) -> dict[str, str]:
    """Return the date that the chat template wrote as a tag, where it writes one."""
    path = workspace.prepared / "chat.json"
    contract = files.read_json(path) if path.exists() else {}
    date = contract.get("rendering", {}).get("date")
    return {} if date is None else {lineage.DATE: date}


def _trained_layers(cfg: Config, folder: Path) -> dict[str, int]:
    """Return the number of trained layers, by which MLflow's pages draw runs, as a param."""
    layers = read_config(folder).get("num_hidden_layers")
    if not isinstance(layers, int):
        return {}
    return {LAYERS: layers if cfg.train.num_layers == -1 else cfg.train.num_layers}


def name_run(cfg: Config) -> str:
    """Return the name of a training in a list of runs."""
    layers = "all" if cfg.train.num_layers == -1 else str(cfg.train.num_layers)
    length = (
        f"iters={cfg.train.iters}" if cfg.train.epochs is None else f"epochs={cfg.train.epochs}"
    )
    return (
        f"{Path(cfg.model.path).name} {cfg.train.method} "
        f"lr={cfg.train.learning_rate:g} layers={layers} {length}"
    )
