"""A configuration as plain values."""

from typing import Any, cast

from omegaconf import OmegaConf

from athanor.config import schema
from athanor.config.schema import Config


def flatten(config: Config) -> dict[str, Any]:
    """The values by dotted key, in the order of the dataclasses."""
    tree = cast(Any, OmegaConf.to_container(cast(Any, config)))
    sections = ((key, *key.partition(".")) for key in schema.all_keys())
    return {key: tree[first][leaf] if leaf else tree[first] for key, first, _, leaf in sections}


def to_dataclass(section: Any) -> Any:
    """A section as its own dataclass: OmegaConf's look-ups cost too much once a row."""
    return OmegaConf.to_object(section)


def optimizer_options(cfg: Config) -> dict[str, Any]:
    """The chosen optimizer's own options."""
    given = cast(Any, OmegaConf.to_container(cast(Any, cfg.train.optimizer_config)))
    return dict(given.get(cfg.train.optimizer, {}))


def effective_values(cfg: Config) -> dict[str, Any]:
    """Return the values by dotted key, and of optimizers' options those of the chosen one."""
    return flatten(cfg) | {"train.optimizer_config": optimizer_options(cfg)}
