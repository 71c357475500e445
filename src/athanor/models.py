"""Base models in memory: loading them, what is trained on them, and how that is kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from athanor import chat, files
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
        mx.disable_compile()
    try:
        model, _ = load_model(folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: mlx-lm can't load this model: {error}") from error
    if on_cpu():
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model, load_tokenizer(folder)


def load_tokenizer(folder: Path) -> "TokenizerWrapper":
    """Loads a model's tokenizer; its end tokens are the model's and the chat template's own.

    Raises:
        UserError: when its files or its template are broken.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_with_ends

    try:
        tokenizer = load_with_ends(folder, eos_token_ids=load_config(folder).get("eos_token_id"))
        end = chat.end_of_turn(tokenizer)
    except Exception as error:  # tokenizers and templates raise what they like
        raise UserError(f"{folder}: the tokenizer can't be loaded: {error}") from error
    if end is not None:
        tokenizer.eos_token_ids = tokenizer.eos_token_ids | {end}
    return tokenizer


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


def make_trainable(model: "nn.Module", train: TrainConfig, seed: int) -> None:
    """Freezes the model and makes the last `num_layers` layers trainable by the chosen method.

    lora (Hu et al. 2021) and dora (Liu et al. 2024) are mlx-lm's layers on every linear map;
    `full` trains the layers' own weights. The new weights come from `seed` alone. Whatever is
    trained is float32: half precision rounds small updates away, and Adam's second moment to 0.
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
    mx.eval(model.parameters())


def lora_parameters(train: TrainConfig) -> dict[str, Any]:
    """The shape of LoRA and DoRA layers, under mlx-lm's names."""
    return {"rank": train.rank, "scale": train.scale, "dropout": train.dropout}


def save_adapters(
    weights: "dict[str, mx.array]",
    folder: Path,
    train: TrainConfig,
    source: Source,
    *,
    layers: int,
    iteration: int,
) -> None:
    """Writes trained weights as adapters.safetensors and adapter_config.json, as mlx-lm does.

    `layers` is the model's number of layers; `iteration` the one that the weights are from.
    """
    import mlx.core as mx

    with files.whole_folder(folder) as temporary:
        # In one order, whatever they went through: the same weights are the same file.
        in_order = dict(sorted(weights.items()))
        mx.save_safetensors(str(temporary / "adapters.safetensors"), in_order)
        full = train.method == "full"
        files.write_json(
            temporary / "adapter_config.json",
            {
                "fine_tune_type": train.method,
                "num_layers": layers if train.num_layers == -1 else train.num_layers,
                "lora_parameters": None if full else lora_parameters(train),
                "model": source.path,
                "revision": source.commit,
                "model_digest": source.digest,
                "iteration": iteration,
            },
        )


def load_adapters(model: "nn.Module", folder: Path) -> None:
    """Puts adapters in mlx-lm's format onto their base model, in place."""
    from mlx_lm.tuner.utils import load_adapters as put_on

    put_on(model, str(folder))
    model.eval()


def parameter_counts(model: "nn.Module") -> tuple[int, int]:
    """The numbers of trainable and of all parameters (those of quantized weights unpacked)."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import get_total_parameters

    trainable = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return trainable, int(get_total_parameters(model))


def stored_dtypes(folder: Path) -> "dict[str, mx.Dtype]":
    """The dtype that each weight has on disk, by its name there."""
    import mlx.core as mx

    return {
        name: value.dtype
        for path in weight_files(folder)
        for name, value in cast("dict[str, mx.array]", mx.load(str(path))).items()
    }
