"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/model.json and artifacts/train/; writes artifacts/fuse/model/,
a folder in Hugging Face's format that mlx_lm.generate --model and transformers read, and adds its
digest to the training's MLflow run. Weights keep the dtype that the base has on disk; tokenizer
and template are the base's files, byte for byte.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, save_model

from athanor import console, files, models, settings, sources, tracking
from athanor.paths import FUSED, PREPARED, TRAINED

# What a folder holds besides config.json, generation_config.json and the weights.
CARRIED = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
CARRIED += ["chat_template*", "*.tiktoken"]


def fuse(base: Path, adapters: Path, out: Path, *, dequantize: bool) -> str:
    """Writes the fused model to `out` and returns the sha256 over its files."""
    model, tokenizer = models.load(base)
    models.load_adapters(model, adapters)
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    settings = sources.read_config(base)
    if dequantize and ("quantization" in settings or "quantization_config" in settings):
        model = dequantize_model(model)
        settings.pop("quantization", None)
        settings.pop("quantization_config", None)
    _to_stored_dtypes(model, base)

    settings["eos_token_id"] = _ends(base, tokenizer.eos_token_ids)
    with files.whole_folder(out) as folder:
        save_model(folder, model)
        for pattern in CARRIED:
            for path in base.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        files.write_json(folder / "generation_config.json", _generation(base, settings, tokenizer))
        files.write_json(folder / "config.json", settings)
    return sources.digest(out)


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
        digest = fuse(source.folder(), TRAINED / "adapters", out, dequantize=cfg.fuse.dequantize)
        files.write_json(FUSED / "fused.json", {"digest": digest, "base": source.path})
        run.tags({"fused.digest": digest})
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    console.done(
        "fuse",
        {
            "model": f"{out}, {size:.1f} MB",
            "digest": digest[:12],
            "ask it": f'uv run mlx_lm.generate --model {out} --prompt "…"',
        },
    )


if __name__ == "__main__":
    console.run(main)
