"""The configuration: composed from conf/ by Hydra, or read from params.yaml.

Hydra stops at the first mistake. Here a tree is composed without its types first, with overrides
forced in, so that every typo, wrong type and impossible value is reported, each with file and line.
"""

import os
import re
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console
from athanor.config import schema
from athanor.config.check import ConfigError, check_config
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.errors import Problem, UserError, nearest
from athanor.paths import Workspace

COMMAND_LINE = "command line"


def compose_config(conf: Path, overrides: list[str]) -> Config:
    """Compose `conf`/config.yaml with Hydra overrides into a checked configuration.

    Raises:
        ConfigError: with all problems of the files and of the overrides.
    """
    if not (conf / "config.yaml").exists():
        raise UserError("config.no_conf", conf=conf, folder=Path.cwd())
    values, options, problems = _split(overrides, config_groups(conf))
    tree, hydra = _compose(conf, "config", ["~schema", *options, *values.values()])
    choices = {str(group): str(option) for group, option in hydra["runtime"]["choices"].items()}
    places = _places(conf, choices) | {
        key: f"{COMMAND_LINE}: {text[2:]}" for key, text in values.items()
    }
    return check_config(tree, places, problems)


def config_groups(conf: Path) -> dict[str, list[str]]:
    """Return the groups of conf/ with their options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }


def multirun_config(conf: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of Hydra's sweeper and launcher, from conf/ and overrides.

    Raises:
        ConfigError: where Hydra cannot compose it.
    """
    hydra = _compose(conf, "config", ["~schema", *overrides])[1]
    return hydra["sweeper"], hydra["launcher"]


def load_config(overrides: list[str]) -> Config:
    """Read params.yaml for a stage, with Hydra overrides of values.

    Raises:
        ConfigError: with all problems.
        UserError: where there is no params.yaml.
    """
    params = Workspace.here().params
    if not params.exists():
        raise UserError("config.no_params", params=params)
    if not overrides:
        return read_params(params)
    values, _, problems = _split(overrides, {})
    tree, _ = _compose(params.parent.resolve(), params.stem, list(values.values()))
    places = _lines(params, "") | {
        key: f"{COMMAND_LINE}: {text[2:]}" for key, text in values.items()
    }
    return check_config(tree, places, problems)


def read_params(path: Path) -> Config:
    """Read a file like params.yaml as it is, without Hydra, which may be in use by a sweep.

    Raises:
        ConfigError: with all problems.
    """
    tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return check_config(cast(dict[str, Any], tree), _lines(path, ""), [])


def warn_if_params_differ_from_conf(config: Config) -> None:
    """Warn where `dvc repro` runs with the values of an earlier experiment."""
    workspace = Workspace.here()
    if not os.environ.get("DVC_STAGE") or os.environ.get("DVC_EXP_NAME"):
        return
    composed = flatten(compose_config(workspace.conf, []))
    changed = [f"{key}={value}" for key, value in flatten(config).items() if composed[key] != value]
    if changed:
        console.warn(
            f"{workspace.params} holds an experiment's values, not those of {workspace.conf}/: "
            f"{', '.join(changed)}; "
            f"`rm {workspace.params} && uv run dvc repro` goes back to {workspace.conf}/"
        )


def unreadable_override(text: str, error: HydraException) -> Problem:
    """Return the problem of an override that Hydra cannot parse."""
    reason = str(error).splitlines()[0]
    return Problem("config.no_override", text, place=COMMAND_LINE, error=reason)


def unknown_option(text: str, group: str, option: str, options: list[str]) -> Problem:
    """Return the problem of an override that selects an option its group does not have."""
    return Problem(
        "config.unknown_option",
        text,
        place=COMMAND_LINE,
        group=group,
        option=option,
        candidates=nearest(option, options),
    )


def _split(
    overrides: list[str], groups: dict[str, list[str]]
) -> tuple[dict[str, str], list[str], list[Problem]]:
    """Sort overrides into values (dotted key: Hydra text), options of groups, and problems.

    Values get Hydra's `++`, so that a mistyped key reaches our check and is reported with the rest.
    """
    values: dict[str, str] = {}
    options: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            problems.append(unreadable_override(text, error))
            continue
        key = override.key_or_group
        if key in groups:
            option = str(override.value())
            if not override.is_delete() and option not in [*groups[key], "None"]:
                problems.append(unknown_option(text, key, option, groups[key]))
            else:
                # Hydra itself takes null for a group only in a file.
                options.append(f"~{key}" if option == "None" else text.lstrip("+"))
        elif key in schema.SECTIONS and isinstance(override.value(), str):
            problems.append(
                Problem("config.option_of_section", text, place=COMMAND_LINE, text=text)
            )
        elif override.is_sweep_override() or override.is_delete():
            problems.append(Problem("config.no_value", text, place=COMMAND_LINE))
        else:
            values[key] = "++" + text.lstrip("+")
    return values, options, problems


def _compose(
    folder: Path, name: str, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Hydra's composition as a plain tree, and its own part: sweeper, launcher, options."""
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = hydra_compose(name, overrides, return_hydra_config=True)
        hydra = {
            "runtime": {"choices": config.hydra.runtime.choices},
            "sweeper": OmegaConf.to_container(config.hydra.sweeper, resolve=True),
            # Not all of it: submitit's names the job, which has no name yet.
            "launcher": {key: config.hydra.launcher.get(key) for key in ("_target_", "n_jobs")},
        }
        tree = OmegaConf.to_container(
            OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]), resolve=True
        )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem("config.not_composed", str(folder), error=reason)]) from error
    return cast(dict[str, Any], tree), hydra


def _places(conf: Path, choices: dict[str, str]) -> dict[str, str]:
    """Return the "file:line" of each dotted key's value: the last of the composition's files."""
    order = sorted(choices, key=lambda group: group == "experiment")
    places = _lines(conf / "config.yaml", "")
    for group in order:
        path = conf / group / f"{choices[group]}.yaml"
        if path.exists():
            places |= _lines(path, group)
    return places


def _lines(path: Path, package: str) -> dict[str, str]:
    """Return the "file:line" of each key in a YAML file and in the files of its defaults list."""
    text = path.read_text(encoding="utf-8")
    if re.match(r"#\s*@package\s+_global_", text):
        package = ""
    places: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}".lstrip(".")
            if key.endswith("defaults") and isinstance(value_node, yaml.SequenceNode):
                for item in value_node.value:
                    beside = path.parent / f"{item.value}.yaml"
                    if isinstance(item, yaml.ScalarNode) and package and beside.exists():
                        places.update(_lines(beside, package))
                continue
            places[key] = f"{path}:{key_node.start_mark.line + 1}"
            walk(value_node, key)

    root = yaml.compose(text)
    if root is not None:
        walk(root, package)
    return places
