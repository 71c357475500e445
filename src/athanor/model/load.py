"""Loading of base models."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from athanor.device.backend import compile_kernels, on_cpu
from athanor.errors import UserError

if TYPE_CHECKING:
    import mlx.nn as nn


def load_model(folder: Path) -> "nn.Module":
    """Load a model with mlx-lm, ready to compute on this machine.

    On a CPU half precision is converted to float32, whose products are many times faster in mlx,
    and mlx's compiler, which calls a C++ compiler for each kernel, is turned off.

    Raises:
        UserError: where mlx-lm cannot load it.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model as load_with_config

    if on_cpu():
        compile_kernels(False)
    try:
        model, _ = load_with_config(folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError("model.not_loaded", folder=folder, error=error) from error
    if on_cpu():
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model


def copy_sharing_weights(model: "nn.Module") -> "nn.Module":
    """Return a copy of a model that shares its weights; arrays never change in place."""
    import mlx.core as mx

    arrays = (value for part in model.modules() for value in part.values())
    shared = {id(array): array for array in arrays if isinstance(array, mx.array)}
    return copy.deepcopy(model, dict(shared))


def count_parameters(model: "nn.Module") -> tuple[int, int]:
    """Count the trainable and all parameters, quantized weights as if they were unpacked."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return trainable, int(get_total_parameters(model))
