"""The check of a configuration: all of its problems, each with its file and line."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console
from athanor.config import schema
from athanor.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from athanor.config.values import flatten
from athanor.errors import Problem, UserError, nearest, problem
from athanor.model.source import (
    find_local_copy,
    is_hub_repo,
    is_quantized,
    missing_folder,
    read_config,
)


class ConfigError(UserError):
    """One or more problems of a configuration, in the order in which they were found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(
            "config.problems",
            count=console.counted(len(problems), "problem"),
            problems="\n  ".join(map(str, problems)),
        )
        self.problems = problems


def check_config(tree: dict[str, Any], places: dict[str, str], problems: list[Problem]) -> Config:
    """Return a plain tree as a Config.

    Args:
        places: the places that the values of keys come from.
        problems: those of reading the tree, to report with the rest.

    Raises:
        ConfigError: with all problems.
    """
    config = OmegaConf.structured(Config)
    valid: dict[str, Any] = {}  # values of the right type, by their keys
    problems = [*problems, *_take_values(tree, config, valid), *_missing_keys(tree)]
    problems += schema.impossible_values(valid)
    problems += schema.conflicts(valid)
    if {"model.path", "model.revision", "train.num_layers", "train.method"} <= valid.keys():
        problems += model_misfits(config.model, config.train)
    if "train.optimizer_config" in valid:
        from athanor.compute import optimizers  # imports mlx, which DVC's Hydra does not need

        problems += optimizers.optimizer_misfits(flatten(config)["train.optimizer_config"])
    if all(f"data.{field.name}" in valid for field in fields(DataConfig)):
        problems += _data_misfits(config.data)
    if problems:
        raise ConfigError([replace(p, place=p.place or places.get(p.key)) for p in problems])
    return cast(Config, config)


def _take_values(tree: dict[str, Any], config: Any, valid: dict[str, Any]) -> Iterator[Problem]:
    """Put the values of a tree into `config` and `valid`; yield unknown keys and wrong types."""

    def take(key: str, value: Any) -> Iterator[Problem]:
        try:
            OmegaConf.update(config, key, value)
            valid[key] = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            yield problem("config.wrong_type", key, expected=_describe_type(key), value=value)

    for name, value in tree.items():
        if name == "seed":
            yield from take(name, value)
        elif name not in schema.SECTIONS:
            known = ["seed", *schema.SECTIONS]
            yield problem("config.unknown_key", name, candidates=nearest(name, known))
        elif not isinstance(value, dict):
            yield problem("config.no_section", name, value=value)
        else:
            known = [field.name for field in fields(schema.SECTIONS[name])]
            for leaf, leaf_value in value.items():
                key = f"{name}.{leaf}"
                if leaf in known:
                    yield from take(key, leaf_value)
                else:
                    candidates = [f"{name}.{other}" for other in nearest(leaf, known)]
                    yield problem("config.unknown_key", key, candidates=candidates)


def _missing_keys(tree: dict[str, Any]) -> Iterator[Problem]:
    for key in schema.all_keys():
        section, _, leaf = key.rpartition(".")
        values = tree.get(section, {}) if section else tree
        if isinstance(values, dict) and values.get(leaf, MISSING) == MISSING:
            yield problem("config.missing_key", key)


def _data_misfits(data: DataConfig) -> Iterator[Problem]:
    from athanor.config.data_check import CLEANING, check_misfits, format_misfits

    yield from check_misfits(dict(data.checks))
    yield from format_misfits(data)
    for step in data.clean:
        if step not in CLEANING:
            yield problem(
                "config.unknown_key", f"data.clean.{step}", candidates=nearest(step, CLEANING)
            )
    for word, synonyms in data.synonyms.items():
        if not word or not synonyms:
            yield problem("config.no_synonyms", f"data.synonyms.{word}")


def _describe_type(key: str) -> str:
    """Return the type of a key in words."""
    section, _, leaf = key.rpartition(".")
    cls = schema.SECTIONS[section] if section else Config
    kind = next(field.type for field in fields(cls) if field.name == leaf)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    or_null = [f"{word} or null" for option, word in words.items() if kind == option | None]
    if kind == list[str] | None:
        return "a list of texts or null"
    return words.get(cast(Any, kind)) or next(iter(or_null), "names with a value each")


def model_misfits(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    """Yield what the model and the training have against each other, as far as the disk tells."""
    folder = find_local_copy(model.path, model.revision)
    if folder is not None:
        yield from training_misfits(read_config(folder), train)
    elif not is_hub_repo(model.path):
        error = missing_folder(model.path)
        yield Problem(error.code, "model.path", error.facts)


def training_misfits(config: dict[str, Any], train: TrainConfig) -> Iterator[Problem]:
    """Yield the keys that the model of this config.json cannot be trained with."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and train.num_layers > layers:
        yield problem(
            "config.too_many_layers", "train.num_layers", layers=layers, value=train.num_layers
        )
    if train.method == "full" and is_quantized(config):
        yield problem("config.quantized", "train.method")
