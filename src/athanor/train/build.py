"""The trainer that a configuration describes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from athanor import console
from athanor.chat.tokens import select_validation_texts
from athanor.compute import optimizers
from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import Forward, probe_tokens, trainable_weights
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.schema import Config
from athanor.config.values import optimizer_options
from athanor.device.backend import compile_kernels, on_cpu
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.train.batches import Batches
from athanor.train.checkpoints import Checkpoints
from athanor.train.plan import Hooks, TrainingPlan
from athanor.train.trainer import Trainer


def build_trainer(
    cfg: Config,
    workspace: Workspace,
    model: Any,
    rows: list[TokenizedText],
    valid: list[TokenizedText],
    *,
    frozen: FrozenLayers | None = None,
    checkpoints: Checkpoints | None = None,
    hooks: Hooks | None = None,
) -> Trainer:
    """Return the trainer of a configuration.

    Args:
        frozen: the frozen part of the model, where other trainings share it.

    Raises:
        UserError: where no row has a token to learn, or to validate with.
    """
    train = cfg.train
    for split, split_rows in (("train", rows), ("valid", valid)):
        if not split_rows:
            raise UserError("train.no_targets", split=split, length=train.max_seq_length)
    if (count := mx.distributed.init().size()) > 1:
        raise UserError("train.several_processes", count=count)
    batches = Batches(rows, train.batch_size, cfg.seed)
    plan = TrainingPlan.from_config(cfg, batches.per_epoch)
    if on_cpu():  # loading a model switched it off, and an earlier trial may have switched it on
        compile_kernels(bool(train.compile))
    rate = optimizers.build_schedule(
        train.lr_schedule,
        train.learning_rate,
        train.lr_end,
        warmup=-(-train.warmup // plan.grad_accumulation_steps),
        updates=plan.updates,
    )
    frozen = frozen or build_frozen(cfg, workspace, model, rows)
    forward = Forward(
        model,
        frozen.parts,
        frozen,
        frozen.choose_cut(trainable_weights(model)),
        grad_checkpoint=train.grad_checkpoint,
        compile=plan.compile,
    )
    return Trainer(
        plan,
        forward,
        batches,
        select_validation_texts(valid, train.val_batches, train.batch_size),
        optimizers.build_optimizer(train.optimizer, optimizer_options(cfg), rate),
        checkpoints,
        replace(
            hooks or Hooks(), name_row=lambda row: f"{workspace.rows('train')}:{rows[row].line}"
        ),
    )


def build_frozen(
    cfg: Config,
    workspace: Workspace,
    model: Any,
    rows: list[TokenizedText],
    cuts: Iterable[int] = (),
) -> FrozenLayers:
    """Return the frozen part of a model, which is computed once; warn where it is all or nothing.

    Args:
        rows: rows to try the parts on.
        cuts: the first trained layers of the trainings that will share it, as far as known.
    """
    parts = Parts.find(model, probe_tokens(rows))
    if parts.unsplit_reason is not None:
        console.warn(
            f"{cfg.model.path} cannot be split into layers and a head ({parts.unsplit_reason}): "
            "its logits are computed at every position"
        )
    train = cfg.train
    memory, disk = (int(size * 1e9) for size in (train.activations_memory, train.activations_disk))
    budget = (
        Budget(memory, disk, workspace.home / "artifacts/train")
        if train.reuse_activations
        else None
    )
    return FrozenLayers(parts, budget, cuts)
