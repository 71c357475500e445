"""Adapters in PEFT's format, by PEFT's own arithmetic, against mlx-lm's own fusing."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from athanor.chat.base import load_with_tokenizer
from athanor.fuse.export_peft import write_peft
from athanor.model.folder import read_config
from support.random_adapters import EMBEDDING, load, save, train_config, untied
from support.refused import refused


def written(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load(out / "adapter_model.safetensors")
    return config, {name: np.array(value) for name, value in weights.items()}


def by_peft(name: str, base: Any, config: dict[str, Any], weights: dict[str, Any]) -> Any:
    """Return the weights of a module with its adapters merged, as PEFT's LoRA layers do it."""
    key = f"base_model.model.{name}"
    scaling = config["alpha_pattern"].get(name, config["lora_alpha"]) / config["rank_pattern"].get(
        name, config["r"]
    )
    if f"{key}.lora_embedding_A" in weights:
        return (
            base
            + scaling * (weights[f"{key}.lora_embedding_B"] @ weights[f"{key}.lora_embedding_A"]).T
        )
    adapted = base + scaling * weights[f"{key}.lora_B.weight"] @ weights[f"{key}.lora_A.weight"]
    if config["use_dora"]:
        magnitude = weights[f"{key}.lora_magnitude_vector"]
        adapted *= (magnitude / np.linalg.norm(adapted, axis=1))[:, None]
    return adapted


@pytest.mark.parametrize(
    ("method", "num_layers", "keys", "head"),
    [
        ("lora", -1, None, False),
        ("lora", 2, None, False),
        ("dora", 2, None, False),
        ("lora", 1, EMBEDDING, False),
        ("lora", 1, [*EMBEDDING, "lm_head"], True),
        ("dora", 1, ["lm_head"], True),
    ],
)
def test_peft_gets_the_weights_that_mlx_fuses(
    tiny: Path, tmp_path: Path, method: str, num_layers: int, keys: list[str] | None, head: bool
) -> None:
    base = untied(tiny, tmp_path / "base") if head else tiny
    train = train_config(method, num_layers)
    model = save(base, tmp_path / "adapters", train, keys)
    write_peft(tmp_path / "adapters", tmp_path / "out", base="team/base", model=base)
    config, weights = written(tmp_path / "out")

    adapted = {name: m for name, m in model.named_modules() if "lora_a" in m}
    tied = "model.embed_tokens" in adapted and not head
    assert set(config["target_modules"]) == {*adapted, *(["lm_head"] if tied else [])}
    assert config["ensure_weight_tying"] == tied
    layers = {name.split(".")[2] for name in adapted if ".layers." in name}
    assert len(layers) == (0 if keys == ["lm_head"] else 6 if num_layers == -1 else num_layers)
    stored = load(base / "model.safetensors")
    used = set()
    for name, module in adapted.items():
        before = np.array(stored[f"{name}.weight"].astype(mx.float32))
        merged = by_peft(name, before, config, weights)
        expected = np.array(module.fuse().weight)
        assert np.abs(expected - before).max() > 0.01
        np.testing.assert_allclose(merged, expected, atol=1e-5)
        used |= {key for key in weights if key.startswith(f"base_model.model.{name}.")}
    if tied:  # the head is the embedding, so it has to get the embedding's adapters
        before = np.array(stored["model.embed_tokens.weight"].astype(mx.float32))
        merged = by_peft("lm_head", before, config, weights)
        expected = np.array(adapted["model.embed_tokens"].fuse().weight)
        np.testing.assert_allclose(merged, expected, atol=1e-5)
        used |= {key for key in weights if key.startswith("base_model.model.lm_head.")}
    assert used == set(weights)


def test_the_config_is_a_loraconfigs(tiny: Path, tmp_path: Path) -> None:
    save(tiny, tmp_path / "adapters", train_config("lora", 1))
    write_peft(tmp_path / "adapters", tmp_path / "out", base="team/base", model=tiny)
    config, weights = written(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 10, 0.1)
    assert config["base_model_name_or_path"] == "team/base"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    q_proj = "base_model.model.model.layers.5.self_attn.q_proj"
    assert weights[f"{q_proj}.lora_A.weight"].shape == (4, 192)
    down = "base_model.model.model.layers.5.mlp.down_proj"
    assert weights[f"{down}.lora_A.weight"].shape == (4, 384)
    assert weights[f"{down}.lora_B.weight"].shape == (192, 4)


def test_modules_may_have_ranks_of_their_own(tiny: Path, tmp_path: Path) -> None:
    model = save(tiny, tmp_path / "adapters", train_config("lora", 2))
    path = tmp_path / "adapters" / "adapters.safetensors"
    weights = load(path)
    name = "model.layers.4.mlp.up_proj"
    weights |= {f"{name}.lora_a": mx.ones((192, 1)), f"{name}.lora_b": mx.ones((1, 384))}
    mx.save_safetensors(str(path), weights)
    write_peft(tmp_path / "adapters", tmp_path / "out", base="b", model=tiny)
    config, weights = written(tmp_path / "out")
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({name: 1}, {name: 2.5})
    before = np.array(model.layers[4].mlp.up_proj.linear.weight)
    np.testing.assert_allclose(by_peft(name, before, config, weights), before + 2.5, atol=1e-5)


def test_adapters_without_a_form_in_peft_are_refused(tiny: Path, tmp_path: Path) -> None:
    def assert_refused(code: str) -> None:
        with refused(f"fuse.{code}"):
            write_peft(tmp_path / "adapters", tmp_path / "out", base="b", model=tiny)
        assert not (tmp_path / "out").exists()

    save(tiny, tmp_path / "adapters", train_config("full", 1))
    assert_refused("peft_full")
    save(tiny, tmp_path / "adapters", train_config("dora", 1), EMBEDDING)
    assert_refused("peft_dora_embedding")

    save(tiny, tmp_path / "adapters", train_config("lora", 1))
    path = tmp_path / "adapters" / "adapters.safetensors"
    good = load(path)
    name = "model.layers.5.mlp.up_proj"
    for wrong, code in (
        ({f"{name}.lora_b": mx.ones((4, 7))}, "peft_other_model"),
        ({f"{name}.lora_a": mx.ones((2, 4, 192))}, "peft_experts"),
        ({"model.layers.9.mlp.up_proj.lora_a": mx.ones((192, 4))}, "peft_renamed_weight"),
        ({f"{name}.weight": mx.ones((384, 192))}, "peft_unknown_weight"),
    ):
        mx.save_safetensors(str(path), good | wrong)
        assert_refused(code)


def test_adapters_of_a_quantized_model_are_for_the_one_it_was_made_from(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, _ = load_with_tokenizer(tiny)
    settings = read_config(tiny)
    model, settings = quantize_model(model, settings, group_size=64, bits=4)
    base = tmp_path / "base"
    base.mkdir()
    save_model(base, model)
    save_config(settings, base / "config.json")
    for path in tiny.glob("*token*"):
        shutil.copyfile(path, base / path.name)
    shutil.copyfile(tiny / "chat_template.jinja", base / "chat_template.jinja")

    save(base, tmp_path / "adapters", train_config("lora", 1), EMBEDDING)
    write_peft(tmp_path / "adapters", tmp_path / "out", base="b", model=base)
    assert "which mlx quantized" in capsys.readouterr().err.replace("\n", " ")
    _, weights = written(tmp_path / "out")
    assert weights["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 6144)
