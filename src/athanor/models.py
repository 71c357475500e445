"""Base models in memory: loading them, what is trained on them, and how that is kept."""

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from athanor import files, templates
from athanor.console import UserError
from athanor.schema import TrainConfig
from athanor.sources import Source, weight_files

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load(folder: Path) -> "tuple[nn.Module, TokenizerWrapper]":
    """Loads a model with mlx-lm, ready to compute on this machine.

    On the CPU half precision is computed in float32: mlx's CPU products of float16 and bfloat16
    take a path many times slower, and its compiler would call a C++ compiler for each kernel.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model

    if on_cpu():
        compile_kernels(False)
    try:
        model, _ = load_model(folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: mlx-lm can't load this model: {error}") from error
    if on_cpu():
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model, load_tokenizer(folder)


def compile_kernels(on: bool) -> None:
    """Switches mlx's compiler on or off, for all that is computed from here on."""
    import mlx.core as mx

    from athanor import silu

    silu.use(not on and sys.platform == "linux")
    if on:
        mx.enable_compile()
    else:
        mx.disable_compile()


def load_tokenizer(folder: Path) -> "TokenizerWrapper":
    """Loads a model's tokenizer; its end tokens are the model's and the chat template's own.

    Raises:
        UserError: when its files or its template are broken.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_with_ends

    try:
        tokenizer = load_with_ends(folder, eos_token_ids=load_config(folder).get("eos_token_id"))
        end = templates.end_of_turn(tokenizer)
    except Exception as error:  # tokenizers and templates raise what they like
        raise UserError(f"{folder}: the tokenizer can't be loaded: {error}") from error
    if end is not None:
        tokenizer.eos_token_ids = tokenizer.eos_token_ids | {end}
    return tokenizer


def fresh(model: "nn.Module") -> "nn.Module":
    """A model of its own with the same weights, which are shared: arrays never change in place."""
    import mlx.core as mx

    arrays = (value for part in model.modules() for value in part.values())
    shared = {id(array): array for array in arrays if isinstance(array, mx.array)}
    return copy.deepcopy(model, dict(shared))


def on_cpu() -> bool:
    """Whether mlx computes on the CPU here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def device() -> str:
    """The device in words, for the record: what computes, and with which BLAS on Linux's CPU."""
    import platform

    import mlx.core as mx

    from athanor import BLAS

    if on_cpu():
        blas = "Accelerate" if platform.system() == "Darwin" else BLAS
        return f"cpu {platform.machine()} ({blas})"
    return f"gpu {mx.device_info().get('device_name', '')}".strip()


def memory_limit() -> int:
    """The bytes that a model may use here: what Metal recommends, or what mlx allows itself."""
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or mx.get_memory_limit())


def make_trainable(
    model: "nn.Module", train: TrainConfig, seed: int, end: int | None = None
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


def _make_row_trainable(model: "nn.Module", train: TrainConfig, token: int) -> None:
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


def lora_parameters(train: TrainConfig) -> dict[str, Any]:
    """The shape of LoRA and DoRA layers, under mlx-lm's names."""
    return {"rank": train.rank, "scale": train.scale, "dropout": train.dropout}


def save_adapters(
    weights: "dict[str, mx.array]",
    folder: Path,
    train: TrainConfig,
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


def adapter_names(folder: Path) -> list[str]:
    """The names of the weights that were trained."""
    import mlx.core as mx

    return list(cast("dict[str, mx.array]", mx.load(str(folder / "adapters.safetensors"))))


def parameter_counts(model: "nn.Module") -> tuple[int, int]:
    """The numbers of trainable and of all parameters (those of quantized weights unpacked)."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return trainable, int(get_total_parameters(model))


def stored_weights(folder: Path) -> "dict[str, mx.array]":
    """The weights on disk by their names there; each is read when it is used."""
    import mlx.core as mx

    found: dict[str, mx.array] = {}
    for path in weight_files(folder):
        found |= cast("dict[str, mx.array]", mx.load(str(path)))
    return found


def dequantized(
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


def stored_dtypes(folder: Path) -> "dict[str, mx.Dtype]":
    """The dtype that each weight has on disk, by its name there."""
    return {name: value.dtype for name, value in stored_weights(folder).items()}
