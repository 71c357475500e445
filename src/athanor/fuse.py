"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/{model.json, train.jsonl} and artifacts/train/; writes
artifacts/fuse/model/, a folder in Hugging Face's format that mlx_lm.generate --model and
transformers read, and fused.json, which says how it was fused and what parity.py found; adds both
to the training's MLflow run. A model that is not the trained one is not written. Weights keep the
dtype that the base has on disk; tokenizer and template are the base's files, byte for byte.
"""

import json
import shutil
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, save_model

from athanor import console, files, models, parity, settings, sources, tracking
from athanor.chat import Message
from athanor.console import UserError
from athanor.paths import FUSED, PREPARED, TRAINED

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
    dequantize: bool | None,
    max_difference: float,
) -> tuple[parity.Report, bool]:
    """Writes the fused model to `out` where it passes parity's gate on the questions of `rows`.

    A quantized base is fused as `dequantize` says; with None into its quantized weights, or else,
    where that does not pass, dequantized. Returns the report, and whether it was dequantized.

    Raises:
        UserError: with the cause, where no model passes; what was in `out` is still there.
    """
    stated = sources.read_config(base)
    quantized = is_quantized(stated)
    # Forms that mlx-lm only reads (AWQ, GPTQ, …) can't be written again.
    writable = not quantized or "quantization" in stated
    if dequantize is False and not writable:
        raise UserError(
            f"fuse.dequantize: weights that mlx did not quantize itself, as those of {base}, can't "
            "be fused into; expected null or true, found false"
        )
    plain = quantized and (dequantize or not writable)
    trained = parity.ask(base, adapters, rows)
    with files.whole_folder(out) as folder:
        fuse(base, adapters, folder, dequantize=plain)
        report = parity.compare(trained, folder, max_difference)
        if report.cause is not None and quantized and not plain and dequantize is None:
            console.warn(f"fused dequantized, because {report.cause} ({report.summary()})")
            for path in folder.iterdir():
                path.unlink()
            plain = True
            fuse(base, adapters, folder, dequantize=plain)
            report = parity.compare(trained, folder, max_difference)
        if report.cause is not None:
            raise UserError(
                f"the fused model is not the trained one and was not written: {report.cause} "
                f"({report.summary()})"
            )
    return report, plain


def fuse(base: Path, adapters: Path, folder: Path, *, dequantize: bool) -> None:
    """Writes the model with its adapters in the weights to `folder`, which is there and empty.

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
    if dequantize and is_quantized(settings):
        model = dequantize_model(model)
        settings.pop("quantization", None)
        settings.pop("quantization_config", None)
    _to_stored_dtypes(model, base)

    settings["eos_token_id"] = _ends(base, tokenizer.eos_token_ids)
    save_model(folder, model)
    for pattern in CARRIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    files.write_json(folder / "generation_config.json", _generation(base, settings, tokenizer))
    files.write_json(folder / "config.json", settings)


def is_quantized(settings: dict[str, Any]) -> bool:
    """Whether a config.json says that weights are quantized."""
    return "quantization" in settings or "quantization_config" in settings


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


def _ends(base: Path, used: set[int]) -> int | list[int]:
    """The tokens that end an answer here: the base's in their order, then the others."""
    stated = load_config(base).get("eos_token_id") or []
    first = [stated] if isinstance(stated, int) else list(stated)
    ends = first + sorted(used - set(first))
    return ends[0] if len(ends) == 1 else ends


def _generation(base: Path, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """generation_config.json: the base's, with the end tokens that were trained and tested."""
    path = base / "generation_config.json"
    generation: dict[str, Any] = dict(files.read_json(path)) if path.exists() else {}
    generation["eos_token_id"] = settings["eos_token_id"]
    if tokenizer.pad_token_id is not None:
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    return generation


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    trained = files.read_json(TRAINED / "run.json")
    with tracking.resume(trained["run"], trained["run_id"]) as run:
        source = sources.Source.read(PREPARED / "model.json")
        out = FUSED / "model"
        report, dequantized = fuse_and_compare(
            source.folder(),
            TRAINED / "adapters",
            out,
            _first_rows(PREPARED / "train.jsonl", QUESTIONS),
            dequantize=cfg.fuse.dequantize,
            max_difference=cfg.fuse.max_difference,
        )
        digest = sources.digest(out)
        files.write_json(
            FUSED / "fused.json",
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
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    console.done(
        "fuse",
        {
            "model": f"{out}, {size:.1f} MB" + (", dequantized" if dequantized else ""),
            "parity": report.summary(),
            "digest": digest[:12],
            "ask it": f'uv run mlx_lm.generate --model {out} --prompt "…"',
        },
    )


def _first_rows(path: Path, count: int) -> list[Message]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


if __name__ == "__main__":
    console.run(main)
