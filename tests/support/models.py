"""Small models of mlx-lm's architectures with random weights, and their loss by mlx alone."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import probe_tokens
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts

PLENTY = Budget(10**9, 0, Path())


def random_text(length: int, seed: int = 0) -> TokenizedText:
    """Return random tokens of which the second half is supervised."""
    ids = np.random.default_rng([length, seed]).integers(0, 150, length).tolist()
    return TokenizedText(ids, [place >= length // 2 for place in range(length)], seed)


ROWS = [random_text(20), random_text(13), random_text(9), random_text(17)]

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# By mlx-lm's modules; mistral is llama there.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "cohere": {"logit_scale": 0.0625},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.2,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt2": {"n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5, "layer_norm_eps": 1e-5},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}
# Their heads can't be split off.
UNSPLIT = {"gpt_neox", "mamba"}


def build_model(name: str, **changes: Any) -> nn.Module:
    """Return a small model of random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    values = {"model_type": name, "layer_norm_epsilon": 1e-5} | COMMON | ARCHITECTURES[name]
    mx.random.seed(0)
    arguments = {key: value for key, value in (values | changes).items() if key in known}
    model: nn.Module = module.Model(module.ModelArgs(**arguments))
    mx.eval(model.parameters())
    return model


def add_adapters(model: nn.Module, layers: int = 2) -> nn.Module:
    """Put LoRA with random values on the last layers of a model."""
    model.freeze()
    linear_to_lora_layers(model, layers, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Give the trainable weights of a model random values."""
    weights = model.trainable_parameters()
    model.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.1, weights))
    mx.eval(model.parameters())


def freeze_layers(
    model: nn.Module, budget: Budget | None = PLENTY, cuts: tuple[int, ...] = ()
) -> FrozenLayers:
    """Return the cache of a model's frozen layers, split on ROWS."""
    return FrozenLayers(Parts.find(model, probe_tokens(ROWS)), budget, cuts)


def whole_loss_and_gradient(
    model: nn.Module, rows: list[TokenizedText] = ROWS
) -> tuple[float, dict[str, mx.array]]:
    """Return the loss and the gradient of whole rows, one by one, by mlx's own functions."""

    def loss(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for row in rows:
            logits = model(mx.array([row.ids[:-1]]))[0].astype(mx.float32)
            each = nn.losses.cross_entropy(logits, mx.array(row.ids[1:]))
            total = total + (each * mx.array(row.supervised[1:])).sum()
        return total

    total, gradient = nn.value_and_grad(model, loss)(model)
    return total.item(), dict(tree_flatten(gradient))


def assert_same(
    actual: tuple[mx.array, Any], expected: tuple[float, dict[str, mx.array]], rel: float = 1e-5
) -> None:
    """Compare two losses and gradients, the latter relative to the largest value."""
    assert actual[0].item() == pytest.approx(expected[0], rel=rel)
    gradient = actual[1]
    assert gradient.keys() == expected[1].keys()
    size = max(float(mx.abs(array).max()) for array in expected[1].values())
    assert size > 0
    for name, array in gradient.items():
        assert float(mx.abs(array - expected[1][name]).max()) <= rel * size, name


class Layer(nn.Module):
    """A linear layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 16)

    def __call__(self, h: mx.array) -> mx.array:
        return h + nn.relu(self.map(h))


class Body(nn.Module):
    """Five layers, of which `reads` also adds the output of `writes`; 9 for none."""

    def __init__(self, writes: int = 9, reads: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 16)
        self.layers = [Layer() for _ in range(5)]
        self.writes, self.reads = writes, reads

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h, written = self.embed(ids), mx.zeros(16)
        for place, layer in enumerate(self.layers):
            h = layer(h + written if place == self.reads else h)
            written = h if place == self.writes else written
        return h


class SmallModel(nn.Module):
    """A model whose head may look at its neighbours, or drop out below its layers."""

    def __init__(self, body: Body | None = None, *, mixes: bool = False, drops: float = 0.0):
        super().__init__()
        self.body = body or Body()
        self.head = nn.Linear(16, 160)
        self.mixes = mixes
        self.drop = nn.Dropout(drops)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h = self.body(ids, cache)
        logits: mx.array = self.head(mx.cumsum(h, axis=1) if self.mixes else h)
        return logits

    @property
    def layers(self) -> list[nn.Module]:
        return self.body.layers
