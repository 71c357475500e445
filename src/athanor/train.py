"""Stage `train`: fine-tunes the base model on what `prepare` left.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes artifacts/train/adapters/ (mlx-lm's format),
history.csv (every metric at its iteration), metrics.json (the last of each) and run.json (the
MLflow run that the later stages add to).
"""

import csv
import io
import sys
from pathlib import Path

from omegaconf import OmegaConf

from athanor import chat, console, files, models, settings, sources, tracking
from athanor.paths import PARAMS, PREPARED, TRAINED
from athanor.schema import Config
from athanor.training import Point, train


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    settings.say_what_is_not_in_conf(cfg)
    source = sources.Source.read(PREPARED / "model.json")
    if (source.path, source.revision) != (cfg.model.path, cfg.model.revision):
        raise console.UserError(
            f"prepare was run for {source.path} at {source.revision}, and now the model is "
            f"{cfg.model.path} at {cfg.model.revision}: `uv run dvc repro prepare`"
        )
    prepared = {
        split: files.read_jsonl(PREPARED / f"{split}.jsonl") for split in ("train", "valid")
    }
    points: list[Point] = []
    with tracking.start(
        run_name(cfg),
        settings.flat(cfg),
        {**tracking.lineage(), **_model_tags(source), "device": models.device()},
        [
            tracking.Dataset(
                f"{PREPARED}/{split}.jsonl",
                context,
                files.digest([PREPARED / f"{split}.jsonl"]),
                len(prepared[split]),
            )
            for split, context in (("train", "training"), ("valid", "validation"))
        ],
    ) as run:
        run.text(OmegaConf.to_yaml(cfg), PARAMS.name)  # with the overrides of this command
        folder = source.folder()
        model, tokenizer = models.load(folder)
        tokens = {
            split: chat.tokenize_all(
                rows, tokenizer, cfg.train.mask_prompt, cfg.train.max_seq_length
            )
            for split, rows in prepared.items()
        }
        models.make_trainable(model, cfg.train, cfg.seed)
        trainable, total = models.parameter_counts(model)
        console.out.print(
            f"train {cfg.train.method}: {trainable:,} of {total:,} parameters, "
            f"{len(tokens['train'])} rows, on {models.device()}"
        )
        with console.progress() as bar:
            task = bar.add_task("train", total=cfg.train.iters)

            def on_point(point: Point) -> None:
                points.append(point)
                run.metrics(point.iteration, point.metrics)
                bar.console.print(_line(point))

            train(
                model,
                tokens["train"],
                tokens["valid"],
                seed=cfg.seed,
                batch_size=cfg.train.batch_size,
                iters=cfg.train.iters,
                learning_rate=cfg.train.learning_rate,
                val_batches=cfg.train.val_batches,
                steps_per_report=cfg.train.steps_per_report,
                steps_per_eval=cfg.train.steps_per_eval,
                grad_checkpoint=cfg.train.grad_checkpoint,
                grad_accumulation_steps=cfg.train.grad_accumulation_steps,
                on_iteration=lambda iteration: bar.update(task, completed=iteration),
                on_point=on_point,
            )
        last = {key: value for point in points for key, value in point.metrics.items()}
        models.save_adapters(model, TRAINED / "adapters", cfg.train, source)
        files.write_text(TRAINED / "history.csv", history(points))
        files.write_json(TRAINED / "metrics.json", last)
        run.artifact(TRAINED / "adapters", "adapters")
        run.artifact(TRAINED / "history.csv")
        files.write_json(TRAINED / "run.json", {"run_id": run.opened()})
    console.done(
        "train",
        {
            "train loss": f"{last['train_loss']:.4f}",
            "validation loss": f"{last['val_loss']:.4f}",
            "peak memory": f"{last['peak_memory']:.2f} GB",
            "adapters": TRAINED / "adapters",
            "MLflow run": run.shown(),
        },
    )


def history(points: list[Point]) -> str:
    """The metrics as CSV: a line an iteration, a column a metric, empty where there is none."""
    lines: dict[int, dict[str, float]] = {}
    for point in points:
        lines.setdefault(point.iteration, {}).update(point.metrics)
    columns = list(dict.fromkeys(key for line in lines.values() for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["iteration", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"iteration": iteration, **line} for iteration, line in lines.items())
    return text.getvalue()


def run_name(cfg: Config) -> str:
    """What a person looks for in a list of runs."""
    layers = "all" if cfg.train.num_layers == -1 else str(cfg.train.num_layers)
    return (
        f"{Path(cfg.model.path).name} {cfg.train.method} "
        f"lr={cfg.train.learning_rate:g} layers={layers} iters={cfg.train.iters}"
    )


def _model_tags(source: sources.Source) -> dict[str, str]:
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
    console.run(main)
