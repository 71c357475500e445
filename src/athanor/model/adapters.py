"""Adapters: the weights that are trained on a base model, and their files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from athanor import files
from athanor.errors import UserError
from athanor.model.source import Source

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


class AdapterOptions(Protocol):
    """Options of adapters, under mlx-lm's names; the train section of a configuration is one."""

    method: str
    num_layers: int
    rank: int
    scale: float
    dropout: float


def make_trainable(
    model: "nn.Module", train: AdapterOptions, seed: int, end: int | None = None
) -> None:
    """Freezes the model and makes the last `num_layers` layers trainable by the chosen method.

    lora (Hu et al. 2021) and dora (Liu et al. 2024) are mlx-lm's layers on every linear map;
    `full` trains the layers' own weights. The new weights come from `seed` alone. Whatever is
    trained is float32: half precision rounds small updates away, and Adam's second moment to 0.

    With `end`, and by lora only, this token's rows of the embedding and the head are trained too.
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
        linear_to_lora_layers(model, count, lora_parameters(train), use_dora=train.method == "dora")
        if end is not None:
            _make_row_trainable(model, train, end)
    mx.eval(model.parameters())


def _make_row_trainable(model: "nn.Module", train: AdapterOptions, token: int) -> None:
    """Puts LoRA on the embedding and the head that can change nothing but one token's rows.

    Of its two factors the one that says which rows is fixed to this token's, and the other starts
    at 0; so the adapters stay ones that mlx-lm loads.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    for name in _ends_of_model(model):
        base = dict(model.named_modules())[name]
        kind = LoRALinear if isinstance(base, (nn.Linear, nn.QuantizedLinear)) else LoRAEmbedding
        if token >= base.weight.shape[0]:
            raise UserError(
                f"train.end_token: {name} has {base.weight.shape[0]} rows, and none of the token "
                f"{token} that answers end with: `uv run python -m athanor.chat` says more"
            )
        layer = kind.from_base(base, r=train.rank, scale=train.scale, dropout=0.0)
        # Rows of an embedding are those of A; of a head, the columns of B.
        which, learned = ("lora_b", "lora_a") if kind is LoRALinear else ("lora_a", "lora_b")
        rows = mx.zeros_like(layer[which])
        place = (0, token) if kind is LoRALinear else (token, 0)
        rows[place] = 1.0
        layer[which] = rows
        layer[learned] = mx.zeros_like(layer[learned])
        layer.freeze(recurse=False, keys=[which])
        model.update_modules(tree_unflatten([(name, layer)]))


def _ends_of_model(model: "nn.Module") -> list[str]:
    """The names of the embedding of tokens and, where it is not the same, of the head.

    Heads have many names. What they share is a row a token, which embeddings of places lack.
    """
    import mlx.nn as nn

    inside = {id(module) for layer in model.layers for module in layer.modules()}
    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in inside
        and isinstance(module, (*embeddings, nn.Linear, nn.QuantizedLinear))
    }
    sizes = [m.weight.shape[0] for m in found.values() if isinstance(m, embeddings)]
    if not sizes:
        raise UserError("train.end_token=train: this model's embedding of tokens is not known")
    return [name for name, module in found.items() if module.weight.shape[0] == max(sizes)]


def lora_parameters(train: AdapterOptions) -> dict[str, Any]:
    """The shape of LoRA and DoRA layers, under mlx-lm's names."""
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
    """Writes trained weights as adapters.safetensors and adapter_config.json, as mlx-lm does.

    `model` is the one that was trained; `iteration` the one that the weights are from.
    """
    import mlx.core as mx

    fixed, beside = _around_the_layers(model)
    weights = fixed | weights
    parameters = lora_parameters(train) | ({"keys": beside} if beside else {})
    with files.whole_folder(folder) as temporary:
        # In one order, whatever they went through: the same weights are the same file.
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


def _around_the_layers(model: "nn.Module") -> "tuple[dict[str, mx.array], list[str]]":
    """What _make_row_trainable fixed, and the keys of all that has adapters, as mlx-lm wants them.

    Both are empty where the layers alone have adapters, which mlx-lm finds by itself.
    """
    modules = dict(model.named_modules())
    layers = [dict(layer.named_modules()) for layer in model.layers]
    inside = {name for layer in layers for name, module in layer.items() if "lora_a" in module}
    known = {id(module) for layer in layers for module in layer.values()}
    outside = [
        name for name, module in modules.items() if "lora_a" in module and id(module) not in known
    ]
    fixed = {
        f"{name}.{factor}": modules[name][factor]
        for name in outside
        for factor in ("lora_a", "lora_b")
        if factor not in modules[name].trainable_parameters()
    }
    return fixed, sorted(inside) + outside if outside else []


def load_adapters(model: "nn.Module", folder: Path) -> None:
    """Puts adapters in mlx-lm's format onto their base model, in place."""
    from mlx_lm.tuner.utils import load_adapters as put_on

    put_on(model, str(folder))
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
    """The names of the weights that were trained."""
    import mlx.core as mx

    return list(cast("dict[str, mx.array]", mx.load(str(folder / "adapters.safetensors"))))
