"""The check of a configuration: all of its problems, each with its file and line."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor.config import schema
from athanor.config.rules import ConfigError, impossible_values, training_misfits
from athanor.config.schema import RUN_ID, Config, DataConfig, ModelConfig, TrainConfig
from athanor.config.values import flatten
from athanor.errors import Problem, UserError, nearest
from athanor.model.folder import inspect_folder, read_config
from athanor.model.source import (
    find_local_copy,
    is_hub_repo,
    missing_folder,
    refuse_name,
    refuse_stage_output,
)
from athanor.paths import Workspace

# Characters of no text: NUL, and half a character that a cut text leaves.
UNREADABLE = re.compile(r"[\x00\ud800-\udfff]")
DEPTH = 8  # lists and names inside each other; no key of ours has more than three


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
    wrong = [*_take_values(tree, config, valid), *_missing_keys(tree)]
    wrong += impossible_values(valid)
    for problem in wrong:
        valid.pop(problem.key, None)
    of_model = {"model.path", "model.revision", "train.num_layers", "train.method", "train.rank"}
    if of_model <= valid.keys():
        wrong += model_misfits(config.model, config.train)
    if valid.get("train.resume_adapter_file") is not None:
        wrong += adapter_misfits(valid["train.resume_adapter_file"])
    if "train.optimizer_config" in valid:
        from athanor.compute import optimizers  # imports mlx, which DVC's Hydra does not need

        wrong += optimizers.optimizer_misfits(flatten(config)["train.optimizer_config"])
    if all(f"data.{field.name}" in valid for field in fields(DataConfig)):
        from athanor.config.data_check import data_misfits  # imports jinja2

        wrong += data_misfits(config.data)
    # A key that was not read, such as one with two values, is no longer missing or unknown.
    named = {problem.key for problem in problems}
    problems = problems + [problem for problem in wrong if problem.key not in named]
    for problem in problems:
        problem.place = problem.place or find_place(problem.key, places)
    if problems:
        raise ConfigError(problems)
    return cast(Config, config)


def find_place(key: str, places: dict[str, str]) -> str | None:
    """Return the place of a key, or else of the key of the schema that it is inside of."""
    return places.get(key) or places.get(".".join(key.split(".")[:2]))


def _take_values(tree: dict[str, Any], config: Any, valid: dict[str, Any]) -> Iterator[Problem]:
    """Put the values of a tree into `config` and `valid`; yield unknown keys and wrong types."""
    for name, value in tree.items():
        if name in schema.SECTIONS and not isinstance(value, dict):
            yield Problem("config.no_section", str(name), value=value)
            continue
        section = f"{name}." if name in schema.SECTIONS else ""
        known = [field.name for field in fields(schema.SECTIONS.get(name, Config))]
        for leaf, leaf_value in value.items() if section else [(name, value)]:
            key = f"{section}{leaf}"
            if leaf not in known:
                candidates = [section + other for other in nearest(str(leaf), known)]
                yield Problem("config.unknown_key", key, candidates=candidates)
                continue
            if leaf_value == MISSING:
                continue
            problems = list(unreadable_values(key, leaf_value)) or _take(config, key, leaf_value)
            if not problems:
                valid[key] = OmegaConf.select(config, key)
            yield from problems


def _take(config: Any, key: str, value: Any) -> list[Problem]:
    """Put a value into `config`; return the problems of its type, by entry where it has names."""
    try:
        OmegaConf.update(config, key, value, merge=False)
        return []
    except (OmegaConfBaseException, ValueError):
        problem = Problem("config.wrong_type", key, expected=_describe_type(key), value=value)
    if not isinstance(value, dict) or not schema.holds_names(key):
        return [problem]
    wrong = []
    for name, entry in value.items():
        try:
            OmegaConf.update(config, key, {name: entry}, merge=False)
        except (OmegaConfBaseException, ValueError):
            expected = _describe_entry(key)
            named = f"{key}.{name}"
            wrong.append(Problem("config.wrong_type", named, expected=expected, value=entry))
    return wrong or [problem]


def unreadable_values(key: str, value: Any, depth: int = 0) -> Iterator[Problem]:
    """Yield a problem for each value inside a value that no key can have, whatever its type."""
    if isinstance(value, dict | list):
        if depth > DEPTH:
            yield Problem("config.nested_too_deep", key, depth=DEPTH)
            return
        names = value if isinstance(value, dict) else range(len(value))
        for name in names:
            inner = f"{key}.{name}" if isinstance(value, dict) else key
            if isinstance(value, dict) and unreadable_text(name):
                yield Problem("config.unreadable_text", inner, value=name)
            yield from unreadable_values(inner, value[name], depth + 1)
    elif isinstance(value, str):
        if value == MISSING and depth:
            yield Problem("config.missing_key", key)
        elif unreadable_text(value):
            yield Problem("config.unreadable_text", key, value=value)
        elif "${" in value:
            yield Problem("config.interpolation", key, value=value)
    elif isinstance(value, int) and value.bit_length() > 64:
        yield Problem("config.over_64_bits", key, bits=value.bit_length())
    elif value is not None and not isinstance(value, bool | int | float):
        yield Problem("config.no_plain_value", key, value=value, kind=type(value).__name__)


def unreadable_text(text: Any) -> bool:
    """Return whether a text has characters that no file, name or database can hold."""
    return isinstance(text, str) and UNREADABLE.search(text) is not None


def _missing_keys(tree: dict[str, Any]) -> Iterator[Problem]:
    for section in ["", *schema.SECTIONS]:
        values = tree.get(section) if section else tree
        if section and values is None and section not in tree:
            yield Problem("config.missing_section", section)
        if not isinstance(values, dict):
            continue
        for field in fields(schema.SECTIONS.get(section, Config)):
            key = f"{section}.{field.name}".lstrip(".")
            if key not in schema.SECTIONS and values.get(field.name, MISSING) == MISSING:
                yield Problem("config.missing_key", key)


def _describe_type(key: str) -> str:
    """Return the type of a key in words."""
    kind = schema.key_type(key)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    or_null = [f"{word} or null" for option, word in words.items() if kind == option | None]
    if kind == list[str] | None:
        return "a list of texts or null"
    return words.get(cast(Any, kind)) or next(iter(or_null), "names with a value each")


def _describe_entry(key: str) -> str:
    """Return the type of the values of a key that maps names, in words."""
    texts = {
        dict[str, str]: "a text",
        dict[str, str | None]: "a text or null",
        dict[str, bool]: "true or false",
        dict[str, list[str]]: "a list of texts",
    }
    return texts.get(schema.key_type(key), "names with a value each")


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
        problem = Problem(error.code, "model.path")
        problem.facts = error.facts
        yield problem
    else:
        yield from training_misfits(config, train)


def adapter_misfits(path: str) -> Iterator[Problem]:
    """Yield a problem where the adapters that a training begins with are gone, or will be."""
    key = "train.resume_adapter_file"
    try:
        refuse_stage_output(path)
    except UserError:
        yield Problem("train.own_adapters", key, path=path)
        return
    except (OSError, ValueError):  # no path at all
        pass
    if Workspace.here().locate(path) is None and not RUN_ID.fullmatch(path):
        yield Problem("runs.no_such_adapters", key, path=path)
