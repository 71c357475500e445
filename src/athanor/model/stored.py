"""The weights of a model on disk, by their names there."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from athanor.errors import UserError
from athanor.model.weight_files import weight_files

if TYPE_CHECKING:
    import mlx.core as mx


def read_weights(folder: Path) -> "dict[str, mx.array]":
    """Return the weights on disk by their names there; each is read when it is used.

    Raises:
        UserError: for a file that mlx cannot read, such as one of a dtype that it does not have.
    """
    import mlx.core as mx

    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        try:
            weights |= cast("dict[str, mx.array]", mx.load(str(path)))
        except (RuntimeError, ValueError) as error:
            raise UserError("model.not_loaded", folder=folder, error=error) from error
    return weights


def read_dtypes(folder: Path) -> "dict[str, mx.Dtype]":
    """Return the dtype of each weight on disk that holds floats, by its name there."""
    import mlx.core as mx

    weights = read_weights(folder).items()
    return {name: w.dtype for name, w in weights if mx.issubdtype(w.dtype, mx.floating)}


def read_unpacked(folder: Path, config: dict[str, Any]) -> "Iterator[tuple[str, mx.array]]":
    """Yield the weights on disk with their names, those that mlx quantized in float32."""
    weights = read_weights(folder)
    for name in weights:
        layer, _, part = name.rpartition(".")
        if part not in ("scales", "biases") or f"{layer}.scales" not in weights:
            yield name, dequantize(weights, name, config)


def dequantize(weights: "dict[str, mx.array]", name: str, config: dict[str, Any]) -> "mx.array":
    """Return the stored weight `name`, in float32 if mlx quantized it, else as it is.

    `config` is the model's config.json, which has the settings of quantization.

    Raises:
        UserError: where it has none, or others than the weight was stored with.
    """
    import mlx.core as mx

    layer, _, part = name.rpartition(".")
    if part != "weight" or f"{layer}.scales" not in weights:
        return weights[name]
    usual = config.get("quantization") or config.get("quantization_config") or {}
    of_layer = usual.get(layer)
    settings = of_layer if isinstance(of_layer, dict) else usual
    if "bits" not in settings or "group_size" not in settings:
        raise UserError("model.unknown_quantization", name=name)
    try:
        return mx.dequantize(
            weights[name],
            weights[f"{layer}.scales"],
            weights.get(f"{layer}.biases"),
            settings["group_size"],
            settings["bits"],
            settings.get("mode", "affine"),
            dtype=mx.float32,
        )
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError("model.other_quantization", name=name, error=reason) from error
