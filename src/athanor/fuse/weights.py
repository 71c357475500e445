"""A base model and its adapters, written as one model if that is the model that was trained.

Weights keep the dtype that the base has on disk; tokenizer and template are the base's files, byte
for byte, but for the name of the token that ends an answer. parity.py is the gate.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_config, save_model

from athanor import console, files
from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import Conversation
from athanor.chat.rendering import Rendering
from athanor.errors import UserError
from athanor.fuse import parity
from athanor.fuse.media_weights import save_with_media
from athanor.model.adapters import load_adapters, merge_adapters
from athanor.model.config_values import is_quantized
from athanor.model.folder import read_config, stated_stop_ids
from athanor.model.stored import read_dtypes

# Files besides config.json, generation_config.json and the weights.
CARRIED = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
CARRIED += ["chat_template*", "*.tiktoken", "*processor_config.json"]


def fuse_and_compare(
    base: Path,
    adapters: Path,
    out: Path,
    rows: list[Conversation],
    *,
    end: int,
    dequantize: bool | None,
    max_difference: float,
    rendering: Rendering | None = None,
) -> tuple[parity.Report, bool]:
    """Write the fused model to `out` if it passes parity's gate on the questions of `rows`.

    A quantized base is fused as `dequantize` says; with None into its quantized weights, or
    dequantized where that does not pass. Return the report, and whether it was dequantized.

    Raises:
        UserError: with the cause, where no model passes; the contents of `out` are then untouched.
    """
    config = read_config(base)
    quantized = is_quantized(config)
    # Forms that mlx-lm only reads (AWQ, GPTQ, …) can't be written again.
    writable = not quantized or "quantization" in config
    if dequantize is False and not writable:
        raise UserError("fuse.weights_cannot_be_quantized_again", folder=base)
    if not quantized or dequantize is False:
        attempts = [False]
    else:
        attempts = [True] if dequantize or not writable else [False, True]
    trained = parity.ask_trained_model(base, adapters, rows, rendering)
    with files.whole_folder(out) as folder:
        for dequantized in attempts:
            for path in folder.iterdir():
                path.unlink()
            write_fused_model(
                base, adapters, folder, end=end, dequantize=dequantized, rendering=rendering
            )
            report = parity.compare_with_trained(trained, folder, max_difference)
            if report.cause is None:
                return report, dequantized
            if dequantized is not attempts[-1]:
                console.warn(f"fused dequantized, because {report.cause} ({report.summary()})")
        if quantized and not dequantized:
            raise UserError("fuse.lost_in_bits", cause=report.cause, summary=report.summary())
        raise UserError("fuse.not_as_trained", cause=report.cause, summary=report.summary())


def write_fused_model(
    base: Path,
    adapters: Path,
    folder: Path,
    *,
    end: int,
    dequantize: bool,
    rendering: Rendering | None = None,
) -> None:
    """Write the model with its adapters in the weights to `folder`, which exists and is empty.

    Its files name `end` as the token that ends an answer, before all others that do.
    With `dequantize` a quantized base becomes plain weights; without it, quantized weights with
    adapters are quantized again after the sum, in their own form.
    """
    model, tokenizer = load_with_tokenizer(base, rendering)
    load_adapters(model, adapters)
    model.set_dtype(mx.float32)  # on a GPU too: a sum in half precision would be rounded twice
    merge_adapters(model, dequantize=dequantize)
    settings = read_config(base)
    if dequantize and is_quantized(settings):
        model = dequantize_model(model)
        settings.pop("quantization", None)
        settings.pop("quantization_config", None)
    _restore_dtypes(model, base)

    settings["eos_token_id"] = _ends(base, end, tokenizer.eos_token_ids)
    if not save_with_media(folder, model, base):
        save_model(folder, model)
    for pattern in CARRIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    _name_end(folder, tokenizer.convert_ids_to_tokens(end))
    files.write_json(folder / "generation_config.json", _generation(base, settings, tokenizer))
    files.write_json(folder / "config.json", settings)


def _restore_dtypes(model: nn.Module, base: Path) -> None:
    """Give each weight the dtype that the base's files have for it, or else for their first."""
    stored = read_dtypes(base)
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
    """Return the tokens that end an answer: the learned one, the base's own, then all others."""
    stated = stated_stop_ids(load_config(base))
    ends = list(dict.fromkeys([end, *stated, *sorted(used)]))
    return ends[0] if len(ends) == 1 else ends


def _name_end(folder: Path, end: str) -> None:
    """Name a token as the end in the tokenizer's files that name a different one."""
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
    """Return the base's generation_config.json with the end tokens that were trained and tested."""
    path = base / "generation_config.json"
    generation: dict[str, Any] = dict(files.read_json(path)) if path.exists() else {}
    generation["eos_token_id"] = settings["eos_token_id"]
    if tokenizer.pad_token_id is not None:
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    return generation
