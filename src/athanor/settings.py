"""Configurations: conf/ composed by Hydra, or params.yaml read again, and all that is wrong there.

Hydra stops at the first mistake. Here a tree is composed without its types first, with overrides
forced in, so that every typo, wrong type and impossible value is found, each with file and line.
"""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console, schema, sources
from athanor.paths import CONF, PARAMS
from athanor.schema import Config


class ConfigError(console.UserError):
    """One or more problems of a configuration, in the order in which they were found."""

    def __init__(self, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"config: {count}; nothing was run\n  " + "\n  ".join(problems))
        self.problems = problems


def compose(conf: Path, overrides: list[str]) -> Config:
    """Composes `conf`/config.yaml with Hydra overrides into a checked configuration.

    Raises:
        ConfigError: with every problem of the files and of the overrides.
    """
    if not (conf / "config.yaml").exists():
        raise console.UserError(
            f"there is no {conf}/config.yaml in {Path.cwd()}: run this in the repository's folder"
        )
    values, chosen, problems = _split(overrides, groups(conf))
    tree, hydra = _compose(conf, "config", ["~schema", *chosen, *values.values()])
    choices = {str(group): str(option) for group, option in hydra["runtime"]["choices"].items()}
    places = _places(conf, choices) | {
        key: f"command line: {text[2:]}" for key, text in values.items()
    }
    return checked(tree, places, problems)


def groups(conf: Path) -> dict[str, list[str]]:
    """The groups of conf/, and their options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }


def sweeper(conf: Path, overrides: list[str]) -> dict[str, Any]:
    """The configuration of Hydra's sweeper, as conf/ and overrides of Hydra's own keys have it.

    Raises:
        ConfigError: where Hydra can't compose it.
    """
    return dict(_compose(conf, "config", ["~schema", *overrides])[1]["sweeper"])


def load(overrides: list[str], params: Path = PARAMS) -> Config:
    """Reads params.yaml for a stage that is run by hand or by DVC, with Hydra overrides of values.

    Raises:
        ConfigError: with every problem; UserError where there is no params.yaml.
    """
    if not params.exists():
        raise console.UserError(
            f"{params} is not there: `uv run python -m athanor.config` writes it from conf/, "
            "`uv run dvc repro --pull` runs everything"
        )
    if not overrides:
        return read(params)
    values, _, problems = _split(overrides, {})
    tree, _ = _compose(params.parent.resolve(), params.stem, list(values.values()))
    places = _lines(params, "") | {key: f"command line: {text[2:]}" for key, text in values.items()}
    return checked(tree, places, problems)


def read(path: Path) -> Config:
    """Reads a file like params.yaml, as it is; also where Hydra is at work, which `load` needs.

    Raises:
        ConfigError: with every problem.
    """
    tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return checked(cast(dict[str, Any], tree), _lines(path, ""), [])


def flat(config: Config) -> dict[str, Any]:
    """The values by dotted key, in the order of the dataclasses."""
    tree = cast(Any, OmegaConf.to_container(cast(Any, config)))
    sections = ((key, *key.partition(".")) for key in schema.all_keys())
    return {key: tree[first][leaf] if leaf else tree[first] for key, first, _, leaf in sections}


def refuse_misfits(config: Config, folder: Path) -> None:
    """Stops before a training whose model can't be trained so, or not exported as is asked.

    Raises:
        ConfigError: with every problem.
    """
    from athanor.export import gguf_file

    model = sources.read_config(folder)
    problems = [f"{key}: {text}" for key, text in sources.training_misfits(model, config.train)]
    if config.fuse.gguf is not None and (why := gguf_file.unsupported(model, folder)):
        problems.append(f"fuse.gguf: {why}; fuse.gguf=null goes without")
    if problems:
        raise ConfigError(problems)


def plain(section: Any) -> Any:
    """A section as its own dataclass: OmegaConf's look-ups cost too much once a row."""
    return OmegaConf.to_object(section)


def say_what_is_not_in_conf(config: Config) -> None:
    """Notes where `dvc repro` runs on with the values of an experiment that was run before it."""
    if not os.environ.get("DVC_STAGE") or os.environ.get("DVC_EXP_NAME"):
        return
    composed = flat(compose(CONF, []))
    other = [f"{key}={value}" for key, value in flat(config).items() if composed[key] != value]
    if other:
        console.warn(
            f"{PARAMS} holds an experiment's values, not those of {CONF}/: {', '.join(other)}; "
            f"`rm {PARAMS} && uv run dvc repro` goes back to {CONF}/"
        )


def _split(
    overrides: list[str], groups: dict[str, list[str]]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Sorts overrides into values (dotted key: Hydra text), choices of groups, and problems.

    Values get Hydra's `++`, so that a mistyped key reaches our check and is reported with the rest.
    """
    values: dict[str, str] = {}
    chosen, problems = [], []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            problems.append(f"command line: {text}: {str(error).splitlines()[0]}")
            continue
        key = override.key_or_group
        if key in groups:
            option = str(override.value())
            if not override.is_delete() and option not in [*groups[key], "None"]:
                problems.append(
                    f"command line: {text}: conf/{key}/ has no {option}.yaml; "
                    f"{_nearest(option, groups[key])}"
                )
            else:
                # Hydra itself takes null for a group in a file only.
                chosen.append(f"~{key}" if option == "None" else text.lstrip("+"))
        elif key in schema.SECTIONS and isinstance(override.value(), str):
            problems.append(
                f"command line: {text}: a whole section is chosen where conf/ is composed: "
                f"`uv run python -m athanor.config {text}` or `uv run dvc exp run -S {text}`"
            )
        elif override.is_sweep_override() or override.is_delete():
            problems.append(f"command line: {text}: expected one value, as in key=value")
        else:
            values[key] = "++" + text.lstrip("+")
    return values, chosen, problems


def _compose(
    folder: Path, name: str, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hydra's composition as a plain tree, and its own part: sweeper, and what each group took."""
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
        hydra = {
            "runtime": {"choices": config.hydra.runtime.choices},
            "sweeper": OmegaConf.to_container(config.hydra.sweeper, resolve=True),
        }
        tree = OmegaConf.to_container(
            OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]), resolve=True
        )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    return cast(dict[str, Any], tree), hydra


def checked(tree: dict[str, Any], places: dict[str, str], problems: list[str]) -> Config:
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
            report(name, f"no such key; {_nearest(name, ['seed', *schema.SECTIONS])}")
        elif not isinstance(value, dict):
            report(name, f"expected a section with keys, found {value!r}")
        else:
            known = [field.name for field in fields(schema.SECTIONS[name])]
            for leaf, leaf_value in value.items():
                if leaf in known:
                    take(f"{name}.{leaf}", leaf_value)
                else:
                    report(f"{name}.{leaf}", f"no such key; {_nearest(leaf, known, f'{name}.')}")
    for key in schema.all_keys():
        section, _, leaf = key.rpartition(".")
        given = tree.get(section, {}) if section else tree
        if isinstance(given, dict) and given.get(leaf, MISSING) == MISSING:
            problems.append(f"{key}: missing; conf/ gives it no value")
    for key, expected in schema.impossible(sound):
        report(key, f"expected {expected}, found {sound[key]!r}")
    if {"model.path", "model.revision", "train.num_layers", "train.method"} <= sound.keys():
        for key, text in sources.misfits(config.model, config.train):
            report(key, text)
    if "train.optimizer_config" in sound:
        from athanor import optimizers  # imports mlx, which DVC's Hydra need not

        for key, text in optimizers.misfits(flat(config)["train.optimizer_config"]):
            report(f"train.optimizer_config.{key}", text)
    if all(f"data.{field.name}" in sound for field in fields(schema.DataConfig)):
        for key, text in _data_misfits(config.data):
            report(f"data.{key}", text)
    if problems:
        raise ConfigError(problems)
    return cast(Config, config)


def _data_misfits(data: schema.DataConfig) -> Iterator[tuple[str, str]]:
    from athanor.data import checks, cleaning, formats

    yield from ((f"checks.{name}", text) for name, text in checks.misfits(dict(data.checks)))
    yield from formats.misfits(data)
    for step in data.clean:
        if step not in cleaning.STEPS:
            yield f"clean.{step}", f"no such step; there are {', '.join(cleaning.STEPS)}"
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


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return "there are " + ", ".join(prefix + other for other in known)


def _places(conf: Path, choices: dict[str, str]) -> dict[str, str]:
    """Where each dotted key gets its value: "file:line", the last of the composition's files."""
    order = sorted(choices, key=lambda group: group == "experiment")
    found: dict[str, str] = {}
    for group in order:
        path = conf / group / f"{choices[group]}.yaml"
        if path.exists():
            found |= _lines(path, group)
    return found | {k: v for k, v in _lines(conf / "config.yaml", "").items() if k not in found}


def _lines(path: Path, package: str) -> dict[str, str]:
    """The "file:line" of each leaf in one YAML file and in the files of its own defaults list."""
    text = path.read_text(encoding="utf-8")
    if re.match(r"#\s*@package\s+_global_", text):
        package = ""
    found: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}".lstrip(".")
            if key.endswith("defaults") and isinstance(value_node, yaml.SequenceNode):
                for item in value_node.value:
                    beside = path.parent / f"{item.value}.yaml"
                    if isinstance(item, yaml.ScalarNode) and package and beside.exists():
                        found.update(_lines(beside, package))
                continue
            found[key] = f"{path}:{key_node.start_mark.line + 1}"
            walk(value_node, key)

    root = yaml.compose(text)
    if root is not None:
        walk(root, package)
    return found
