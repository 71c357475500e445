"""Bases that also see: the weights of their towers are in the fused model, to the bit."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from athanor import files
from athanor.fuse.weights import write_fused_model
from athanor.model.load import load_model
from support import random_adapters
from support.models import COMMON

TEXT = COMMON | {"vocab_size": 6144, "rms_norm_eps": 1e-6, "num_hidden_layers": 2}
# By the model's type: its language model's settings, the beginnings of its names in mlx-lm and on
# disk, and the towers on disk.
KINDS: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2},
        {"language_model.": "language_model."},
        ["vision_tower.vision_model.encoder.layers.0.mlp.fc1", "multi_modal_projector.norm"],
    ),
    "qwen2_vl": (
        {"model_type": "qwen2"},
        {"language_model.model.": "model.language_model."},
        ["model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"],
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {"language_model.model.": "model.language_model."},
        ["model.vision_tower.patch_conv", "model.multi_modal_projector.linear_1"],
    ),
}


def build(tiny: Path, folder: Path, kind: str) -> tuple[Path, dict[str, mx.array]]:
    """Return a small model of this kind with random weights, and the weights of its towers."""
    settings, prefixes, towers = KINDS[kind]
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = {"model_type": kind, "text_config": TEXT | settings, "vocab_size": 6144}
    config |= {"vision_config": {"hidden_size": 8}, "eos_token_id": 6143}
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "preprocessor_config.json", {"do_resize": True})
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(files.read_json(folder / "config.json")))
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        for own, stored in prefixes.items():
            name = name.replace(own, stored)
        weights[name] = value.astype(mx.float16)
    media = {f"{tower}.weight": mx.random.normal((8, 8)).astype(mx.bfloat16) for tower in towers}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | media)
    return folder, media


@pytest.mark.parametrize("kind", KINDS)
def test_towers_are_kept(tiny: Path, tmp_path: Path, kind: str) -> None:
    base, media = build(tiny, tmp_path / "base", kind)
    trained = random_adapters.save(
        base, tmp_path / "adapters", random_adapters.train_config("lora")
    )
    fused = tmp_path / "fused"
    fused.mkdir()
    write_fused_model(base, tmp_path / "adapters", fused, end=6143, dequantize=False)
    before = random_adapters.load(base / "model.safetensors")
    after = random_adapters.load(fused / "model.safetensors")
    assert after.keys() == before.keys()  # the names that other programs look for
    for name, value in media.items():
        assert after[name].dtype == value.dtype
        assert bool((after[name] == value).all()), name
    assert any(bool((after[name] != before[name]).any()) for name in after.keys() - media.keys())
    assert (fused / "preprocessor_config.json").exists()
    question = mx.array([[5, 6, 7]])
    assert mx.allclose(load_model(fused)(question), trained(question), atol=0.05, rtol=0.02)
