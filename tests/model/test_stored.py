"""Weights as they are stored: quantized ones by the settings of config.json."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from athanor.model.stored import dequantize, read_weights
from support.model_folders import copy_model, header
from support.refused import refused

USUAL = {"bits": 4, "group_size": 32}


def stored() -> dict[str, mx.array]:
    """Return a matrix that mlx quantized, and its scales and biases."""
    packed, scales, biases = mx.quantize(mx.ones((8, 64)), group_size=32, bits=4)
    return {"head.weight": packed, "head.scales": scales, "head.biases": biases}


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"head": True}, None),
        ({"group_size": 64, "bits": 8, "head": USUAL}, None),
        ({"group_size": 64}, "other_quantization"),
        ({"group_size": 7}, "other_quantization"),
        ({"bits": 8}, "other_quantization"),
        ({"mode": "mxfp4"}, "other_quantization"),
        ({"mode": "none"}, "other_quantization"),
        ({"mode": 3}, "other_quantization"),
        ({"head": {"bits": 4}}, "unknown_quantization"),
    ],
    ids=str,
)
def test_quantized_weights_fit_their_settings(settings: dict[str, Any], code: str | None) -> None:
    config = {"quantization": USUAL | settings}
    if code is None:
        assert mx.allclose(dequantize(stored(), "head.weight", config), mx.ones((8, 64))).item()
        return
    with refused(f"model.{code}", name="head.weight"):
        dequantize(stored(), "head.weight", config)


def test_a_dtype_that_mlx_does_not_have_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    empty = {"dtype": "F6_E2M3", "shape": [0], "data_offsets": [0, 0]}
    header(lambda entries: entries.update(extra=empty))(folder)
    with refused("model.not_loaded", folder=folder):
        read_weights(folder)
