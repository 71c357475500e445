"""The keys of a configuration: a dataclass for each section, with the types of its values.

The types are here, the defaults in conf/. Nothing below has a default of its own, so each value
has one home, and a key that conf/ forgets is an error. `register` puts the types into Hydra's
ConfigStore; the plugin in hydra_plugins/ calls it, so that DVC's own composition also knows them.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any, get_origin

from omegaconf import MISSING

# The beginning of the id of a run in MLflow.
RUN_ID = re.compile(r"[0-9a-fA-F]{4,32}")


@dataclass
class ModelConfig:
    """The base model: a folder on this machine, or a repository of a hub at a revision."""

    path: str = MISSING
    revision: str | None = MISSING


@dataclass
class DataConfig:
    """Reading, splitting, checking and cleaning rows.

    Sizes and shares are of 1; `article_tokens` is in tokens; `checks` maps the names of
    config/data_check.py to actions; `columns` maps its MEANINGS to names of columns, and `roles`
    to the names of each role.
    """

    prompt_feature: str = MISSING
    completion_feature: str = MISSING
    chat_feature: str = MISSING
    text_feature: str = MISSING
    label_feature: str = MISSING
    columns: dict[str, Any] = MISSING
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
    max_row_bytes: int = MISSING
    max_file_bytes: int = MISSING
    date: str | None = MISSING
    system: str = MISSING
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
    resume_adapter_file: str | None = MISSING


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


def key_type(key: str) -> Any:
    """Return the type of a key's value.

    Raises:
        KeyError: where there is no such key.
    """
    section, _, leaf = key.rpartition(".")
    cls = SECTIONS[section] if section else Config
    types = {f.name: f.type for f in fields(cls)}
    if not section and leaf in SECTIONS:
        raise KeyError(key)
    return types[leaf]


def holds_names(key: str) -> bool:
    """Return whether the value of a key is names with a value each."""
    return get_origin(key_type(key)) is dict


def register() -> None:
    """Register the types in Hydra's ConfigStore, as the group option `schema: athanor`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="schema", name="athanor", node=Config, package="_global_")
