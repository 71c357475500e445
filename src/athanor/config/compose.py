"""Configurations: conf/ composed by Hydra, or params.yaml read again, and all that is wrong there.

Hydra stops at the first mistake. Here a tree is composed without its types first, with overrides
forced in, so that every typo, wrong type and impossible value is found, each with file and line.
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
from athanor.config.check import ConfigError, check_config, nearest
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.errors import UserError
from athanor.paths import Workspace


def compose_config(conf: Path, overrides: list[str]) -> Config:
    """Composes `conf`/config.yaml with Hydra overrides into a checked configuration.

    Raises:
        ConfigError: with every problem of the files and of the overrides.
    """
    if not (conf / "config.yaml").exists():
        raise UserError(
            f"there is no {conf}/config.yaml in {Path.cwd()}: run this in the repository's folder"
        )
    values, chosen, problems = _split(overrides, config_groups(conf))
    tree, hydra = _compose(conf, "config", ["~schema", *chosen, *values.values()])
    choices = {str(group): str(option) for group, option in hydra["runtime"]["choices"].items()}
    places = _places(conf, choices) | {
        key: f"command line: {text[2:]}" for key, text in values.items()
    }
    return check_config(tree, places, problems)


def config_groups(conf: Path) -> dict[str, list[str]]:
    """The groups of conf/, and their options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir()
    }


def multirun_config(conf: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of Hydra's sweeper and launcher, from conf/ and overrides.

    Raises:
        ConfigError: where Hydra can't compose it.
    """
    hydra = _compose(conf, "config", ["~schema", *overrides])[1]
    return hydra["sweeper"], hydra["launcher"]


def load_config(overrides: list[str], params: Path | None = None) -> Config:
    """Reads params.yaml for a stage that is run by hand or by DVC, with Hydra overrides of values.

    Raises:
        ConfigError: with every problem; UserError where there is no params.yaml.
    """
    params = params or Workspace.here().params
    if not params.exists():
        raise UserError(
            f"{params} is not there: `uv run python -m athanor.config` writes it from conf/, "
            "`uv run dvc repro --pull` runs everything"
        )
    if not overrides:
        return read_params(params)
    values, _, problems = _split(overrides, {})
    tree, _ = _compose(params.parent.resolve(), params.stem, list(values.values()))
    places = _lines(params, "") | {key: f"command line: {text[2:]}" for key, text in values.items()}
    return check_config(tree, places, problems)


def read_params(path: Path) -> Config:
    """Reads a file like params.yaml, as it is; also where Hydra is at work, which `load` needs.

    Raises:
        ConfigError: with every problem.
    """
    tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return check_config(cast(dict[str, Any], tree), _lines(path, ""), [])


def warn_if_params_differ_from_conf(config: Config) -> None:
    """Notes where `dvc repro` runs on with the values of an experiment that was run before it."""
    workspace = Workspace.here()
    if not os.environ.get("DVC_STAGE") or os.environ.get("DVC_EXP_NAME"):
        return
    composed = flatten(compose_config(workspace.conf, []))
    other = [f"{key}={value}" for key, value in flatten(config).items() if composed[key] != value]
    if other:
        console.warn(
            f"{workspace.params} holds an experiment's values, not those of {workspace.conf}/: "
            f"{', '.join(other)}; "
            f"`rm {workspace.params} && uv run dvc repro` goes back to {workspace.conf}/"
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
                    f"{nearest(option, groups[key])}"
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
            # Not all of it: submitit's names the job, which has no name yet.
            "launcher": {key: config.hydra.launcher.get(key) for key in ("_target_", "n_jobs")},
        }
        tree = OmegaConf.to_container(
            OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]), resolve=True
        )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    return cast(dict[str, Any], tree), hydra


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
