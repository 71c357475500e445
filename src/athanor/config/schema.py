"""What a configuration may hold: one dataclass a section, and the values that make no sense.

The types are here, the defaults in conf/. Nothing below has a default of its own, so each value
has one home and a key that conf/ forgets is an error. `register` puts the types into Hydra's
ConfigStore; the plugin in hydra_plugins/ calls it, so that DVC's own composition knows them too.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine")
KEEP = ("best", "last")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
# Of MLflow's registry: without what its paths and searches read otherwise.
MODEL_NAME = re.compile(r"[\w.-]+")
END_TOKENS = ("auto", "template", "base", "train")


@dataclass
class ModelConfig:
    """The base model: a folder on this machine, or a repository of a hub at a revision."""

    path: str = MISSING
    revision: str | None = MISSING


@dataclass
class DataConfig:
    """How rows are read, shared out, checked and cleaned.

    Sizes and shares are of 1; `article_tokens` is in tokens; `checks` maps the names of
    data/checks.py to actions.
    """

    prompt_feature: str = MISSING
    completion_feature: str = MISSING
    chat_feature: str = MISSING
    text_feature: str = MISSING
    label_feature: str = MISSING
    format: str = MISSING
    formats: dict[str, str] = MISSING
    template: dict[str, str | None] = MISSING
    label_prompt: str = MISSING
    labels: list[str] | None = MISSING
    article_tokens: int = MISSING
    dataset: str | None = MISSING
    dataset_config: str | None = MISSING
    dataset_revision: str | None = MISSING
    valid_size: float = MISSING
    test_size: float = MISSING
    min_quality: float | None = MISSING
    leak_similarity: float = MISSING
    imbalance_share: float = MISSING
    other_script_share: float = MISSING
    spelled_share: float = MISSING
    checks: dict[str, str] = MISSING
    clean: dict[str, bool] = MISSING
    synonyms: dict[str, list[str]] = MISSING
    augment_copies: int = MISSING
    augment_share: float = MISSING
    augment_seed: int = MISSING


@dataclass
class TrainConfig:
    """mlx-lm's own names, where it has one.

    Lengths are in tokens; `iters`, `warmup`, `steps_*` and `save_every` in iterations;
    `activations_*` in GB.
    """

    method: str = MISSING
    num_layers: int = MISSING
    rank: int = MISSING
    scale: float = MISSING
    dropout: float = MISSING
    batch_size: int = MISSING
    iters: int | None = MISSING
    epochs: int | None = MISSING
    optimizer: str = MISSING
    optimizer_config: dict[str, dict[str, Any]] = MISSING
    learning_rate: float = MISSING
    lr_schedule: str = MISSING
    lr_end: float = MISSING
    warmup: int = MISSING
    max_grad_norm: float | None = MISSING
    val_batches: int = MISSING
    steps_per_report: int = MISSING
    steps_per_eval: int = MISSING
    keep: str = MISSING
    patience: int | None = MISSING
    save_every: int = MISSING
    max_seq_length: int = MISSING
    grad_checkpoint: bool = MISSING
    reuse_activations: bool = MISSING
    activations_memory: float = MISSING
    activations_disk: float = MISSING
    grad_accumulation_steps: int = MISSING
    mask_prompt: bool = MISSING
    end_token: str = MISSING
    compile: bool | None = MISSING
    blas_threads: int | None = MISSING


@dataclass
class TestConfig:
    """How the tuned model is examined beside its base; `temp` is mlx-lm's temperature."""

    __test__ = False  # the name is the stage's: pytest, look elsewhere

    batch_size: int = MISSING
    max_tokens: int = MISSING
    temp: float = MISSING
    max_rows: int = MISSING


@dataclass
class FuseConfig:
    """How the fused model is written, and in which other forms it leaves."""

    dequantize: bool | None = MISSING
    max_difference: float = MISSING
    gguf: str | None = MISSING
    modelfile: bool = MISSING
    system: str | None = MISSING
    peft: bool = MISSING
    log_model: bool = MISSING
    registered_model_name: str | None = MISSING


@dataclass
class Config:
    """Everything: what params.yaml holds."""

    seed: int = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "test": TestConfig,
    "fuse": FuseConfig,
}


def all_keys() -> list[str]:
    """Every key by its dotted name, in the order of the dataclasses."""
    return ["seed"] + [f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in fields(cls)]


def register() -> None:
    """Registers the types in Hydra's ConfigStore, as the group option `schema: athanor`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="schema", name="athanor", node=Config, package="_global_")


def impossible(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (key, what was expected) for each value that has the right type and makes no sense.

    `value` maps dotted keys to values of the right type; keys that are missing are passed over.
    """

    def broken(key: str, holds: bool) -> bool:
        return key in value and not holds

    for key in ("model.path", *(k for k in value if k.endswith(("_feature", "data.label_prompt")))):
        if broken(key, bool(value.get(key))):
            yield key, "a text that is not empty"
    for key in (k for k in value if k.startswith("data.") and k.endswith(("_size", "_share"))):
        if broken(key, 0 <= value[key] <= 1):
            yield key, "a share: at least 0, at most 1"
    if broken(
        "data.valid_size", value.get("data.valid_size", 0) + value.get("data.test_size", 0) < 1
    ):
        yield "data.valid_size", "that some of 1 is left beside data.test_size, to train on"
    if broken("fuse.max_difference", 0 <= value.get("fuse.max_difference", 0) < 1):
        yield "fuse.max_difference", "a share: at least 0, below 1"
    if broken("data.leak_similarity", 0.5 <= value.get("data.leak_similarity", 1) <= 1):
        yield "data.leak_similarity", "at least 0.5, below which it is not found, and at most 1"
    if broken("seed", value.get("seed", 0) >= 0):
        yield "seed", "0 or more"
    for key, options in (
        ("train.method", METHODS),
        ("train.optimizer", OPTIMIZERS),
        ("train.lr_schedule", SCHEDULES),
        ("train.keep", KEEP),
        ("train.end_token", END_TOKENS),
    ):
        if broken(key, value.get(key) in options):
            yield key, "one of " + ", ".join(options)
    dtype = value.get("fuse.gguf")
    if broken("fuse.gguf", dtype is None or dtype in GGUF_DTYPES):
        yield "fuse.gguf", f"one of {', '.join(GGUF_DTYPES)}, or null"
    name = value.get("fuse.registered_model_name")
    if broken("fuse.registered_model_name", name is None or bool(MODEL_NAME.fullmatch(name))):
        yield "fuse.registered_model_name", "letters, digits, - . _ alone, or null"
    if name is not None and value.get("fuse.log_model") is False:
        yield "fuse.log_model", "true, as fuse.registered_model_name asks for a model in MLflow"
    if value.get("train.end_token") == "train" and value.get("train.method", "lora") != "lora":
        yield "train.end_token", "auto, base or template: rows of a token are trained by lora only"
    iters, epochs = value.get("train.iters"), value.get("train.epochs")
    if {"train.iters", "train.epochs"} <= value.keys() and (iters is None) == (epochs is None):
        both = "null beside train.iters (or a number, and train.iters=null)"
        yield "train.epochs", both if epochs else "a number (or one in train.iters)"
    for key in ("train.num_layers", "train.val_batches", "test.max_rows"):
        number = value.get(key, 1)
        if broken(key, number == -1 or number >= 1):
            yield key, "1 or more, or -1 for all"
    for key in (
        "data.article_tokens",
        "train.rank",
        "train.batch_size",
        "train.iters",
        "train.epochs",
        "train.steps_per_report",
        "train.steps_per_eval",
        "train.patience",
        "train.save_every",
        "train.grad_accumulation_steps",
        "train.blas_threads",
        "test.batch_size",
        "test.max_tokens",
    ):
        number = value.get(key)
        if broken(key, number is None or number >= 1):
            yield key, "1 or more"
    for key in ("train.warmup", "data.augment_copies", "data.augment_seed"):
        if broken(key, value.get(key, 0) >= 0):
            yield key, "0 or more"
    if broken("train.max_seq_length", value.get("train.max_seq_length", 2) >= 2):
        yield "train.max_seq_length", "2 or more"
    for key in ("train.learning_rate", "train.scale", "train.max_grad_norm"):
        number = value.get(key)
        if broken(key, number is None or 0 < number < float("inf")):
            yield key, "a finite number above 0"
    for key in ("train.lr_end", "train.activations_memory", "train.activations_disk", "test.temp"):
        if broken(key, 0 <= value.get(key, 0) < float("inf")):
            yield key, "a finite number, 0 or more"
    if broken("train.dropout", 0 <= value.get("train.dropout", 0) < 1):
        yield "train.dropout", "at least 0 and below 1"
