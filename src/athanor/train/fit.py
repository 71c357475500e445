"""Stage `train`: fine-tunes the base model on what `prepare` left.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes artifacts/train/adapters/ (mlx-lm's format; the
best or the last, as train.keep says), other_adapters/ (the other of the two), history.csv (what was
learned at which iteration), metrics.json (the last of every metric) and run.json (the MLflow run
that the later stages add to). While it trains it keeps checkpoints in artifacts/train/checkpoints/;
the same command goes on from there after it was interrupted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from athanor import console, switches
from athanor.compute.arrays import TokenizedText
from athanor.compute.frozen import FrozenLayers
from athanor.config.schema import Config
from athanor.config.values import effective_values
from athanor.device.backend import describe_device, memory_limit
from athanor.errors import UserError
from athanor.model.adapters import make_trainable
from athanor.model.load import count_parameters
from athanor.paths import Workspace
from athanor.prepare.result import Prepared
from athanor.train import checkpoints
from athanor.train.build import build_trainer
from athanor.train.result import write_result
from athanor.train.trainer import LESS_MEMORY, Point, Trainer, fits

# Keys that sweeps go over and that the memory of a training does not depend on.
TAKES_NO_MEMORY = {
    "seed",
    "train.learning_rate",
    "train.lr_schedule",
    "train.lr_end",
    "train.warmup",
    "train.max_grad_norm",
    "train.iters",
    "train.epochs",
    "train.patience",
}


def fit(
    cfg: Config,
    base: Prepared,
    model: Any,
    tokens: dict[str, list[TokenizedText]],
    out: Path,
    kept: checkpoints.Checkpoints,
    *,
    frozen: FrozenLayers | None = None,
    peaks: dict[str, int] | None = None,
    on_point: Callable[[Point], None],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Trains `model` in place, and writes adapters, history.csv and metrics.json to `out`.

    Goes on from `kept`, where there is something; `on_point` is told of the metrics from before,
    too. Where other trainings share the base, `frozen` is what it has computed already, and `peaks`
    what was predicted of their memory. Returns the last of every metric.

    Raises:
        UserError: when the training diverges or does not fit into the memory.
        KeyboardInterrupt: after Ctrl-C or SIGTERM and a checkpoint.
    """
    trained_end = base.contract.end if base.contract.trains_end else None
    if trained_end is not None and cfg.train.method != "lora":
        raise UserError(
            f"the base can't say what its answers end with ({trained_end}), and the rows of a "
            "token are trained by train.method=lora only; `uv run python -m athanor.chat` says "
            "more"
        )
    with fits():
        make_trainable(model, cfg.train, cfg.seed, trained_end)
    with console.progress() as bar:
        task = bar.add_task("train")

        def told(point: Point) -> None:
            on_point(point)
            say(_line(point))

        trainer = build_trainer(
            cfg,
            base.workspace,
            model,
            tokens["train"],
            tokens["valid"],
            frozen,
            checkpoints=kept,
            on_point=told,
            on_iteration=lambda iteration: bar.update(task, completed=iteration),
        )
        bar.update(task, total=trainer.iters)
        begin(cfg, trainer, tokens["train"], kept.folder, say, {} if peaks is None else peaks)
        for point in trainer.state.points:
            on_point(point)
        trainer.run()
    return write_result(cfg, trainer, base.source, out)


def warn_of_rows_without_targets(
    workspace: Workspace, split: str, count: int, found: list[TokenizedText]
) -> None:
    """Says which of a split's `count` rows have no token to learn."""
    there = {row.line for row in found}
    missing = [
        f"{workspace.prepared}/{split}.jsonl:{i}" for i in range(1, count + 1) if i not in there
    ]
    if missing:
        console.warn(
            f"{len(missing)} of {count} rows of {split} have no token left to learn and are left "
            f"out: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )


def begin(
    cfg: Config,
    trainer: Trainer,
    rows: list[TokenizedText],
    folder: Path,
    say: Callable[[str], None],
    peaks: dict[str, int],
) -> None:
    """Says what the training is, and goes on from its checkpoint where there is one.

    `peaks` are those of trainings on the same rows and base, by what theirs depends on.
    """

    learned, total = count_parameters(trainer.forward.model)
    limit = memory_limit()
    shape = checkpoints.key(
        {k: v for k, v in effective_values(cfg).items() if k not in TAKES_NO_MEMORY}
    )
    if shape not in peaks:
        longest, count = max(rows, key=len), min(cfg.train.batch_size, len(rows))
        peaks[shape] = trainer.predicted_peak(longest, count)
    peak = peaks[shape]
    # What one iteration frees, the next can have; more than that is kept from others for nothing.
    switches.limit_cache(peak)
    say(
        f"train {cfg.train.method}: {learned:,} of {total:,} parameters, "
        f"{trainer.iters} iterations, on {describe_device()}; the longest batch needs about "
        f"{peak / 1e9:.2f} of {limit / 1e9:.1f} GB"
    )
    if peak > limit:
        console.warn(
            f"the longest batch will not fit: about {peak / 1e9:.1f} GB, and there are "
            f"{limit / 1e9:.1f} GB; {LESS_MEMORY}"
        )
    if iteration := trainer.resume():
        say(f"goes on after iteration {iteration}, from {folder}")
    others = [path for path in checkpoints.unfinished(folder.parent) if path != folder]
    if others:
        say(
            f"{folder.parent} holds checkpoints of {len(others)} interrupted trainings with other "
            "settings: run with those they go on; if they are not wanted, remove them"
        )


def _line(point: Point) -> str:
    names = {
        "train_loss": "train loss {:.4f}",
        "val_loss": "validation loss {:.4f}",
        "tokens_per_second": "{:.0f} tokens/s",
        "peak_memory": "peak {:.2f} GB",
    }
    shown = [text.format(point.metrics[key]) for key, text in names.items() if key in point.metrics]
    return f"iteration {point.iteration:>5}  " + "  ".join(shown)
