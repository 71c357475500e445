"""Base models in memory."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from athanor.device.backend import compile_kernels, on_cpu
from athanor.errors import UserError

if TYPE_CHECKING:
    import mlx.nn as nn


def load_model(folder: Path) -> "nn.Module":
    """Load a model with mlx-lm, ready to compute on this machine.

    On the CPU half precision is computed in float32: mlx's CPU products of float16 and bfloat16
    take a path many times slower, and its compiler would call a C++ compiler for each kernel.

    Raises:
        UserError: where mlx-lm can't load it.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model as load_with_config

    if on_cpu():
        compile_kernels(False)
    try:
        model, _ = load_with_config(folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: mlx-lm can't load this model: {error}") from error
    if on_cpu():
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model


def copy_sharing_weights(model: "nn.Module") -> "nn.Module":
    """A model of its own with the same weights, which are shared: arrays never change in place."""
    import mlx.core as mx

    arrays = (value for part in model.modules() for value in part.values())
    shared = {id(array): array for array in arrays if isinstance(array, mx.array)}
    return copy.deepcopy(model, dict(shared))


def count_parameters(model: "nn.Module") -> tuple[int, int]:
    """The numbers of trainable and of all parameters (those of quantized weights unpacked)."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return trainable, int(get_total_parameters(model))
