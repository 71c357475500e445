"""mlx-lm's adapters in the format of Hugging Face's PEFT, for transformers, vLLM and more.

Reads adapters.safetensors and adapter_config.json in mlx-lm's format and the base model's folder;
writes adapter_model.safetensors and adapter_config.json (a LoraConfig) in a folder of their own:

    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, out)

For weights W of shape (out, in) both add a product of rank r. mlx-lm keeps lora_a (in, r), lora_b
(r, out) and a scale; PEFT keeps lora_A (r, in), lora_B (out, r), and lora_alpha = scale · r (Hu et
al. 2021). Of DoRA (Liu et al. 2024) both keep the magnitudes, one for each output.

Names are the base's own, as its files have them. A base that embeds tokens and predicts them with
the same weights is adapted on both sides by mlx-lm; in PEFT these are two modules, so both are
written, with `ensure_weight_tying`. (In PEFT 0.21 such adapters can be used but not merged: its
merge adds both to the one weight. The fused model is that merge.)
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from athanor import console, files
from athanor.errors import UserError
from athanor.model.config_values import is_quantized
from athanor.model.folder import read_config
from athanor.model.stored import read_weights

if TYPE_CHECKING:
    import mlx.core as mx

LEAVES = {"lora_a", "lora_b", "m"}
PREFIX = "base_model.model"  # PeftModel's and LoraModel's own attributes
HEAD = "lm_head"


def write_peft(adapters: Path, out: Path, *, base: str, model: Path) -> None:
    """Write adapters in PEFT's format to the folder `out`, whole or not at all.

    `base` is the base model's name for the record, as transformers will look for it; `model` its
    folder.

    Raises:
        UserError: where PEFT has no form for the adapters: all weights (`full`), DoRA on an
            embedding, or all experts' weights in one.
    """
    import mlx.core as mx

    trained = files.read_json(adapters / "adapter_config.json")
    if trained["fine_tune_type"] == "full":
        raise UserError("fuse.peft_full", adapters=adapters)
    settings = read_config(model)
    if is_quantized(settings):
        console.warn(
            f"transformers cannot load {base}, which mlx quantized; load the adapters in PEFT's "
            "format onto the model that it was made from"
        )
    loaded = cast("dict[str, mx.array]", mx.load(str(adapters / "adapters.safetensors")))
    modules: dict[str, dict[str, mx.array]] = {}
    for key, value in loaded.items():
        name, _, leaf = key.rpartition(".")
        if leaf not in LEAVES:
            raise UserError("fuse.peft_unknown_weight", adapters=adapters, name=key)
        modules.setdefault(name, {})[leaf] = value

    weights: dict[str, mx.array] = {}
    rows = _count_rows(model)
    embedding = None
    # Where the config does not say, the files do: tied weights are stored once.
    tied = bool(settings.get("tie_word_embeddings", f"{HEAD}.weight" not in rows))
    for name, module in modules.items():
        if _is_embedding(name, module, rows, model):
            embedding = name
            weights[f"{name}.lora_embedding_A"] = module["lora_a"].T
            weights[f"{name}.lora_embedding_B"] = module["lora_b"].T
            if tied:
                weights[f"{HEAD}.lora_A.weight"] = module["lora_b"]
                weights[f"{HEAD}.lora_B.weight"] = module["lora_a"]
        else:
            weights[f"{name}.lora_A.weight"] = module["lora_a"].T
            weights[f"{name}.lora_B.weight"] = module["lora_b"].T
        if "m" in module:
            weights[f"{name}.lora_magnitude_vector"] = module["m"]

    ranks = {name: module["lora_a"].shape[1] for name, module in modules.items()}
    if tied and embedding:
        ranks[HEAD] = ranks[embedding]
    with files.whole_folder(out) as folder:
        mx.save_safetensors(
            str(folder / "adapter_model.safetensors"),
            {f"{PREFIX}.{name}": mx.contiguous(weights[name]) for name in sorted(weights)},
            metadata={"format": "pt"},
        )
        config = _lora_config(ranks, trained, base=base, tied=tied and embedding is not None)
        files.write_json(folder / "adapter_config.json", config)


def _lora_config(
    ranks: dict[str, int], trained: dict[str, Any], *, base: str, tied: bool
) -> dict[str, Any]:
    """Return the arguments of LoraConfig for modules of these ranks.

    Modules are named one by one: a last part such as "q_proj" would also mean that of layers that
    were not trained.
    """
    parameters = trained["lora_parameters"]
    scale = float(parameters["scale"])
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": trained.get("revision"),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _alpha(scale, usual),
        "lora_dropout": float(parameters["dropout"]),
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: _alpha(scale, rank) for name, rank in others.items()},
        "use_dora": trained["fine_tune_type"] == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "ensure_weight_tying": tied,
    }


def _alpha(scale: float, rank: int) -> int | float:
    """Return lora_alpha, which PEFT divides by the rank; other programs expect an int."""
    alpha = round(scale * rank, 9)
    return int(alpha) if alpha.is_integer() else alpha


def _count_rows(model: Path) -> dict[str, int]:
    """Return the number of rows of each weight on disk: outputs of a linear map, or tokens."""
    stored = read_weights(model)
    return {name: value.shape[0] for name, value in stored.items() if value.ndim}


def _is_embedding(
    name: str, module: "dict[str, mx.array]", rows: dict[str, int], model: Path
) -> bool:
    """Return true if adapters are an embedding's: lora_a has a row for each token.

    Rows are compared, not columns: quantized weights have fewer of these.

    Raises:
        UserError: where PEFT has no form for these adapters.
    """
    count = rows.get(f"{name}.weight")
    if count is None:
        raise UserError("fuse.peft_renamed_weight", name=name, model=model)
    if module["lora_a"].ndim != 2:
        raise UserError("fuse.peft_experts", name=name)
    if module["lora_b"].shape[1] == count:
        return False
    if module["lora_a"].shape[0] != count:
        raise UserError(
            "fuse.peft_other_model",
            name=name,
            model=model,
            rows=count,
            adapted=module["lora_b"].shape[1],
        )
    if "m" in module:
        raise UserError("fuse.peft_dora_embedding", name=name)
    return True
