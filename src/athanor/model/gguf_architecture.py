"""GGUF's fields for an architecture: llama.cpp's keys for a config.json.

What the keys mean follows llama.cpp's loader (src/models/) and its converter (conversion/).
"""

from importlib import import_module
from typing import Any

from athanor.errors import UserError
from athanor.model.json_files import describe

Fields = dict[str, Any]

# llama.cpp's name for each architecture, by config.json's model_type.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def model_arguments(config: dict[str, Any]) -> Any:
    """Return mlx-lm's ModelArgs for a config.json; settings that it leaves out have defaults."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            "model.gguf_architecture", architecture=model_type, known=list(ARCHITECTURES)
        )
    module = "llama" if model_type == "mistral" else model_type
    try:
        return import_module(f"mlx_lm.models.{module}").ModelArgs.from_dict(config)
    except (TypeError, ValueError) as error:
        raise _misfit(model_type, error) from error


def _misfit(model_type: str, error: Exception) -> UserError:
    reason = f"it lacks {error}" if isinstance(error, KeyError) else error
    return UserError("model.config_misfits_architecture", architecture=model_type, error=reason)


def architecture_fields(config: dict[str, Any]) -> Fields:
    """Return llama.cpp's keys for a config.json.

    Raises:
        UserError: where llama.cpp computes this architecture in a different way.
    """
    args = model_arguments(config)
    try:
        return _fields(args, config)
    except (TypeError, ValueError, KeyError, OverflowError) as error:  # of a setting's kind
        raise _misfit(config["model_type"], error) from error


def _fields(args: Any, config: dict[str, Any]) -> Fields:
    arch = ARCHITECTURES[config["model_type"]]
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or not 0 < context < 2**32:
        raise UserError("model.gguf_context", value=describe(context))
    if "sliding_attention" in (getattr(args, "layer_types", None) or []):
        raise UserError("model.gguf_sliding_windows", architecture=arch)
    heads = args.num_attention_heads
    head_dim = head_dimension(args)
    fields = {
        "vocab_size": args.vocab_size,
        "context_length": context,
        "embedding_length": args.hidden_size,
        "block_count": args.num_hidden_layers,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": args.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
    }
    fields |= _rope_fields(args, arch, head_dim)
    if arch in ("gemma2", "gemma3"):
        fields |= _gemma_fields(args, config, arch, head_dim)
    return {f"{arch}.{key}": value for key, value in fields.items()}


def head_dimension(args: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)


def rope_scaling(args: Any) -> tuple[str, dict[str, Any]]:
    """Return the kind of rope scaling, under the names that mlx-lm reads, and its settings."""
    scaling = getattr(args, "rope_scaling", None) or {}
    return scaling.get("type") or scaling.get("rope_type", "default"), scaling


def _rope_fields(args: Any, arch: str, head_dim: int) -> Fields:
    if getattr(args, "rope_traditional", False):
        raise UserError("model.gguf_rope_traditional", architecture=arch)
    fields: Fields = {"rope.dimension_count": head_dim, "rope.freq_base": float(args.rope_theta)}
    kind, scaling = rope_scaling(args)
    if kind == "linear":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    elif kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        different = [key for key, value in usual.items() if scaling.get(key, value) != value]
        if different:
            raise UserError("model.gguf_yarn", settings=different)
        fields |= {
            "rope.scaling.type": kind,
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling.get(
                "original_max_position_embeddings", 4096
            ),
        }
    elif kind != "default" and not (kind == "llama3" and arch == "llama"):
        raise UserError("model.gguf_rope_scaling", kind=kind, architecture=arch)
    return fields


def _gemma_fields(args: Any, config: dict[str, Any], arch: str, head_dim: int) -> Fields:
    """Return the keys that Gemma 2 and 3 add; llama.cpp fixes some by the number of layers."""
    largest = args.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[arch]
    scalar = args.hidden_size // args.num_attention_heads if largest else head_dim
    expected = {"query_pre_attn_scalar": scalar}
    if arch == "gemma3":
        expected |= {"rope_local_base_freq": 10000, "sliding_window_pattern": 6}
    for key, value in expected.items():
        if getattr(args, key) != value:
            raise UserError(
                "model.gguf_fixed_setting",
                architecture=arch,
                key=key,
                expected=value,
                value=config.get(key),
            )
    if arch == "gemma3":
        return {"attention.sliding_window": args.sliding_window}
    fields = {
        "attn_logit_softcapping": float(args.attn_logit_softcapping),
        "final_logit_softcapping": float(args.final_logit_softcapping),
    }
    if "sliding_window" in config:
        # mlx-lm attends to everything here; the two differ beyond this many tokens.
        fields["attention.sliding_window"] = config["sliding_window"]
    return fields
