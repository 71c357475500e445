"""A configuration as plain values."""

from typing import Any, cast

from omegaconf import OmegaConf

from athanor.config import schema
from athanor.config.schema import Config


def flatten(config: Config) -> dict[str, Any]:
    """Return the values by dotted key, in the order of the dataclasses."""
    tree = cast(Any, OmegaConf.to_container(cast(Any, config)))
    sections = ((key, *key.partition(".")) for key in schema.all_keys())
    return {key: tree[first][leaf] if leaf else tree[first] for key, first, _, leaf in sections}


def to_dataclass(section: Any) -> Any:
    """Return a section as its own dataclass: OmegaConf's look-ups are too slow for each row."""
    return OmegaConf.to_object(section)


def optimizer_options(cfg: Config) -> dict[str, Any]:
    """Return the chosen optimizer's own options."""
    options = cast(Any, OmegaConf.to_container(cast(Any, cfg.train.optimizer_config)))
    return dict(options.get(cfg.train.optimizer, {}))


def effective_values(cfg: Config) -> dict[str, Any]:
    """Return the values by dotted key; of the optimizers' options only those of the chosen one."""
    return flatten(cfg) | {"train.optimizer_config": optimizer_options(cfg)}
