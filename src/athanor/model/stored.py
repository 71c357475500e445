"""The weights of a model on disk, by their names there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from athanor.errors import UserError
from athanor.model.source import weight_files

if TYPE_CHECKING:
    import mlx.core as mx


def read_weights(folder: Path) -> "dict[str, mx.array]":
    """The weights on disk by their names there; each is read when it is used."""
    import mlx.core as mx

    found: dict[str, mx.array] = {}
    for path in weight_files(folder):
        found |= cast("dict[str, mx.array]", mx.load(str(path)))
    return found


def dequantize(
    weights: "dict[str, mx.array]", name: str, config: dict[str, Any]
) -> "mx.array | None":
    """The stored weight `name`, unpacked to float32 if mlx quantized it; None if it is not so.

    `config` is the model's config.json, which says how.

    Raises:
        UserError: where it does not say.
    """
    import mlx.core as mx

    layer, _, part = name.rpartition(".")
    if part != "weight" or f"{layer}.scales" not in weights:
        return None
    usual = config.get("quantization") or config.get("quantization_config") or {}
    how = usual.get(layer) or usual
    if "bits" not in how:
        raise UserError(f"{name} is quantized, and config.json does not say how")
    return mx.dequantize(
        weights[name],
        weights[f"{layer}.scales"],
        weights.get(f"{layer}.biases"),
        how["group_size"],
        how["bits"],
        how.get("mode", "affine"),
        dtype=mx.float32,
    )


def read_dtypes(folder: Path) -> "dict[str, mx.Dtype]":
    """The dtype that each weight has on disk, by its name there."""
    return {name: value.dtype for name, value in read_weights(folder).items()}
