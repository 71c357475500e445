"""A training from its checkpoint, if there is one, to its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from athanor import console, switches
from athanor.chat.conversation import Conversation
from athanor.compute.arrays import TokenizedText
from athanor.config.schema import Config
from athanor.device.backend import describe_device, memory_limit
from athanor.errors import UserError
from athanor.model.adapters import InitialAdapters, make_trainable
from athanor.model.load import count_parameters
from athanor.paths import Workspace
from athanor.prepare.result import Prepared
from athanor.train.build import build_trainer
from athanor.train.checkpoints import Checkpoints, unfinished
from athanor.train.initial import load_initial_adapters
from athanor.train.memory import explain_out_of_memory
from athanor.train.metrics import Metrics
from athanor.train.plan import Hooks
from athanor.train.shared import SharedBase
from athanor.train.trainer import Trainer


def fit(
    cfg: Config,
    base: Prepared,
    model: Any,
    tokens: dict[str, list[TokenizedText]],
    checkpoints: Checkpoints,
    on_metrics: Callable[[Metrics], None],
    *,
    initial: InitialAdapters | None = None,
    shared: SharedBase | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Trainer:
    """Train `model` in place, and return its trainer.

    Resumes from the latest checkpoint; `on_metrics` gets the metrics from before it again.

    Args:
        tokens: the rows of `train` and `valid`.
        initial: the adapters to begin with, instead of new ones.
        shared: the results that trainings on this base share.
        log: prints a line about the training.

    Raises:
        UserError: where the training diverges or runs out of memory, or `initial` do not fit it.
        KeyboardInterrupt: after Ctrl-C or SIGTERM and a checkpoint.
    """
    trained_end = base.contract.end if base.contract.trains_end else None
    if trained_end is not None and cfg.train.method != "lora":
        raise UserError("train.end_needs_lora", end=trained_end, method=cfg.train.method)
    with explain_out_of_memory():
        make_trainable(model, cfg.train, cfg.seed, trained_end)
    if initial is not None:
        load_initial_adapters(initial, model, cfg, base.source)
    shared = shared or SharedBase()
    with console.progress() as bar:
        task = bar.add_task("train")

        def publish(metrics: Metrics) -> None:
            on_metrics(metrics)
            log(str(metrics))

        trainer = build_trainer(
            cfg,
            base.workspace,
            model,
            tokens["train"],
            tokens["valid"],
            frozen=shared.frozen,
            checkpoints=checkpoints,
            hooks=Hooks(
                on_iteration=lambda iteration: bar.update(task, completed=iteration),
                on_metrics=publish,
            ),
        )
        bar.update(task, total=trainer.plan.iters)
        _announce(cfg, trainer, shared.predict_peak(cfg, trainer, tokens["train"]), log)
        _resume(trainer, checkpoints.folder, log)
        for metrics in trainer.state.history:
            on_metrics(metrics)
        trainer.run()
    return trainer


def warn_of_rows_without_targets(
    workspace: Workspace,
    rows: dict[str, list[Conversation]],
    tokens: dict[str, list[TokenizedText]],
) -> None:
    """Warn of the rows of each split in `tokens` that have no token to learn."""
    for split, texts in tokens.items():
        lines, count = {text.line for text in texts}, len(rows[split])
        missing = [f"{workspace.rows(split)}:{i}" for i in range(1, count + 1) if i not in lines]
        if missing:
            console.warn(
                f"{len(missing)} of {count} rows of {split} have no token left to learn and are "
                f"left out: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
            )


def _announce(cfg: Config, trainer: Trainer, peak: int, log: Callable[[str], None]) -> None:
    """Log the size of the training, limit mlx's cache to its peak, and warn where it will not fit.

    Memory that one iteration frees is for the next; more than the peak would be kept from other
    processes for nothing.
    """
    learned, total = count_parameters(trainer.forward.model)
    limit = memory_limit()
    switches.limit_cache(peak)
    log(
        f"train {cfg.train.method}: {learned:,} of {total:,} parameters, "
        f"{trainer.plan.iters:,} iterations, on {describe_device()}; the longest batch needs about "
        f"{peak / 1e9:.2f} of {limit / 1e9:.1f} GB"
    )
    if peak > limit:
        console.warn(
            f"the longest batch will not fit: it needs about {peak / 1e9:.1f} of "
            f"{limit / 1e9:.1f} GB; try a smaller train.batch_size (with more "
            "train.grad_accumulation_steps), a smaller train.max_seq_length, fewer "
            "train.num_layers, or train.grad_checkpoint=true"
        )


def _resume(trainer: Trainer, folder: Path, log: Callable[[str], None]) -> None:
    if iteration := trainer.resume():
        log(f"resumes after iteration {iteration}, from {folder}")
    others = [path for path in unfinished(folder.parent) if path != folder]
    if others:
        log(
            f"{folder.parent} holds checkpoints of {len(others)} interrupted trainings with other "
            "settings: each resumes when it is run with its settings again; remove the folders "
            "that are no longer needed"
        )
