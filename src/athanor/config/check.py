"""Configurations: conf/ composed by Hydra, or params.yaml read again, and all that is wrong there.

Hydra stops at the first mistake. Here a tree is composed without its types first, with overrides
forced in, so that every typo, wrong type and impossible value is found, each with file and line.
"""

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor.config import schema
from athanor.config.schema import Config, ModelConfig, TrainConfig
from athanor.config.values import flatten
from athanor.errors import UserError
from athanor.model.source import (
    describe_missing_folder,
    find_local_copy,
    is_hub_repo,
    is_quantized,
    read_config,
)


class ConfigError(UserError):
    """One or more problems of a configuration, in the order in which they were found."""

    def __init__(self, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"config: {count}; nothing was run\n  " + "\n  ".join(problems))
        self.problems = problems


def check_config(tree: dict[str, Any], places: dict[str, str], problems: list[str]) -> Config:
    """Turns a plain tree into a Config, or raises ConfigError with all that is wrong.

    `places` says where keys got their values; `problems` are those that were found on the way to
    the tree; they are reported with the rest.
    """

    def report(key: str, text: str) -> None:
        problems.append(f"{key} ({places[key]}): {text}" if key in places else f"{key}: {text}")

    config = OmegaConf.structured(Config)
    sound: dict[str, Any] = {}

    def take(key: str, value: Any) -> None:
        try:
            OmegaConf.update(config, key, value)
            sound[key] = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            report(key, f"expected {_kind(key)}, found {value!r}")

    for name, value in tree.items():
        if name == "seed":
            take(name, value)
        elif name not in schema.SECTIONS:
            report(name, f"no such key; {nearest(name, ['seed', *schema.SECTIONS])}")
        elif not isinstance(value, dict):
            report(name, f"expected a section with keys, found {value!r}")
        else:
            known = [field.name for field in fields(schema.SECTIONS[name])]
            for leaf, leaf_value in value.items():
                if leaf in known:
                    take(f"{name}.{leaf}", leaf_value)
                else:
                    report(f"{name}.{leaf}", f"no such key; {nearest(leaf, known, f'{name}.')}")
    for key in schema.all_keys():
        section, _, leaf = key.rpartition(".")
        given = tree.get(section, {}) if section else tree
        if isinstance(given, dict) and given.get(leaf, MISSING) == MISSING:
            problems.append(f"{key}: missing; conf/ gives it no value")
    for key, expected in schema.impossible(sound):
        report(key, f"expected {expected}, found {sound[key]!r}")
    if {"model.path", "model.revision", "train.num_layers", "train.method"} <= sound.keys():
        for key, text in model_misfits(config.model, config.train):
            report(key, text)
    if "train.optimizer_config" in sound:
        from athanor.compute import optimizers  # imports mlx, which DVC's Hydra need not

        for key, text in optimizers.optimizer_misfits(flatten(config)["train.optimizer_config"]):
            report(f"train.optimizer_config.{key}", text)
    if all(f"data.{field.name}" in sound for field in fields(schema.DataConfig)):
        for key, text in _data_misfits(config.data):
            report(f"data.{key}", text)
    if problems:
        raise ConfigError(problems)
    return cast(Config, config)


def _data_misfits(data: schema.DataConfig) -> Iterator[tuple[str, str]]:
    from athanor.config.data_check import CLEANING, check_misfits, format_misfits

    yield from ((f"checks.{name}", text) for name, text in check_misfits(dict(data.checks)))
    yield from format_misfits(data)
    for step in data.clean:
        if step not in CLEANING:
            yield f"clean.{step}", f"no such step; there are {', '.join(CLEANING)}"
    for word, others in data.synonyms.items():
        if not word or not others:
            yield f"synonyms.{word}", "expected a word, and a list of other words for it"


def _kind(key: str) -> str:
    """The type of a key in words."""
    section, _, leaf = key.rpartition(".")
    cls = schema.SECTIONS[section] if section else Config
    kind = next(field.type for field in fields(cls) if field.name == leaf)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    or_null = [f"{word} or null" for option, word in words.items() if kind == option | None]
    if kind == list[str] | None:
        return "a list of texts or null"
    return words.get(cast(Any, kind)) or next(iter(or_null), "names with a value each")


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return "there are " + ", ".join(prefix + other for other in known)


def model_misfits(model: ModelConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields (key, text) for what can't go together, as far as it is known without a network."""
    folder = find_local_copy(model.path, model.revision)
    if folder is not None:
        yield from training_misfits(read_config(folder), train)
    elif not is_hub_repo(model.path):
        yield (
            "model.path",
            f"{describe_missing_folder(model.path)}, and it is no owner/name of a hub",
        )


def training_misfits(config: dict[str, Any], train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields (key, text) for what the model of this config.json can't be trained with."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and train.num_layers > layers:
        yield (
            "train.num_layers",
            f"expected at most the model's {layers} layers or -1 for all, found {train.num_layers}",
        )
    if train.method == "full" and is_quantized(config):
        yield "train.method", "a quantized model can't be trained in full: use lora or dora"
