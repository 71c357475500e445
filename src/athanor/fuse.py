"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/, a
folder in Hugging Face's format that mlx_lm.generate --model and transformers read, what is exported
from it (a GGUF, Modelfiles, the adapters in PEFT's format), and fused.json, which says how it was
fused and what parity.py found; adds the model to the training's MLflow run. A model that is not the
trained one is not written. Weights keep the dtype that the base has on disk; tokenizer and template
are the base's files, byte for byte, but for the name of the token that ends an answer.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, save_model

from athanor import (
    chat,
    console,
    files,
    models,
    parity,
    registry,
    settings,
    sources,
    supervision,
    tracking,
)
from athanor.console import UserError
from athanor.export import gguf_file, modelfile, peft_adapters
from athanor.paths import FUSED, PREPARED, TRAINED
from athanor.schema import Config, FuseConfig
from athanor.templates import Message

# What a folder holds besides config.json, generation_config.json and the weights.
CARRIED = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
CARRIED += ["chat_template*", "*.tiktoken"]
# Questions of the training rows that both models are asked, beside parity's own.
QUESTIONS = 8


def fuse_and_compare(
    base: Path,
    adapters: Path,
    out: Path,
    rows: list[Message],
    *,
    end: int,
    dequantize: bool | None,
    max_difference: float,
) -> tuple[parity.Report, bool]:
    """Writes the fused model to `out` where it passes parity's gate on the questions of `rows`.

    A quantized base is fused as `dequantize` says; with None into its quantized weights, or else,
    where that does not pass, dequantized. Returns the report, and whether it was dequantized.

    Raises:
        UserError: with the cause, where no model passes; what was in `out` is still there.
    """
    config = sources.read_config(base)
    quantized = sources.is_quantized(config)
    # Forms that mlx-lm only reads (AWQ, GPTQ, …) can't be written again.
    writable = not quantized or "quantization" in config
    if dequantize is False and not writable:
        raise UserError(
            f"fuse.dequantize: weights that mlx did not quantize itself, as those of {base}, can't "
            "be fused into; expected null or true, found false"
        )
    plain = quantized and (dequantize or not writable)
    trained = parity.ask(base, adapters, rows)
    with files.whole_folder(out) as folder:
        fuse(base, adapters, folder, end=end, dequantize=plain)
        report = parity.compare(trained, folder, max_difference)
        if report.cause is not None and quantized and not plain and dequantize is None:
            console.warn(f"fused dequantized, because {report.cause} ({report.summary()})")
            for path in folder.iterdir():
                path.unlink()
            plain = True
            fuse(base, adapters, folder, end=end, dequantize=plain)
            report = parity.compare(trained, folder, max_difference)
        if report.cause is not None:
            raise UserError(
                f"the fused model is not the trained one and was not written: {report.cause} "
                f"({report.summary()})"
            )
    return report, plain


def fuse(base: Path, adapters: Path, folder: Path, *, end: int, dequantize: bool) -> None:
    """Writes the model with its adapters in the weights to `folder`, which is there and empty.

    Its files name `end` as the token that ends an answer, before all others that do.
    With `dequantize` a quantized base becomes plain weights; without it, quantized weights with
    adapters are quantized again after the sum, in their own form.
    """
    model, tokenizer = models.load(base)
    models.load_adapters(model, adapters)
    model.set_dtype(mx.float32)  # on a GPU too: a sum in half precision would be rounded twice
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    settings = sources.read_config(base)
    if dequantize and sources.is_quantized(settings):
        model = dequantize_model(model)
        settings.pop("quantization", None)
        settings.pop("quantization_config", None)
    _to_stored_dtypes(model, base)

    settings["eos_token_id"] = _ends(base, end, tokenizer.eos_token_ids)
    save_model(folder, model)
    for pattern in CARRIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    _name_end(folder, tokenizer.convert_ids_to_tokens(end))
    files.write_json(folder / "generation_config.json", _generation(base, settings, tokenizer))
    files.write_json(folder / "config.json", settings)


def _to_stored_dtypes(model: nn.Module, base: Path) -> None:
    """Gives each weight the dtype that the base's files have for it, or else for their first."""
    stored = {
        name: dtype
        for name, dtype in models.stored_dtypes(base).items()
        if mx.issubdtype(dtype, mx.floating)
    }
    usual = next(iter(stored.values()), mx.float32)
    model.load_weights(
        [
            (name, value.astype(stored.get(name, usual)))
            for name, value in tree_flatten(model.parameters())
            if mx.issubdtype(value.dtype, mx.floating)
        ],
        strict=False,
    )


def _ends(base: Path, end: int, used: set[int]) -> int | list[int]:
    """The tokens that end an answer: the one that was learned, the base's own, then the others."""
    stated = sources.stated_ends(load_config(base))
    ends = list(dict.fromkeys([end, *stated, *sorted(used)]))
    return ends[0] if len(ends) == 1 else ends


def _name_end(folder: Path, end: str) -> None:
    """Names a token as the end in the tokenizer's files that name another."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.exists():
            continue
        named = files.read_json(path)
        before = named.get("eos_token")
        if (before["content"] if isinstance(before, dict) else before) != end:
            # As a dict it may say how it is stripped, which holds for the other as well.
            after = before | {"content": end} if isinstance(before, dict) else end
            files.write_json(path, named | {"eos_token": after})


def _generation(base: Path, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """generation_config.json: the base's, with the end tokens that were trained and tested."""
    path = base / "generation_config.json"
    generation: dict[str, Any] = dict(files.read_json(path)) if path.exists() else {}
    generation["eos_token_id"] = settings["eos_token_id"]
    if tokenizer.pad_token_id is not None:
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    return generation


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
            report, dequantized = fuse_and_compare(
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
