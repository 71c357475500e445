"""Stage `train`: fine-tunes the base model on what `prepare` left.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes artifacts/train/adapters/ (mlx-lm's format; the
best or the last, as train.keep says), other_adapters/ (the other of the two), history.csv (what was
learned at which iteration), metrics.json (the last of every metric) and run.json (the MLflow run
that the later stages add to). While it trains it keeps checkpoints in artifacts/train/checkpoints/;
the same command goes on from there after it was interrupted.
"""

from pathlib import Path

from athanor import console, files
from athanor.config.schema import Config
from athanor.model.adapters import save_adapters
from athanor.model.source import Source
from athanor.train.trainer import Point, Trainer

# What depends on the machine's mood and so is in metrics.json and MLflow, not in history.csv.
MEASURED = {"iterations_per_second", "tokens_per_second", "peak_memory", "active_memory"}


def write_result(cfg: Config, trainer: Trainer, source: Source, out: Path) -> dict[str, float]:
    """Writes what the training left; returns the metrics."""
    state = trainer.state
    last = {key: value for point in state.points for key, value in point.metrics.items()}
    weights = {"last": trainer.weights(), "best": trainer.best}
    iterations = {"last": state.iteration, "best": state.best_iteration}
    keep = cfg.train.keep
    other = "last" if keep == "best" else "best"
    for name, which in (("adapters", keep), ("other_adapters", other)):
        save_adapters(
            weights[which],
            out / name,
            cfg.train,
            source,
            model=trainer.forward.model,
            iteration=iterations[which],
        )
    first = next(p.metrics["val_loss"] for p in state.points if "val_loss" in p.metrics)
    if keep == "best" and first <= state.best_loss:
        console.warn(
            f"no validation was better than before the training ({first:.4f}): the best after it "
            f"({state.best_loss:.4f}) is kept; a smaller train.learning_rate may do better"
        )
    if state.iteration < trainer.iters:
        console.warn(
            f"stopped early after iteration {state.iteration} of {trainer.iters}: "
            f"{cfg.train.patience} validations in a row were no better"
        )
    metrics = last | {
        "best_val_loss": state.best_loss,
        "best_iteration": iterations["best"],
        "kept_iteration": iterations[keep],
        "kept_val_loss": state.best_loss if keep == "best" else last["val_loss"],
        "iterations": state.iteration,
        "train_seconds": state.seconds,
    }
    files.write_text(out / "history.csv", history(state.points))
    files.write_json(out / "metrics.json", metrics)
    return metrics


def history(points: list[Point]) -> str:
    """The metrics as CSV: a line an iteration, a column a metric, empty where there is none.

    Speeds and memory are left out, so that the same training leaves the same bytes.
    """
    lines: dict[int, dict[str, float]] = {}
    for point in points:
        found = {key: value for key, value in point.metrics.items() if key not in MEASURED}
        lines.setdefault(point.iteration, {}).update(found)
    columns = list(dict.fromkeys(key for line in lines.values() for key in line))
    return files.csv_text(
        ("iteration", *columns),
        [(iteration, *(line.get(key, "") for key in columns)) for iteration, line in lines.items()],
    )
