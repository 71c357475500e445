"""The keys of a configuration, a dataclass for each section, and the rules for their values.

The types are here, the defaults in conf/. Nothing below has a default of its own, so each value
has one home, and a key that conf/ forgets is an error. `register` puts the types into Hydra's
ConfigStore; the plugin in hydra_plugins/ calls it, so that DVC's own composition also knows them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from omegaconf import MISSING

from athanor.errors import Problem

METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine")
KEEP = ("best", "last")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
# A name in MLflow's registry, without characters that have a meaning in its paths and searches.
MODEL_NAME = re.compile(r"[\w.-]+")
END_TOKENS = ("auto", "template", "base", "train")


@dataclass
class ModelConfig:
    """The base model: a folder on this machine, or a repository of a hub at a revision."""

    path: str = MISSING
    revision: str | None = MISSING


@dataclass
class DataConfig:
    """Reading, splitting, checking and cleaning rows.

    Sizes and shares are of 1; `article_tokens` is in tokens; `checks` maps the names of
    config/data_check.py to actions.
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
    """The training, under mlx-lm's names where it has one.

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
    """The examination of the base and the tuned model; `temp` is mlx-lm's temperature."""

    __test__ = False  # no test class: pytest must not collect it

    batch_size: int = MISSING
    max_tokens: int = MISSING
    temp: float = MISSING
    max_rows: int = MISSING


@dataclass
class FuseConfig:
    """The fused model and its export to other formats."""

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
    """All values: the content of params.yaml."""

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
    """Return all keys by their dotted names, in the order of the dataclasses."""
    return ["seed"] + [f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in fields(cls)]


def register() -> None:
    """Register the types in Hydra's ConfigStore, as the group option `schema: athanor`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="schema", name="athanor", node=Config, package="_global_")


def rule(
    code: str, keys: tuple[str, ...], holds: Callable[[Any], bool], **facts: Any
) -> Callable[[dict[str, Any]], list[Problem]]:
    """Return a check of values by key: a problem for each of `keys` that breaks it and is not null.

    `facts` are those of its message, besides the value.
    """
    return lambda values: [
        Problem(code, key, value=values[key], **facts)
        for key in keys
        if values.get(key) is not None and not holds(values[key])
    ]


def keys_ending(section: str, *suffixes: str) -> tuple[str, ...]:
    """Return the dotted keys of a section that end so."""
    names = (f.name for f in fields(SECTIONS[section]))
    return tuple(f"{section}.{name}" for name in names if name.endswith(suffixes))


RULES = (
    rule(
        "config.empty_text",
        ("model.path", *keys_ending("data", "_feature"), "data.label_prompt"),
        bool,
    ),
    rule("config.no_share", keys_ending("data", "_size", "_share"), lambda v: 0 <= v <= 1),
    rule("config.too_large", ("fuse.max_difference", "train.dropout"), lambda v: 0 <= v < 1),
    rule("config.leak_similarity", ("data.leak_similarity",), lambda v: 0.5 <= v <= 1),
    *(
        rule("config.not_an_option", (key,), options.__contains__, options=options)
        for key, options in {
            "train.method": METHODS,
            "train.optimizer": OPTIMIZERS,
            "train.lr_schedule": SCHEDULES,
            "train.keep": KEEP,
            "train.end_token": END_TOKENS,
        }.items()
    ),
    rule(
        "config.not_an_option",
        ("fuse.gguf",),
        GGUF_DTYPES.__contains__,
        options=(*GGUF_DTYPES, "null"),
    ),
    rule(
        "config.registered_name",
        ("fuse.registered_model_name",),
        lambda v: MODEL_NAME.fullmatch(v) is not None,
    ),
    rule(
        "config.no_count",
        ("train.num_layers", "train.val_batches", "test.max_rows"),
        lambda v: v == -1 or v >= 1,
    ),
    rule(
        "config.too_small",
        ("seed", "train.warmup", "data.augment_copies", "data.augment_seed"),
        lambda v: v >= 0,
        least=0,
    ),
    rule(
        "config.too_small",
        (
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
        ),
        lambda v: v >= 1,
        least=1,
    ),
    rule("config.too_small", ("train.max_seq_length",), lambda v: v >= 2, least=2),
    rule(
        "config.not_positive",
        ("train.learning_rate", "train.scale", "train.max_grad_norm"),
        lambda v: 0 < v < inf,
    ),
    rule(
        "config.negative",
        ("train.lr_end", "train.activations_memory", "train.activations_disk", "test.temp"),
        lambda v: 0 <= v < inf,
    ),
)


def impossible_values(values: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each value that breaks a rule, and for values that cannot go together.

    `values` maps dotted keys to values of the right type; keys without a value are skipped.
    """
    for check in RULES:
        yield from check(values)
    share = values.get("data.valid_size", 0) + values.get("data.test_size", 0)
    if share >= 1:
        yield Problem("config.no_rows_left", "data.valid_size", share=share)
    name = values.get("fuse.registered_model_name")
    if name is not None and values.get("fuse.log_model") is False:
        yield Problem("config.name_without_model", "fuse.log_model", name=name)
    if values.get("train.end_token") == "train" and values.get("train.method", "lora") != "lora":
        yield Problem("config.end_needs_lora", "train.end_token", method=values["train.method"])
    if {"train.iters", "train.epochs"} <= values.keys():
        iters, epochs = values["train.iters"], values["train.epochs"]
        if iters is None and epochs is None:
            yield Problem("config.no_length", "train.epochs")
        elif iters is not None and epochs is not None:
            yield Problem("config.two_lengths", "train.epochs", iters=iters, epochs=epochs)
