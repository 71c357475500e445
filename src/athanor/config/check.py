"""The check of a configuration: all of its problems, each with its file and line."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console
from athanor.config import schema
from athanor.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from athanor.config.values import flatten
from athanor.errors import Problem, UserError, nearest
from athanor.model.config_values import count_experts
from athanor.model.folder import inspect_folder, is_quantized, read_config
from athanor.model.source import (
    find_local_copy,
    is_hub_repo,
    missing_folder,
    refuse_name,
    refuse_stage_output,
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
    if {"model.path", "model.revision", "train.num_layers", "train.method"} <= valid.keys():
        problems += model_misfits(config.model, config.train)
    if "train.optimizer_config" in valid:
        from athanor.compute import optimizers  # imports mlx, which DVC's Hydra does not need

        problems += optimizers.optimizer_misfits(flatten(config)["train.optimizer_config"])
    if all(f"data.{field.name}" in valid for field in fields(DataConfig)):
        from athanor.config.data_check import data_misfits  # imports jinja2

        problems += data_misfits(config.data)
    for problem in problems:
        problem.place = problem.place or places.get(problem.key)
    if problems:
        raise ConfigError(problems)
    return cast(Config, config)


def _take_values(tree: dict[str, Any], config: Any, valid: dict[str, Any]) -> Iterator[Problem]:
    """Put the values of a tree into `config` and `valid`; yield unknown keys and wrong types."""
    for name, value in tree.items():
        if name in schema.SECTIONS and not isinstance(value, dict):
            yield Problem("config.no_section", name, value=value)
            continue
        section = f"{name}." if name in schema.SECTIONS else ""
        known = [field.name for field in fields(schema.SECTIONS.get(name, Config))]
        for leaf, leaf_value in value.items() if section else [(name, value)]:
            key = f"{section}{leaf}"
            if leaf not in known:
                candidates = [section + other for other in nearest(leaf, known)]
                yield Problem("config.unknown_key", key, candidates=candidates)
                continue
            try:
                OmegaConf.update(config, key, leaf_value)
                valid[key] = OmegaConf.select(config, key)
            except OmegaConfBaseException:
                expected = _describe_type(key)
                yield Problem("config.wrong_type", key, expected=expected, value=leaf_value)


def _missing_keys(tree: dict[str, Any]) -> Iterator[Problem]:
    for key in schema.all_keys():
        section, _, leaf = key.rpartition(".")
        values = tree.get(section, {}) if section else tree
        if isinstance(values, dict) and values.get(leaf, MISSING) == MISSING:
            yield Problem("config.missing_key", key)


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
    try:
        refuse_name(model.path, model.revision)
        refuse_stage_output(model.path)
        folder = find_local_copy(model.path, model.revision)
        if folder is None and not is_hub_repo(model.path):
            raise missing_folder(model.path)
        if folder is None:
            return
        # What a hub's cache has may be the beginning of a download.
        local = not is_hub_repo(model.path)
        config = inspect_folder(folder).config if local else read_config(folder)
    except UserError as error:
        yield Problem(error.code, "model.path", **error.facts)
    else:
        yield from training_misfits(config, train)


def training_misfits(config: dict[str, Any], train: TrainConfig) -> Iterator[Problem]:
    """Yield the keys that the model of this config.json cannot be trained with."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and train.num_layers > layers:
        yield Problem(
            "config.too_many_layers", "train.num_layers", layers=layers, value=train.num_layers
        )
    if train.method == "full" and is_quantized(config):
        yield Problem("config.quantized", "train.method")
    if train.method == "dora" and (experts := count_experts(config)) > 1:
        yield Problem("config.dora_of_experts", "train.method", experts=experts)
