"""Stage `train`: fine-tunes the base model on what `prepare` left.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes artifacts/train/adapters/ (mlx-lm's format; the
best or the last, as train.keep says), other_adapters/ (the other of the two), history.csv (what was
learned at which iteration), metrics.json (the last of every metric) and run.json (the MLflow run
that the later stages add to). While it trains it keeps checkpoints in artifacts/train/checkpoints/;
the same command goes on from there after it was interrupted.
"""

import csv
import io
import sys
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from athanor import (
    checkpoints,
    console,
    files,
    models,
    optimizers,
    prepared,
    settings,
    supervision,
)
from athanor.batches import Batches
from athanor.computing.forward import Forward, trainable, trial
from athanor.computing.frozen import Budget, Frozen
from athanor.computing.parts import Parts
from athanor.paths import CHECKPOINTS, PARAMS, PREPARED, SPLITS, TRAINED, root
from athanor.prepared import Prepared
from athanor.record import lineage, tracking
from athanor.schema import Config
from athanor.sources import Source, read_config
from athanor.supervision import Tokens
from athanor.training import LESS_MEMORY, Point, Trainer, fits

# The modules that decide what is trained: this stage's deps in dvc.yaml.
DECIDING = (
    "batches",
    "chat",
    "checkpoints",
    "computing",
    "evaluation",
    "files",
    "learner",
    "models",
    "optimizers",
    "prepared",
    "silu",
    "sources",
    "supervision",
    "templates",
    "train",
    "training",
    "vocabulary",
)
# The param that says how many layers are trained, where train.num_layers can be -1 for all.
LAYERS = "trained_layers"

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

# What depends on the machine's mood and so is in metrics.json and MLflow, not in history.csv.
MEASURED = {"iterations_per_second", "tokens_per_second", "peak_memory", "active_memory"}


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    settings.say_what_is_not_in_conf(cfg)
    base = Prepared.read(cfg)
    rows = prepared.rows(("train", "valid"))
    kept = checkpoints.Checkpoints(root() / CHECKPOINTS, what_decides(cfg, base))
    with start(cfg, base, run_name(cfg), kept.folder.name, _run_of(kept.folder)) as run:
        model, tokenizer = base.load()
        tokens = {split: base.tokens(rows[split], tokenizer, cfg) for split in rows}
        for split in rows:
            name_what_is_left_out(split, len(rows[split]), tokens[split])
        metrics = fit(
            cfg,
            base,
            model,
            tokens,
            TRAINED,
            kept,
            on_point=lambda point: run.metrics(point.iteration, point.metrics, once=True),
            say=console.out.print,
        )
        record(run, TRAINED, metrics)
        files.write_json(
            TRAINED / "run.json",
            {"run": run.name, "run_id": run.opened(), "iteration": metrics["kept_iteration"]},
        )
    kept.clear()
    console.done(
        "train",
        {
            "train loss": f"{metrics['train_loss']:.4f}",
            "validation loss": f"{metrics['val_loss']:.4f}, at best {metrics['best_val_loss']:.4f} "
            f"after iteration {metrics['best_iteration']}",
            "peak memory": f"{metrics['peak_memory']:.2f} GB",
            "adapters": f"{TRAINED / 'adapters'}, after iteration {metrics['kept_iteration']} "
            f"({cfg.train.keep})",
            "MLflow run": run.shown(),
        },
    )


def start(
    cfg: Config,
    base: Prepared,
    name: str,
    point: str,
    run: str,
    parent: str | None = None,
) -> tracking.Run:
    """Opens the MLflow run of a training, with all that decides it.

    `point` is the digest of that; `run` is our own name for the run, and `parent` a sweep's.
    """
    opened = tracking.start(
        name,
        _params(cfg) | _trained_layers(cfg, base.folder),
        {
            **lineage.tags(),
            **_model_tags(base.source),
            "device": models.device(),
            "athanor.point": point,
        },
        datasets(),
        run=run,
        parent=parent,
    )
    with ExitStack() as stack:
        stack.push(opened)  # an interrupt ends the run here, too
        opened.text(OmegaConf.to_yaml(cfg), PARAMS.name)  # with the overrides of this command
        _record_data(opened)
        lineage.record(opened)
        stack.pop_all()
    return opened


def datasets() -> list[tracking.Dataset]:
    """What a training reads, for its run."""
    read = {PREPARED / "train.jsonl": "training", PREPARED / "valid.jsonl": "validation"}
    return [
        tracking.Dataset(str(path), context, files.digest([path]), files.count_lines(path))
        for path, context in read.items()
    ]


def fit(
    cfg: Config,
    base: Prepared,
    model: Any,
    tokens: dict[str, list[Tokens]],
    out: Path,
    kept: checkpoints.Checkpoints,
    *,
    frozen: Frozen | None = None,
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
        raise console.UserError(
            f"the base can't say what its answers end with ({trained_end}), and the rows of a "
            "token are trained by train.method=lora only; `uv run python -m athanor.chat` says "
            "more"
        )
    with fits():
        models.make_trainable(model, cfg.train, cfg.seed, trained_end)
    with console.progress() as bar:
        task = bar.add_task("train")

        def told(point: Point) -> None:
            on_point(point)
            say(_line(point))

        trainer = build(
            cfg,
            model,
            tokens["train"],
            tokens["valid"],
            frozen,
            checkpoints=kept,
            on_point=told,
            on_iteration=lambda iteration: bar.update(task, completed=iteration),
        )
        bar.update(task, total=trainer.iters)
        _begin(cfg, trainer, tokens["train"], kept.folder, say, {} if peaks is None else peaks)
        for point in trainer.state.points:
            on_point(point)
        trainer.run()
    return _write(cfg, trainer, base.source, out)


def record(run: tracking.Run, out: Path, metrics: dict[str, float]) -> None:
    """Adds what a training left in `out` to its run."""
    best, kept = (int(metrics[f"{which}_iteration"]) for which in ("best", "kept"))
    run.metrics(best, {"best_val_loss": metrics["best_val_loss"]}, once=True)
    run.metrics(kept, {"kept_val_loss": metrics["kept_val_loss"]}, once=True)
    run.metrics(int(metrics["iterations"]), {"train_seconds": metrics["train_seconds"]}, once=True)
    # Not first: the first metric is the one that MLflow's page for several runs compares them by.
    _record_counts(run)
    run.tags({"adapters.digest": lineage.adapters_digest(out / "adapters")})
    run.artifact(out / "adapters", "adapters")
    run.artifact(out / "other_adapters", "other_adapters")
    run.artifact(out / "history.csv")


def build(
    cfg: Config,
    model: Any,
    rows: list[Tokens],
    valid: list[Tokens],
    frozen: Frozen | None = None,
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
            raise console.UserError(
                f"no row of {split} has a token left to learn in its first {train.max_seq_length} "
                "tokens; train.max_seq_length sets how many are read"
            )
    world = mx.distributed.init()
    if world.size() > 1:
        raise console.UserError(
            "several processes (mlx.launch): the trainer can share its batches among them, but "
            "this stage keeps its checkpoints and its record for one; start it by itself"
        )
    batches = Batches(rows, train.batch_size, cfg.seed, world.rank(), world.size())
    iters = train.iters if train.epochs is None else train.epochs * batches.an_epoch
    assert iters is not None  # schema.impossible: one of the two is given
    if models.on_cpu():  # where loading has switched it off, and a sweep's last point may have on
        models.compile_kernels(bool(train.compile))
    rate = optimizers.schedule(
        train.lr_schedule,
        train.learning_rate,
        train.lr_end,
        warmup=-(-train.warmup // train.grad_accumulation_steps),
        updates=-(-iters // train.grad_accumulation_steps),
    )
    compile = train.compile if train.compile is not None else not models.on_cpu()
    frozen = frozen or freeze(cfg, model, rows)
    return Trainer(
        Forward(
            model,
            frozen.parts,
            frozen,
            frozen.cut_below(trainable(model)),
            grad_checkpoint=train.grad_checkpoint,
            compile=compile,
        ),
        batches,
        supervision.validated(valid, train.val_batches, train.batch_size),
        optimizers.build(train.optimizer, optimizer_options(cfg), rate),
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
        name_of=lambda row: f"{PREPARED}/train.jsonl:{rows[row].line}",
        **hooks,
    )


def freeze(cfg: Config, model: Any, rows: list[Tokens], cuts: Iterable[int] = ()) -> Frozen:
    """What is frozen of a model, to be computed once; says so where the head can't be apart.

    Args:
        rows: some, to try on whether the model can be taken apart.
        cuts: the first trained layers of the trainings that will share it, as far as known.
    """
    parts = Parts.of(model, trial(rows))
    if parts.whole is not None:
        console.warn(
            f"logits are computed at every position, as {cfg.model.path} can't be taken apart: "
            f"{parts.whole}"
        )
    train = cfg.train
    memory, disk = (int(size * 1e9) for size in (train.activations_memory, train.activations_disk))
    budget = Budget(memory, disk, root() / TRAINED) if train.reuse_activations else None
    return Frozen(parts, budget, cuts)


def optimizer_options(cfg: Config) -> dict[str, Any]:
    """The chosen optimizer's own options."""
    given = cast(Any, OmegaConf.to_container(cast(Any, cfg.train.optimizer_config)))
    return dict(given.get(cfg.train.optimizer, {}))


def _params(cfg: Config) -> dict[str, Any]:
    """The configuration by dotted keys; of optimizers' options those of the chosen one."""
    return settings.flat(cfg) | {"train.optimizer_config": optimizer_options(cfg)}


def _trained_layers(cfg: Config, folder: Path) -> dict[str, int]:
    """How many layers -1 is: pages that draw runs by their number know no other way."""
    layers = read_config(folder).get("num_hidden_layers")
    if not isinstance(layers, int):
        return {}
    return {LAYERS: layers if cfg.train.num_layers == -1 else cfg.train.num_layers}


def what_decides(cfg: Config, base: Prepared) -> dict[str, Any]:
    """Everything that the result depends on: a training goes on from no other's checkpoint."""
    deciding, source = ("seed", "train."), base.source
    return {
        **{key: value for key, value in _params(cfg).items() if key.startswith(deciding)},
        # When it is saved, and where activations are kept, decides nothing.
        **dict.fromkeys(("train.save_every", "train.activations_memory", "train.activations_disk")),
        "data": files.digest([PREPARED / f"{split}.jsonl" for split in ("train", "valid")]),
        "model": [source.path, source.commit, source.digest],
        "code": files.digest(_modules()),
        "libraries": [
            f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "numpy", "transformers")
        ],
        "device": models.device(),
        "end": [base.contract.end, base.contract.trains_end],
    }


def _modules() -> list[Path]:
    """The files of the modules and packages that decide."""
    places = [Path(__file__).with_name(name) for name in DECIDING]
    return [
        path
        for place in places
        for path in (sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")])
    ]


def _record_data(run: tracking.Run) -> None:
    """Keeps what prepare said of the rows; not a dep of this stage, because it decides nothing."""
    for name in ("report.html", "report.json", "chat.json"):
        if (PREPARED / name).exists():
            run.artifact(PREPARED / name, "data")


def _record_counts(run: tracking.Run) -> None:
    if (PREPARED / "metrics.json").exists():
        counts = files.read_json(PREPARED / "metrics.json")
        rows = {f"{split}_rows": counts[split]["rows"] for split in SPLITS}
        run.metrics(0, rows | {"rejected_rows": counts["rows"]["rejected"]}, once=True)


def _run_of(folder: Path) -> str:
    """The name of the MLflow run that a training has, however often it is interrupted."""
    path = folder / "run.json"
    if not path.exists():
        files.write_json(path, {"run": uuid.uuid4().hex})
    return str(files.read_json(path)["run"])


def name_what_is_left_out(split: str, count: int, found: list[Tokens]) -> None:
    """Says which of a split's `count` rows have no token to learn."""
    there = {row.line for row in found}
    missing = [f"{PREPARED}/{split}.jsonl:{i}" for i in range(1, count + 1) if i not in there]
    if missing:
        console.warn(
            f"{len(missing)} of {count} rows of {split} have no token left to learn and are left "
            f"out: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )


def _begin(
    cfg: Config,
    trainer: Trainer,
    rows: list[Tokens],
    folder: Path,
    say: Callable[[str], None],
    peaks: dict[str, int],
) -> None:
    """Says what the training is, and goes on from its checkpoint where there is one.

    `peaks` are those of trainings on the same rows and base, by what theirs depends on.
    """
    import mlx.core as mx

    learned, total = models.parameter_counts(trainer.forward.model)
    limit = models.memory_limit()
    shape = checkpoints.key({k: v for k, v in _params(cfg).items() if k not in TAKES_NO_MEMORY})
    if shape not in peaks:
        longest, count = max(rows, key=len), min(cfg.train.batch_size, len(rows))
        peaks[shape] = trainer.predicted_peak(longest, count)
    peak = peaks[shape]
    # What one iteration frees, the next can have; more than that is kept from others for nothing.
    mx.set_cache_limit(peak)
    say(
        f"train {cfg.train.method}: {learned:,} of {total:,} parameters, "
        f"{trainer.iters} iterations, on {models.device()}; the longest batch needs about "
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


def _write(cfg: Config, trainer: Trainer, source: Source, out: Path) -> dict[str, float]:
    """Writes what the training left; returns the metrics."""
    state = trainer.state
    last = {key: value for point in state.points for key, value in point.metrics.items()}
    weights = {"last": trainer.weights(), "best": trainer.best}
    iterations = {"last": state.iteration, "best": state.best_iteration}
    keep = cfg.train.keep
    other = "last" if keep == "best" else "best"
    for name, which in (("adapters", keep), ("other_adapters", other)):
        models.save_adapters(
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
    text = io.StringIO()
    writer = csv.DictWriter(text, ["iteration", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"iteration": iteration, **line} for iteration, line in lines.items())
    return text.getvalue()


def run_name(cfg: Config) -> str:
    """What a person looks for in a list of runs."""
    layers = "all" if cfg.train.num_layers == -1 else str(cfg.train.num_layers)
    length = (
        f"iters={cfg.train.iters}" if cfg.train.epochs is None else f"epochs={cfg.train.epochs}"
    )
    return (
        f"{Path(cfg.model.path).name} {cfg.train.method} "
        f"lr={cfg.train.learning_rate:g} layers={layers} {length}"
    )


def _model_tags(source: Source) -> dict[str, str]:
    tags = {"model.path": source.path, "model.digest": source.digest}
    return tags | ({"model.commit": source.commit} if source.commit else {})


def _line(point: Point) -> str:
    names = {
        "train_loss": "train loss {:.4f}",
        "val_loss": "validation loss {:.4f}",
        "tokens_per_second": "{:.0f} tokens/s",
        "peak_memory": "peak {:.2f} GB",
    }
    shown = [text.format(point.metrics[key]) for key, text in names.items() if key in point.metrics]
    return f"iteration {point.iteration:>5}  " + "  ".join(shown)


if __name__ == "__main__":
    console.run(main, f"{console.GOES_ON}; {console.CHECKOUT}")
