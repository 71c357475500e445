"""A base model and its adapters as one model, written where it is the model that was trained.

Weights keep the dtype that the base has on disk; tokenizer and template are the base's files, byte
for byte, but for the name of the token that ends an answer. parity.py is the gate.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, save_model

from athanor import console, files
from athanor.chat.load import load_with_tokenizer
from athanor.chat.templates import Message
from athanor.errors import UserError
from athanor.fuse import parity
from athanor.model.adapters import load_adapters
from athanor.model.source import is_quantized, read_config, stated_stop_ids
from athanor.model.stored import read_dtypes

# What a folder holds besides config.json, generation_config.json and the weights.
CARRIED = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
CARRIED += ["chat_template*", "*.tiktoken"]


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
    config = read_config(base)
    quantized = is_quantized(config)
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
            remedy = "; fuse.dequantize=true keeps it" if quantized and not plain else ""
            raise UserError(
                f"the fused model is not the trained one and was not written: {report.cause} "
                f"({report.summary()}){remedy}"
            )
    return report, plain


def fuse(base: Path, adapters: Path, folder: Path, *, end: int, dequantize: bool) -> None:
    """Writes the model with its adapters in the weights to `folder`, which is there and empty.

    Its files name `end` as the token that ends an answer, before all others that do.
    With `dequantize` a quantized base becomes plain weights; without it, quantized weights with
    adapters are quantized again after the sum, in their own form.
    """
    model, tokenizer = load_with_tokenizer(base)
    load_adapters(model, adapters)
    model.set_dtype(mx.float32)  # on a GPU too: a sum in half precision would be rounded twice
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    settings = read_config(base)
    if dequantize and is_quantized(settings):
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
        for name, dtype in read_dtypes(base).items()
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
    stated = stated_stop_ids(load_config(base))
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
