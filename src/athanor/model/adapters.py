"""Adapters: the weights that are trained on a base model, and their files in mlx-lm's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from athanor import files
from athanor.errors import UserError
from athanor.model.source import Source

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


WEIGHTS = "adapters.safetensors"


class AdapterOptions(Protocol):
    """Options of adapters under mlx-lm's names, such as the train section of a configuration."""

    method: str
    num_layers: int
    rank: int
    scale: float
    dropout: float


@dataclass(frozen=True)
class InitialAdapters:
    """Adapters that a training begins with.

    Args:
        weights: the file of weights.
        digest: its sha256.
        run: MLflow's id of the run that trained them, None for those of a file.
    """

    weights: Path
    digest: str
    run: str | None


def make_trainable(
    model: "nn.Module", train: AdapterOptions, seed: int, end: int | None = None
) -> None:
    """Freeze a model and make its last `num_layers` layers trainable by the chosen method.

    lora (Hu et al. 2021) and dora (Liu et al. 2024) put mlx-lm's layers on every linear map;
    full trains the layers' own weights. New weights come from `seed` alone. Trained weights are
    float32: half precision rounds small updates away, and Adam's second moment to 0.

    With `end`, which only lora allows, the token's rows of embedding and head are trained as well.

    Raises:
        UserError: where mlx-lm has no adapters of this method for a layer, such as DoRA of experts.
    """
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(seed)
    model.freeze()
    count = len(model.layers) if train.num_layers == -1 else train.num_layers
    if train.method == "full":
        for layer in model.layers[-count:]:
            layer.set_dtype(mx.float32)
            layer.unfreeze()
    else:
        dora = train.method == "dora"
        try:
            linear_to_lora_layers(model, count, lora_parameters(train), use_dora=dora)
        except ValueError as error:  # it has no such adapters for a kind of layer
            raise UserError("model.no_adapters", method=train.method, error=error) from error
        if end is not None:
            _make_row_trainable(model, train, end)
    mx.eval(model.parameters())


def _make_row_trainable(model: "nn.Module", train: AdapterOptions, token: int) -> None:
    """Put LoRA on the embedding and the head that can change only one token's rows.

    The factor that selects rows is fixed to the token's, and the other starts at 0, so mlx-lm
    loads these adapters like any others.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    for name in _embedding_and_head(model):
        base = dict(model.named_modules())[name]
        kind = LoRALinear if isinstance(base, (nn.Linear, nn.QuantizedLinear)) else LoRAEmbedding
        if token >= base.weight.shape[0]:
            raise UserError(
                "model.no_row_for_end", name=name, rows=base.weight.shape[0], token=token
            )
        layer = kind.from_base(base, r=train.rank, scale=train.scale, dropout=0.0)
        # Tokens are the rows of A for an embedding, and the columns of B for a head.
        selector, learned = ("lora_b", "lora_a") if kind is LoRALinear else ("lora_a", "lora_b")
        selection = mx.zeros_like(layer[selector])
        selection[(0, token) if kind is LoRALinear else (token, 0)] = 1.0
        layer[selector] = selection
        layer[learned] = mx.zeros_like(layer[learned])
        layer.freeze(recurse=False, keys=[selector])
        model.update_modules(tree_unflatten([(name, layer)]))


def _embedding_and_head(model: "nn.Module") -> list[str]:
    """Return the names of the token embedding and, where it is not tied to it, of the head.

    Heads have many names; like the token embedding, and unlike one of positions, they have a row
    for each token.
    """
    import mlx.nn as nn

    inside = {id(module) for layer in model.layers for module in layer.modules()}
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in inside
        and isinstance(module, (*embeddings, nn.Linear, nn.QuantizedLinear))
    }
    sizes = [m.weight.shape[0] for m in candidates.values() if isinstance(m, embeddings)]
    if not sizes:
        raise UserError("model.no_embedding")
    return [name for name, module in candidates.items() if module.weight.shape[0] == max(sizes)]


def lora_parameters(train: AdapterOptions) -> dict[str, Any]:
    """Return the settings of LoRA and DoRA layers, under mlx-lm's names."""
    return {"rank": train.rank, "scale": train.scale, "dropout": train.dropout}


def save_adapters(
    weights: "dict[str, mx.array]",
    folder: Path,
    train: AdapterOptions,
    source: Source,
    *,
    model: "nn.Module",
    iteration: int,
) -> None:
    """Write trained weights as adapters.safetensors and adapter_config.json, as mlx-lm does.

    Args:
        model: the model that was trained.
        iteration: the iteration that the weights are from.
    """
    import mlx.core as mx

    selectors, keys = find_outside_layers(model)
    weights = selectors | weights
    parameters = lora_parameters(train) | ({"keys": keys} if keys else {})
    with files.whole_folder(folder) as temporary:
        # Sorted, so that equal weights make equal files.
        in_order = dict(sorted(weights.items()))
        mx.save_safetensors(str(temporary / "adapters.safetensors"), in_order)
        full = train.method == "full"
        files.write_json(
            temporary / "adapter_config.json",
            {
                "fine_tune_type": train.method,
                "num_layers": len(model.layers) if train.num_layers == -1 else train.num_layers,
                "lora_parameters": None if full else parameters,
                "model": source.path,
                "revision": source.commit,
                "model_digest": source.digest,
                "iteration": iteration,
            },
        )


def find_outside_layers(model: "nn.Module") -> "tuple[dict[str, mx.array], list[str]]":
    """Return the factors that _make_row_trainable fixed, and mlx-lm's keys of adapted modules.

    Both are empty where only layers have adapters, which mlx-lm finds without keys.
    """
    modules = dict(model.named_modules())
    layers = [dict(layer.named_modules()) for layer in model.layers]
    inside = {name for layer in layers for name, module in layer.items() if "lora_a" in module}
    known = {id(module) for layer in layers for module in layer.values()}
    outside = [
        name for name, module in modules.items() if "lora_a" in module and id(module) not in known
    ]
    selectors = {
        f"{name}.{factor}": modules[name][factor]
        for name in outside
        for factor in ("lora_a", "lora_b")
        if factor not in modules[name].trainable_parameters()
    }
    return selectors, sorted(inside) + outside if outside else []


def load_adapters(model: "nn.Module", folder: Path) -> None:
    """Add adapters to their base model, in place."""
    from mlx_lm.tuner.utils import load_adapters as add_adapters

    add_adapters(model, str(folder))
    model.eval()


def merge_adapters(model: "nn.Module", *, dequantize: bool) -> None:
    """Add the adapters to the weights below them, in place; nothing is computed yet.

    A quantized weight is quantized again after the sum, or becomes a plain one with `dequantize`.
    """
    from mlx.utils import tree_unflatten

    merged = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if merged:
        model.update_modules(tree_unflatten(merged))


def read_adapter_names(folder: Path) -> list[str]:
    """Return the names of the weights in an adapters folder."""
    import mlx.core as mx

    return list(cast("dict[str, mx.array]", mx.load(str(folder / "adapters.safetensors"))))
