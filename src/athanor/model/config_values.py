"""Values of config.json and generation_config.json, checked before anything is built from them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from athanor.errors import UserError
from athanor.model.json_files import describe, refuse_value
from athanor.model.weight_files import LARGEST, StoredWeight

# Keys by which config.json names Python code of the folder.
CODE = ("model_file", "auto_map")
# Sections in which models that also see or hear describe their language model.
SECTIONS = ("text_config", "language_config", "llm_config")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "model_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim")
# Whole numbers above 0; null leaves the choice to the architecture, a list has one for each layer.
SIZES = (*LAYERS, *WIDTHS, *HEADS, "vocab_size", "intermediate_size")
# Numbers of parts that are built one by one, or passed through.
PARTS = (
    *(*EXPERTS, "num_experts_per_tok", "n_shared_experts", "num_shared_experts"),
    *("num_nextn_predict_layers", "num_codebooks", "num_kv_shared_layers", "num_kv_reuse_layers"),
    *("altup_num_inputs", "num_loops", "loop_num", "hc_mult", "hc_sinkhorn_iters"),
)
MOST_PARTS = 65_536
# Real numbers above 0.
REALS = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
SWITCHES = ("rope_traditional",)
OBJECTS = ("rope_scaling", "rope_parameters", "quantization", "quantization_config", *SECTIONS)
# Bits that mlx quantizes weights to.
PACKED = (2, 3, 4, 5, 6, 8)

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings")
HEAD_NAMES = ("lm_head", "embed_out", "output")


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError for the first value of a config.json that no model can be built from."""
    if not isinstance(model_type := config.get("model_type"), str) or not re.fullmatch(
        r"\w[\w.-]*", model_type
    ):
        refuse_value(path, "model_type", model_type, "the name of an architecture")
    check_end_tokens(path, config)
    for prefix, section in _sections(path, config):
        for key in OBJECTS:
            if not isinstance(section.get(key, {}), dict | None):
                refuse_value(path, prefix + key, section[key], "an object")
        for key in SWITCHES:
            if not isinstance(section.get(key, False), bool):
                refuse_value(path, prefix + key, section[key], "true or false")
        for key in SIZES:
            values = section.get(key)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and not (_is_whole(value) and 0 < value <= LARGEST):
                    refuse_value(path, prefix + key, value, "a whole number from 1 to 2^31 - 1")
        for key in REALS:
            numbers = section.get(key)
            for number in numbers if isinstance(numbers, list) else [numbers]:
                if number is not None and not (_is_number(number) and 0 < number < math.inf):
                    refuse_value(path, prefix + key, number, "a number above 0")
        for key in PARTS:
            value = section.get(key)
            if value is not None and not (_is_number(value) and value <= MOST_PARTS):
                refuse_value(path, prefix + key, value, f"a number up to {MOST_PARTS:,}")
        quantization = section.get("quantization")
        for key in () if quantization is None else ("bits", "group_size"):
            value = quantization.get(key) if quantization else None
            if not (_is_whole(value) and value > 0):
                refuse_value(path, f"{prefix}quantization.{key}", value, "a whole number")


def check_end_tokens(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError where `eos_token_id` is no id and no list of ids."""
    ends = config.get("eos_token_id")
    if ends is None:
        return
    for end in ends if isinstance(ends, list) else [ends]:
        if not (_is_whole(end) and 0 <= end <= LARGEST):
            refuse_value(path, "eos_token_id", end, "a token's id or a list of ids")


def check_against_weights(
    path: Path, config: dict[str, Any], weights: dict[str, StoredWeight]
) -> int | None:
    """Hold the sizes of a config.json against the weights' headers.

    Return the number of tokens that the embedding has rows for, None where no weight is known as
    the embedding.

    Raises:
        UserError: for layers, experts, a width or a vocabulary that the weights do not have.
    """
    text = _language_model(config)
    _check_layers(path, text, weights)
    largest = max((size for weight in weights.values() for size in weight.shape), default=0)
    for key in EXPERTS:
        if isinstance(count := text.get(key), int) and count > max(largest, 1):
            refuse_value(path, key, count, f"at most {largest}, the weights' largest dimension")
    embeddings = []
    for name in find_weights(weights, (*EMBEDDINGS, *HEAD_NAMES)):
        weight = weights[name]
        if len(weight.shape) != 2 or 0 in weight.shape:
            shape = list(weight.shape)
            raise UserError("model.no_matrix", path=weight.file, name=name, shape=shape)
        if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS:
            embeddings.append((name, weight))
    if not embeddings:
        return None
    name, weight = embeddings[0]
    size = text.get("embedding_size", text.get("vocab_size"))  # OLMo's is larger
    place = f"{name} in {weight.file}"
    shape = list(weight.shape)
    fitting = [each for each in embeddings if not _is_whole(size) or each[1].shape[0] == size]
    if not fitting:
        raise UserError("model.other_vocabulary", path=path, size=size, place=place, shape=shape)
    for key in WIDTHS:
        width = text.get(key)
        if _is_whole(width) and not any(_is_width(each, width) for _, each in fitting):
            raise UserError(
                "model.other_width", path=path, key=key, width=width, place=place, shape=shape
            )
    return fitting[0][1].shape[0]


def is_quantized(config: dict[str, Any]) -> bool:
    """Return whether a config.json says that weights are quantized."""
    return "quantization" in config or "quantization_config" in config


def count_experts(config: dict[str, Any]) -> int:
    """Return the number of experts of a mixture; 0 or 1 where there is none."""
    text = _language_model(config)
    return max((text[key] for key in EXPERTS if _is_whole(text.get(key))), default=0)


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a config.json that describes the language model."""
    return next((config[key] for key in SECTIONS if config.get(key)), config)


def find_weights(weights: dict[str, StoredWeight], ends: tuple[str, ...]) -> list[str]:
    """Return the names of weights outside of layers that end with one of `ends` and .weight.

    Of models that also see or hear, those of the language model.
    """
    pattern = re.compile(rf"((?!.*(vision|visual|audio))[^\d]*\.)?({'|'.join(ends)})\.weight")
    return [name for name in weights if pattern.fullmatch(name)]


def _check_layers(path: Path, text: dict[str, Any], weights: dict[str, StoredWeight]) -> None:
    stored: dict[str, int] = {}  # of each list of layers, by its name
    for name in weights:
        if match := re.search(r"(?:^|\.)(\d{1,9})\.", name):
            kind = name[: match.start()]
            stored[kind] = max(stored.get(kind, 0), int(match[1]) + 1)
    total = sum(stored.values())
    for key in LAYERS:
        if not _is_whole(layers := text.get(key)):
            continue
        if layers > total:
            raise UserError("model.too_few_layers", path=path, key=key, layers=layers, stored=total)
        types = text.get("layer_types")
        if isinstance(types, list) and len(types) < layers:
            refuse_value(path, "layer_types", types, f"a list of {layers}, a type for each layer")


def _is_width(weight: StoredWeight, width: int) -> bool:
    """Return whether rows of a matrix are `width` wide, packed into whole numbers or not."""
    columns = weight.shape[1]
    if weight.dtype not in ("U32", "I32"):
        return columns == width
    return any(columns * 32 == width * bits for bits in PACKED)


def _sections(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield config.json and its sections of a language model, with the beginning of their keys."""
    yield "", config
    for key in SECTIONS:
        if isinstance(section := config.get(key), dict):
            yield f"{key}.", section


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def refuse_code(path: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a model asks for Python code of its own."""
    for key in CODE:
        if config.get(key):
            raise UserError("model.own_code", path=path, key=key, value=describe(config[key]))
