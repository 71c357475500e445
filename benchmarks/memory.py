"""What a training takes in memory, for Qwen2.5's shapes and each method: one table.

    uv run python benchmarks/memory.py                # counted, and measured where it fits: slow
    uv run python benchmarks/memory.py --counted      # no step of a whole model
    uv run python benchmarks/memory.py --device gpu

For 4 rows of 512 tokens, 60% prompt, a base in half precision (on a CPU all is float32), learned
weights in float32. Counted: the weights; 16 bytes for each learned parameter (itself, its gradient,
Adam's two moments) and 4 more for the best so far. Measured, on models of one and two layers of
zeros in that shape: what a layer keeps for the way back, and what the loss and the ends take,
whatever the depth. "whole" is mlx's peak for a step of the whole model, where it fits this machine.
"""

import argparse
import gc
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# isort: off
import athanor  # noqa: F401  first: it says which BLAS mlx computes with

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen2

# isort: on
from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import Forward, probe_tokens, trainable_weights
from athanor.compute.frozen import Budget, FrozenLayers
from athanor.compute.parts import Parts
from athanor.config.schema import TrainConfig
from athanor.device import backend
from athanor.device.backend import compile_kernels, describe_device, memory_limit
from athanor.model.adapters import make_trainable

ROWS = 4
LENGTH = 512
PROMPT = 0.6


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 151936
    tied: bool = True


SHAPES = [
    Shape("0.5B", 24, 896, 4864, 14, 2),
    Shape("1.5B", 28, 1536, 8960, 12, 2),
    Shape("7B", 28, 3584, 18944, 28, 4, 152064, False),
]


@dataclass(frozen=True)
class Way:
    """A method, on so many layers, of a base quantized or not."""

    name: str
    method: str = "lora"
    layers: int = -1
    bits: int | None = None
    grad_checkpoint: bool = False


WAYS = [
    Way("lora, all layers"),
    Way("lora, all, grad_checkpoint", grad_checkpoint=True),
    Way("lora, 8 layers", layers=8),
    Way("lora, 4 bits (QLoRA), 8", layers=8, bits=4),
    Way("dora, 8 layers", "dora", 8),
    Way("full, 8 layers", "full", 8),
]


def made(shape: Shape, way: Way, dtype: mx.Dtype) -> tuple[nn.Module, int]:
    """Return a trainable model of zeros, and the bytes of its weights before adapters."""
    model = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.inner,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-6,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
        )
    )
    model.update(tree_map(lambda one: mx.zeros(one.shape, dtype), model.parameters()))
    if way.bits:
        nn.quantize(model, bits=way.bits)
    weights = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    given: Any = dict.fromkeys(TrainConfig.__dataclass_fields__)
    given |= {"method": way.method, "num_layers": way.layers, "rank": 8, "scale": 20.0}
    make_trainable(model, TrainConfig(**given | {"dropout": 0.0}), 0)
    return model, weights


@dataclass(frozen=True)
class Taken:
    """Bytes of a step beyond the model, of its weights before the training, of what is there now;
    and the number of learned parameters."""

    step: int
    weights: int
    held: int
    learned: int


def taken(shape: Shape, way: Way, dtype: mx.Dtype) -> Taken:
    """Run a step."""
    model, before = made(shape, way, dtype)
    ids = (np.arange(LENGTH + 1) % 1000).tolist()
    rows = [TokenizedText(ids, [place >= PROMPT * LENGTH for place in range(LENGTH + 1)])] * ROWS
    frozen = FrozenLayers(Parts.find(model, probe_tokens(rows)), Budget(10**9, 0, Path()))
    weights = trainable_weights(model)
    cut = frozen.choose_cut(weights)
    forward = Forward(model, frozen.parts, frozen, cut, grad_checkpoint=way.grad_checkpoint)
    ready = forward.prepare(rows)
    held = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    mx.eval(weights, model.parameters())
    gc.collect()  # the model before this one
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    mx.eval(forward.loss_and_gradient(weights, ready))
    learned = sum(one.size for one in weights.values())
    return Taken(mx.get_peak_memory() - start, before, held, learned)


def line(shape: Shape, way: Way, dtype: mx.Dtype, limit: int) -> str:
    """Return a line of the table."""
    trained = shape.layers if way.layers == -1 else way.layers
    one, two = (taken(replace(shape, layers=n), replace(way, layers=-1), dtype) for n in (1, 2))
    # What is trained whole is counted with what is learned.
    frozen = shape.layers - (trained if way.method == "full" else 0)
    weights = one.weights + (frozen - 1) * (two.weights - one.weights)
    learned = trained * (two.learned - one.learned)
    step = one.step + (trained - 1) * (two.step - one.step)  # gradients are in it
    whole = ""
    if (counted := weights + 4 * learned + step) < limit:
        found = taken(shape, way, dtype)
        whole = f"{(found.held + found.step) / 1e9:8.2f} of {counted / 1e9:.2f}"
    parts = [weights, 20 * learned, step - 4 * learned]
    cells = "".join(f"{figure / 1e9:10.2f}" for figure in [*parts, sum(parts)])
    return f"{shape.name:<6}{way.name:<28}{cells}   {whole}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of trainings")
    parser.add_argument("--device", choices=["cpu", "gpu"], default=None)
    parser.add_argument("--counted", action="store_true", help="no step of a whole model")
    parser.add_argument("--only", default=",".join(shape.name for shape in SHAPES))
    args = parser.parse_args()
    if args.device:
        mx.set_default_device(mx.Device(getattr(mx, args.device)))
    on_cpu = backend.on_cpu()
    dtype = mx.float32 if on_cpu else mx.bfloat16
    compile_kernels(not on_cpu)
    # Linux: what is free now; a step must not be killed for it.
    limit = min(memory_limit(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    print(f"GB, on {describe_device()}, base in {str(dtype).removeprefix('mlx.core.')}")
    print(f"{'':34}   weights   learned activations total   a step of the whole, of its count")
    for shape in SHAPES:
        if shape.name in args.only.split(","):
            for way in WAYS:
                print(line(shape, way, dtype, 0 if args.counted else int(limit * 0.7)), flush=True)
                mx.clear_cache()


if __name__ == "__main__":
    main()
