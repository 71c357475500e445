"""Stage `train`: fine-tunes the base model on what `prepare` left.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes artifacts/train/adapters/ (mlx-lm's format; the
best or the last, as train.keep says), other_adapters/ (the other of the two), history.csv (what was
learned at which iteration), metrics.json (the last of every metric) and run.json (the MLflow run
that the later stages add to). While it trains it keeps checkpoints in artifacts/train/checkpoints/;
the same command goes on from there after it was interrupted.
"""

from collections.abc import Iterable
from typing import Any

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
from athanor.train.trainer import Trainer


def build_trainer(
    cfg: Config,
    workspace: Workspace,
    model: Any,
    rows: list[TokenizedText],
    valid: list[TokenizedText],
    frozen: FrozenLayers | None = None,
    **hooks: Any,
) -> Trainer:
    """The trainer that a configuration describes; `hooks` are Trainer's, for checkpoints and news.

    Args:
        frozen: what its base has computed already, where other trainings share it.

    Raises:
        UserError: where no row has anything to learn, or to validate with.
    """
    import mlx.core as mx

    train = cfg.train
    for split, found in (("train", rows), ("valid", valid)):
        if not found:
            raise UserError(
                f"no row of {split} has a token left to learn in its first {train.max_seq_length} "
                "tokens; train.max_seq_length sets how many are read"
            )
    world = mx.distributed.init()
    if world.size() > 1:
        raise UserError(
            "several processes (mlx.launch): the trainer can share its batches among them, but "
            "this stage keeps its checkpoints and its record for one; start it by itself"
        )
    batches = Batches(rows, train.batch_size, cfg.seed, world.rank(), world.size())
    iters = train.iters if train.epochs is None else train.epochs * batches.an_epoch
    assert iters is not None  # schema.impossible: one of the two is given
    if on_cpu():  # where loading has switched it off, and a sweep's last point may have on
        compile_kernels(bool(train.compile))
    rate = optimizers.build_schedule(
        train.lr_schedule,
        train.learning_rate,
        train.lr_end,
        warmup=-(-train.warmup // train.grad_accumulation_steps),
        updates=-(-iters // train.grad_accumulation_steps),
    )
    compile = train.compile if train.compile is not None else not on_cpu()
    frozen = frozen or build_frozen(cfg, workspace, model, rows)
    return Trainer(
        Forward(
            model,
            frozen.parts,
            frozen,
            frozen.choose_cut(trainable_weights(model)),
            grad_checkpoint=train.grad_checkpoint,
            compile=compile,
        ),
        batches,
        select_validation_texts(valid, train.val_batches, train.batch_size),
        optimizers.build_optimizer(train.optimizer, optimizer_options(cfg), rate),
        seed=cfg.seed,
        iters=iters,
        batch_size=train.batch_size,
        steps_per_report=train.steps_per_report,
        steps_per_eval=train.steps_per_eval,
        grad_accumulation_steps=train.grad_accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        compile=compile,
        patience=train.patience,
        save_every=train.save_every,
        name_of=lambda row: f"{workspace.prepared}/train.jsonl:{rows[row].line}",
        **hooks,
    )


def build_frozen(
    cfg: Config,
    workspace: Workspace,
    model: Any,
    rows: list[TokenizedText],
    cuts: Iterable[int] = (),
) -> FrozenLayers:
    """What is frozen of a model, to be computed once; says so where the head can't be apart.

    Args:
        rows: some, to try on whether the model can be taken apart.
        cuts: the first trained layers of the trainings that will share it, as far as known.
    """
    parts = Parts.find(model, probe_tokens(rows))
    if parts.unsplit_reason is not None:
        console.warn(
            f"logits are computed at every position, as {cfg.model.path} can't be taken apart: "
            f"{parts.unsplit_reason}"
        )
    train = cfg.train
    memory, disk = (int(size * 1e9) for size in (train.activations_memory, train.activations_disk))
    budget = (
        Budget(memory, disk, workspace.home / "artifacts/train")
        if train.reuse_activations
        else None
    )
    return FrozenLayers(parts, budget, cuts)
