"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/, a
folder in Hugging Face's format that mlx_lm.generate --model and transformers read, what is exported
from it (a GGUF, Modelfiles, the adapters in PEFT's format), and fused.json, which says how it was
fused and what parity.py found; adds the model to the training's MLflow run. A model that is not the
trained one is not written.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from athanor import chat, console, files, fusing, models, settings, sources, supervision
from athanor.console import UserError
from athanor.export import gguf_file, modelfile, peft_adapters
from athanor.paths import FUSED, PREPARED, TRAINED
from athanor.record import registry, tracking
from athanor.schema import Config, FuseConfig
from athanor.templates import Message

# Questions of the training rows that both models are asked, beside parity's own.
QUESTIONS = 8


def export(folder: Path, adapters: Path, base: Path, name: str, fuse: FuseConfig) -> dict[str, str]:
    """Writes what is asked for beside `folder`/model, the fused model; says what it wrote.

    `name` is the base's, after which the GGUF is called; `base` is its folder.
    """
    model = folder / "model"
    wrote = {}
    if fuse.gguf is not None:
        gguf = folder / f"{Path(name).name}-{fuse.gguf}.gguf"
        gguf_file.write(model, gguf, fuse.gguf)
        wrote["gguf"] = f"{gguf.name}, {gguf.stat().st_size / 1e6:.1f} MB"
    if fuse.modelfile:
        try:
            if fuse.gguf is not None:
                text = modelfile.modelfile(model, f"./{gguf.name}", system=fuse.system)
                files.write_text(folder / "Modelfile", text)
            text = modelfile.modelfile(model, ".", system=fuse.system)
            files.write_text(model / "Modelfile", text)
            wrote["ollama"] = "Modelfile" if fuse.gguf is not None else "model/Modelfile"
        except UserError as error:
            console.warn(f"no Modelfile was written: {error}".replace(str(folder), str(FUSED)))
    if fuse.peft:
        try:
            peft_adapters.write(adapters, folder / "peft", base=name, model=base)
            wrote["peft"] = "peft/"
        except UserError as error:
            console.warn(f"no adapters in PEFT's format: {error}")
    return wrote


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    trained = files.read_json(TRAINED / "run.json")
    for left in FUSED.parent.glob(f".{FUSED.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tracking.resume(trained["run"], trained["run_id"]) as run:
        source = sources.Source.read(PREPARED / "model.json")
        base, adapters = source.folder(), TRAINED / "adapters"
        settings.refuse_misfits(cfg, base)  # what is exported may have changed since the training
        rows = list(islice(files.lines_of_jsonl(PREPARED / "train.jsonl"), QUESTIONS))
        config: FuseConfig = settings.plain(cfg.fuse)
        if config.modelfile and config.system is None:
            config.system = _said_by_all(files.lines_of_jsonl(PREPARED / "train.jsonl"))
        with files.whole_folder(FUSED) as folder:
            report, dequantized = fusing.fuse_and_compare(
                base,
                adapters,
                folder / "model",
                rows,
                end=chat.Contract.read(PREPARED / "chat.json").end,
                dequantize=cfg.fuse.dequantize,
                max_difference=cfg.fuse.max_difference,
            )
            digest = sources.digest(folder / "model")
            wrote = export(folder, adapters, base, source.path, config)
            files.write_json(
                folder / "fused.json",
                {
                    "digest": digest,
                    "base": source.path,
                    "dequantized": dequantized,
                    "parity": asdict(report),
                },
            )
        run.tags({"fused.digest": digest, "fused.dequantized": str(dequantized).lower()})
        figures = {"fuse_max_logit_difference": report.difference}
        if report.share_lost is not None:
            figures["fuse_share_lost"] = report.share_lost
        run.metrics(trained["iteration"], figures)
        for name in ("fused.json", "Modelfile"):
            if (FUSED / name).exists():
                run.artifact(FUSED / name, "fuse")
        if cfg.fuse.log_model:
            _log_model(run, cfg, source, base, digest, rows, trained["iteration"])
    size = sum(path.stat().st_size for path in (FUSED / "model").iterdir()) / 1e6
    facts = {
        "model": f"{FUSED / 'model'}, {size:.1f} MB" + (", dequantized" if dequantized else ""),
        "parity": report.summary(),
        **{what: f"{FUSED}/{file}" for what, file in wrote.items()},
        "digest": digest[:12],
    }
    if cfg.fuse.log_model and cfg.fuse.registered_model_name is not None:
        facts["registered"] = run.registered()
    facts["ask it"] = f'uv run mlx_lm.generate --model {FUSED / "model"} --prompt "…"'
    console.done("fuse", facts)


def _log_model(
    run: tracking.Run,
    cfg: Config,
    source: sources.Source,
    base: Path,
    digest: str,
    rows: list[Message],
    iteration: int,
) -> None:
    """Makes the fused model the run's model, with the validation loss of its adapters."""
    # As it was for the training: the fused folder's names another end, which plain texts get.
    tokenizer = models.load_tokenizer(base)
    valid = supervision.tokenize_all(
        files.read_jsonl(PREPARED / "valid.jsonl"),
        tokenizer,
        cfg.train.mask_prompt,
        cfg.train.max_seq_length,
        chat.Contract.read(PREPARED / "chat.json").end,
    )
    valid = supervision.validated(valid, cfg.train.val_batches, cfg.train.batch_size)
    measured = files.read_json(TRAINED / "metrics.json")
    is_best = measured["kept_iteration"] == measured["best_iteration"]
    turns = (turn for row in rows for turn in row.get("messages", ()))
    asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "?")
    run.model(
        FUSED / "model",
        digest,
        question=asked,
        step=iteration,
        val_loss=measured["best_val_loss" if is_best else "val_loss"],
        valid_digest=registry.measured_on(valid),
        tags={"model.path": source.path, "model.digest": source.digest},
        registered_name=cfg.fuse.registered_model_name,
    )


def _said_by_all(rows: Iterable[Message]) -> str | None:
    """The system message that all rows have, if they have one; read up to where two differ."""
    told: set[str | None] = set()
    for row in rows:
        if "messages" in row:
            told.add(next((m["content"] for m in row["messages"] if m["role"] == "system"), None))
            if len(told) > 1:
                return None
    return told.pop() if told else None


if __name__ == "__main__":
    console.run(main)
