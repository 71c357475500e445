"""Loading of base models."""

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

from athanor import console
from athanor.device.backend import compile_kernels, on_cpu
from athanor.errors import UserError, one_line
from athanor.model.folder import inspect_folder
from athanor.model.weight_files import weight_files

if TYPE_CHECKING:
    import mlx.nn as nn


def load_model(folder: Path) -> "nn.Module":
    """Load a model with mlx-lm, ready to compute on this machine.

    On a CPU half precision is converted to float32, whose products are many times faster in mlx,
    and mlx's compiler, which calls a C++ compiler for each kernel, is turned off.

    Raises:
        UserError: where a file is damaged, mlx-lm cannot load it, or a weight is not finite.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model as load_with_config

    inspect_folder(folder)
    weight_files(folder)
    if on_cpu():
        compile_kernels(False)
    try:
        model, _ = load_with_config(folder)
    except Exception as error:  # an architecture's code may raise any for an odd config.json
        raise UserError("model.not_loaded", folder=folder, error=one_line(error)) from error
    if on_cpu():
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    refuse_not_finite(model, folder)
    return model


def refuse_not_finite(model: "nn.Module", folder: Path) -> None:
    """Raise UserError where a weight is NaN or infinite; warn of matrices of zeros.

    One sum for each weight shows both, and needs no memory. It may overflow where all values are
    finite, so only a weight whose sum is not is looked at again.
    """
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    weights = [
        (name, value)
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    ]
    if on_cpu():  # NumPy adds up mlx's own memory, three times as fast
        with np.errstate(all="ignore"):
            sums = np.array([np.array(value, copy=False).sum() for _, value in weights])
    else:
        sums = np.array(mx.stack([value.sum().astype(mx.float32) for _, value in weights]))
    checked = [
        (name, value, float(total)) for (name, value), total in zip(weights, sums, strict=True)
    ]
    faulty = [
        name
        for name, value, total in checked
        if not math.isfinite(total) and not mx.isfinite(value).all().item()
    ]
    if faulty:
        raise UserError(
            "model.not_finite", folder=folder, name=faulty[0], count=len(faulty), total=len(weights)
        )
    zeros = [
        name
        for name, value, total in checked
        if total == 0 and value.ndim > 1 and not value.any().item()
    ]
    if zeros:
        console.warn(
            f"{len(zeros)} of the matrices in {folder} are all zeros, the first {zeros[0]}; "
            "if no paper says so, the download is damaged"
        )


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
