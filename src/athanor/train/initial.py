"""The adapters that a training begins with, held against it and loaded."""

from typing import TYPE_CHECKING, Any

from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.model.adapters import (
    InitialAdapters,
    lora_parameters,
)
from athanor.model.json_files import read_object
from athanor.model.safetensors import read_header
from athanor.model.source import Source
from athanor.model.weight_files import StoredWeight

if TYPE_CHECKING:
    import mlx.nn as nn

CONFIG = "adapter_config.json"
# Weights that an error names.
NAMED = 3


def load_initial_adapters(
    initial: InitialAdapters, model: "nn.Module", cfg: Config, source: Source
) -> None:
    """Set the trainable weights of a model to adapters, in float32 as those of a new training.

    Raises:
        UserError: where they have another base, method, rank, scale or other layers.
    """
    import mlx.core as mx

    from athanor.compute.forward import trainable_weights
    from athanor.model.adapters import find_outside_layers

    own = dict(trainable_weights(model))
    fixed, _ = find_outside_layers(model)
    differences = _compare_settings(initial, cfg, source, len(model.layers))
    differences += _compare_weights(read_header(initial.weights), own | fixed)
    if differences:
        listing = "\n  ".join(differences)
        raise UserError("train.other_adapters", path=initial.weights, differences=listing)
    weights: Any = mx.load(str(initial.weights), format="safetensors")
    chosen = {name: weights[name].astype(value.dtype) for name, value in own.items()}
    for name, value in chosen.items():
        if not mx.isfinite(value).all().item():
            raise UserError("train.adapters_not_finite", path=initial.weights, name=name)
    model.load_weights(list(chosen.items()), strict=False)


def _compare_settings(
    initial: InitialAdapters, cfg: Config, source: Source, layers: int
) -> list[str]:
    """Return the settings of adapter_config.json that differ from this training's."""
    path = initial.weights.with_name(CONFIG)
    if not path.exists():
        return []
    recorded = read_object(path)
    parameters = recorded.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    settings = lora_parameters(cfg.train) if cfg.train.method != "full" else {}
    pairs = {
        "train.method": (recorded.get("fine_tune_type"), cfg.train.method),
        "train.rank": (parameters.get("rank"), settings.get("rank")),
        "train.scale": (parameters.get("scale"), settings.get("scale")),
        "train.num_layers": tuple(
            layers if count == -1 else count
            for count in (recorded.get("num_layers"), cfg.train.num_layers)
        ),
    }
    # mlx-lm's own adapters name their base by its path alone.
    if recorded.get("model_digest") not in (None, source.digest):
        other = f"{source.path}, which has other files,"
        pairs["model.path"] = (recorded.get("model"), other)
    return [
        f"{key}: {theirs} in {CONFIG}, {ours} here"
        for key, (theirs, ours) in pairs.items()
        if theirs is not None and theirs != ours
    ]


def _compare_weights(weights: dict[str, StoredWeight], expected: dict[str, Any]) -> list[str]:
    """Return the names of weights that only one of the two has, and the shapes that differ."""
    missing, extra = (
        sorted(expected.keys() - weights.keys()),
        sorted(weights.keys() - expected.keys()),
    )
    shapes = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    kinds = {"only here": missing, "only in the file": extra, "of another shape": shapes}
    return [f"{kind}: {_list_some(names)}" for kind, names in kinds.items() if names]


def _list_some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
