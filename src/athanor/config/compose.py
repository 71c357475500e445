"""The configuration: composed from conf/ by Hydra, or read from params.yaml.

Hydra stops at the first mistake. So the files of conf/ are read and followed first, Hydra composes
their values without types, and the values of the command line are put in afterwards: every fault
of a file, typo, wrong type and impossible value is reported, each with its place.
"""

import hashlib
import os
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console
from athanor.config import schema
from athanor.config.check import check_config
from athanor.config.conf_files import ConfFiles, config_groups
from athanor.config.overrides import Overrides, sort_overrides
from athanor.config.rules import ConfigError
from athanor.config.schema import Config
from athanor.config.values import flatten
from athanor.config.yaml_files import MOST_BYTES, FileError, YamlFile, read_yaml
from athanor.errors import Problem, UserError
from athanor.paths import Workspace

# The errors of Hydra's composition; those of Python's come from keys of Hydra itself.
UNCOMPOSABLE = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True)
class Composition:
    """A configuration composed from conf/.

    Attributes:
        files: the files that it was composed from.
        choices: the selected option of each group.
        options: those of the command line, as Hydra takes them.
    """

    config: Config
    files: ConfFiles
    choices: dict[str, str]
    options: list[str]


def compose_config(conf: Path, texts: list[str]) -> Config:
    """Compose `conf`/config.yaml with Hydra overrides into a checked configuration.

    Raises:
        ConfigError: with all problems of the files and of the overrides.
    """
    return compose(conf, texts).config


def compose(conf: Path, texts: list[str]) -> Composition:
    """Compose `conf`/config.yaml as compose_config does, and keep what it was composed from."""
    if not (conf / "config.yaml").exists():
        raise UserError("config.no_conf", conf=conf, folder=Path.cwd())
    overrides = sort_overrides(texts, config_groups(conf))
    files = ConfFiles.follow(conf, overrides.options)
    if files.problems:
        raise ConfigError(files.problems + overrides.problems)
    options = select_options(files, overrides)
    tree, hydra = _compose(conf, options)
    put_values(tree, overrides)
    unresolved = resolve_interpolations(tree)
    choices = {str(group): str(option) for group, option in hydra["runtime"]["choices"].items()}
    places = files.places(choices) | overrides.places
    config = check_config(tree, places, [*overrides.problems, *unresolved])
    return Composition(config, files, choices, options)


def select_options(files: ConfFiles, overrides: Overrides) -> list[str]:
    """Return the selections of options as Hydra takes them, without the types."""
    known = [group for group in overrides.options if group in files.selected]
    options = [
        f"~{group}" if option is None else f"{'' if group in known else '+'}{group}={option}"
        for group, option in overrides.options.items()
        if option is not None or group in known
    ]
    return ["~schema", *options] if files.typed else options


def put_values(tree: dict[str, Any], overrides: Overrides) -> None:
    """Put the values of a command line into a tree; names with values are added to those there."""

    def put(tree: dict[str, Any], name: str, value: Any) -> None:
        former = tree.get(name)
        if isinstance(former, dict) and isinstance(value, dict):
            for inner, inner_value in value.items():
                put(former, inner, inner_value)
        else:
            tree[name] = value

    for key, value in overrides.values.items():
        *sections, leaf = key.split(".")
        inner = tree
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        put(inner, leaf, value)


def resolve_interpolations(tree: dict[str, Any], among: set[str] | None = None) -> list[Problem]:
    """Replace each ${key} in a tree by the value of that key; return the problems of others.

    A key that is named so has a value without an interpolation: then none leads in a circle, and
    no text grows without end.

    Args:
        among: the keys whose values may have them, None for all.
    """
    open_values = [
        (section, leaf)
        for section in ["", *schema.SECTIONS]
        for leaf, value in _items(tree.get(section) if section else tree)
        if (section or leaf not in schema.SECTIONS) and "${" in repr(value)
    ]
    problems = []
    for section, leaf in open_values:
        key = f"{section}.{leaf}".lstrip(".")
        if among is not None and key not in among:
            continue
        try:
            config = OmegaConf.create(tree)
            for other_section, other in open_values:
                if (other_section, other) != (section, leaf):
                    name = f"{other_section}.{other}".lstrip(".")
                    OmegaConf.update(config, name, "???", merge=False)
            resolved = OmegaConf.select(config, key)
            if OmegaConf.is_config(resolved):
                resolved = OmegaConf.to_container(resolved, resolve=True)
        except (OmegaConfBaseException, RecursionError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(Problem("config.no_interpolation", key, error=reason))
        else:
            (tree[section] if section else tree)[leaf] = resolved
    return problems


def _items(section: Any) -> list[tuple[Any, Any]]:
    return list(section.items()) if isinstance(section, dict) else []


def multirun_config(conf: Path, texts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of Hydra's sweeper and launcher, from conf/ and overrides.

    Raises:
        ConfigError: where Hydra cannot compose it.
    """
    hydra = _compose(conf, ["~schema", *texts])[1]
    return hydra["sweeper"], hydra["launcher"]


def load_config(texts: list[str]) -> Config:
    """Read params.yaml for a stage, with Hydra overrides of values.

    Raises:
        ConfigError: with all problems.
        UserError: where there is no params.yaml, or it cannot be read.
    """
    workspace = Workspace.here()
    params = workspace.params
    if not os.path.lexists(params):
        raise UserError("config.no_params", params=params)
    groups = config_groups(workspace.conf)
    overrides = sort_overrides(texts, groups, selectable=False)
    file = read_params_file(params)
    put_values(file.tree, overrides)
    unresolved = resolve_interpolations(file.tree, set(overrides.values))
    return check_config(
        file.tree, _places(file) | overrides.places, [*overrides.problems, *unresolved]
    )


def read_params(path: Path) -> Config:
    """Read a file like params.yaml as it is.

    Raises:
        ConfigError: with all problems.
        UserError: where it cannot be read.
    """
    file = read_params_file(path)
    return check_config(file.tree, _places(file), [])


def read_params_file(path: Path) -> YamlFile:
    """Read a file like params.yaml, unchecked.

    Raises:
        UserError: where it is not YAML with keys and values.
    """
    try:
        file = read_yaml(path)
    except FileError as error:
        raise UserError("config.invalid_params", params=path, error=error) from error
    if not isinstance(file.tree, dict):
        problem = Problem("config.no_mapping", f"{path}:1", value=file.tree)
        raise UserError("config.invalid_params", params=path, error=problem)
    return file


def _places(file: YamlFile) -> dict[str, str]:
    return {key: f"{file.path}:{line}" for key, line in file.lines.items()}


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


@dataclass(frozen=True)
class _Contents:
    """The contents of conf/: equal for folders of which Hydra composes the same."""

    digest: str
    folder: Path = field(compare=False)

    @classmethod
    def read(cls, folder: Path) -> "_Contents":
        hashed = hashlib.sha256()
        for parent, _, names in sorted(os.walk(folder)):
            for path in (Path(parent, name) for name in sorted(names) if name.endswith(".yaml")):
                content = b""
                with suppress(OSError):  # of a file that no defaults list leads to
                    if path.is_file() and path.stat().st_size <= MOST_BYTES:
                        content = path.read_bytes()
                hashed.update(repr((path.relative_to(folder), content)).encode())
        return cls(hashed.hexdigest(), folder)


def _compose(folder: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Hydra's composition as a plain tree, and its own part: sweeper, launcher, options.

    Interpolations in the tree are left as they are.
    """
    return deepcopy(_compose_once(_Contents.read(folder), tuple(overrides)))


@lru_cache(maxsize=16)  # a sweep composes the same options with each of its values
def _compose_once(
    contents: _Contents, overrides: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = contents.folder
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = hydra_compose("config", [*overrides], return_hydra_config=True)
        hydra = {
            "runtime": {"choices": OmegaConf.to_container(config.hydra.runtime.choices)},
            "sweeper": OmegaConf.to_container(config.hydra.sweeper, resolve=True),
            # Not all of it: submitit's names the job, which has no name yet.
            "launcher": {key: config.hydra.launcher.get(key) for key in ("_target_", "n_jobs")},
        }
        tree = OmegaConf.to_container(
            OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        )
    except UNCOMPOSABLE as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem("config.not_composed", str(folder), error=reason)]) from error
    return cast(dict[str, Any], tree), hydra
