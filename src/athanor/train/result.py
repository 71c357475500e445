"""The output of a training: adapters, history.csv and metrics.json."""

from pathlib import Path

from athanor import console, files
from athanor.config.schema import Config
from athanor.model.adapters import save_adapters
from athanor.model.source import Source
from athanor.train.metrics import history_csv
from athanor.train.trainer import Trainer


def write_result(cfg: Config, trainer: Trainer, source: Source, out: Path) -> dict[str, float]:
    """Write the result of a training to `out`; return the last of every metric."""
    state = trainer.state
    assert state.best_loss is not None  # a training validates at its end
    last = {key: value for metrics in state.history for key, value in metrics.values.items()}
    weights = {"last": trainer.learner.weights, "best": trainer.best}
    iterations = {"last": state.iteration, "best": state.best_iteration}
    keep = cfg.train.keep
    other = "last" if keep == "best" else "best"
    for name, kind in (("adapters", keep), ("other_adapters", other)):
        save_adapters(
            weights[kind],
            out / name,
            cfg.train,
            source,
            model=trainer.forward.model,
            iteration=iterations[kind],
        )
    first = next(m.values["val_loss"] for m in state.history if "val_loss" in m.values)
    if keep == "best" and first <= state.best_loss:
        console.warn(
            f"the validation loss never fell below its value before the training ({first:.4f}); "
            f"the best afterwards ({state.best_loss:.4f}) is kept; try a smaller "
            "train.learning_rate"
        )
    if state.iteration < trainer.plan.iters:
        console.warn(
            f"stopped early after iteration {state.iteration} of {trainer.plan.iters}: "
            f"{cfg.train.patience} validations in a row brought no improvement"
        )
    metrics = last | {
        "best_val_loss": state.best_loss,
        "best_iteration": iterations["best"],
        "kept_iteration": iterations[keep],
        "kept_val_loss": state.best_loss if keep == "best" else last["val_loss"],
        "iterations": state.iteration,
        "train_seconds": state.seconds,
    }
    files.write_text(out / "history.csv", history_csv(state.history))
    files.write_json(out / "metrics.json", metrics)
    return metrics


def describe_metrics(cfg: Config, metrics: dict[str, float]) -> dict[str, str]:
    """Return the metrics at the end of a training in words, by name."""
    return {
        "train loss": f"{metrics['train_loss']:.4f}",
        "validation loss": f"{metrics['val_loss']:.4f}; best {metrics['best_val_loss']:.4f} "
        f"after iteration {metrics['best_iteration']}",
        "peak memory": f"{metrics['peak_memory']:.2f} GB",
        "kept": f"after iteration {metrics['kept_iteration']} ({cfg.train.keep})",
    }
