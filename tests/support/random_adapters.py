"""Adapters of random values on the tiny model, in mlx-lm's format."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from athanor.chat.base import load_with_tokenizer
from athanor.config.schema import TrainConfig
from athanor.model.adapters import lora_parameters, make_trainable, save_adapters
from athanor.model.source import resolve_source

EMBEDDING = ["model.embed_tokens", "self_attn.q_proj"]


def load(path: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(path)))


def train_config(method: str, num_layers: int = 2, rank: int = 4) -> TrainConfig:
    return TrainConfig(method=method, num_layers=num_layers, rank=rank, scale=2.5, dropout=0.1)


def save(base: Path, folder: Path, train: TrainConfig, keys: list[str] | None = None) -> Any:
    """Adapters of random values in mlx-lm's format, and the model that has them.

    With `keys` on these modules, as mlx-lm's lora_parameters name them.
    """
    model, _ = load_with_tokenizer(base)
    model.set_dtype(mx.float32)
    if keys is None:
        make_trainable(model, train, seed=1)
    else:
        model.freeze()
        linear_to_lora_layers(
            model,
            train.num_layers,
            lora_parameters(train) | {"keys": set(keys)},
            use_dora=train.method == "dora",
        )
    mx.random.seed(2)
    random = [
        (name, value * (1 + 0.1 * mx.random.normal(value.shape)))
        if name.endswith(".m") or train.method == "full"
        else (name, 0.05 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(random, strict=False)
    save_adapters(
        dict(random),
        folder,
        train,
        resolve_source(str(base), None),
        model=model,
        iteration=1,
    )
    if keys is not None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["lora_parameters"]["keys"] = keys
        path.write_text(json.dumps(config), encoding="utf-8")
    model.eval()
    return model


def untied(tiny: Path, folder: Path) -> Path:
    """The tiny model with a head of its own."""
    shutil.copytree(tiny, folder)
    weights = load(tiny / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 0.5
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder
