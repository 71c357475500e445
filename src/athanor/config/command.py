"""The command line of a stage: its overrides, and the options that print instead of running.

`--help` prints the keys of a command with their values and comments from conf/; `--cfg` and
`--info` print what Hydra prints for them.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from athanor import console
from athanor.config.compose import Composition, compose, load_config
from athanor.config.conf_files import config_groups
from athanor.config.overrides import parse_override, unreadable_override
from athanor.config.rules import ConfigError
from athanor.config.values import flatten
from athanor.errors import UserError
from athanor.paths import Workspace

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
COLUMN = 40  # where comments begin


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError("config.invalid_flag", error=message)


def read_overrides(doc: str | None, keys: tuple[str, ...], *, composes: bool = False) -> list[str]:
    """Return the overrides of this process's command line, or print what it asks for and exit.

    Args:
        doc: the command's docstring, for `--help`.
        keys: the keys and sections that the command reads.
        composes: whether it composes conf/, and does not read params.yaml.

    Raises:
        UserError: for an unknown option.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-c", "--cfg", choices=CFG)
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=INFO)
    parser.add_argument("--version", action="store_true")
    given, texts = parser.parse_known_args()
    if given.help:
        _print_help(doc, keys, texts, composes)
    elif given.version:
        print(f"athanor {version('athanor')}")
    elif given.cfg or given.info:
        composition = compose(Workspace.here().conf, [*_without_sweeps(texts)] if composes else [])
        if given.cfg:
            config = composition.config if composes else load_config(texts)
            _print_config(composition, config, given.cfg)
        else:
            _print_info(composition, given.info)
    else:
        flags = [text for text in texts if text.startswith("-")]
        if flags:
            raise ConfigError([unreadable_override(flag, HydraException()) for flag in flags])
        return texts
    sys.exit(0)


def _without_sweeps(texts: list[str]) -> list[str]:
    """Return the overrides of a sweep's command that hold for all of its trials."""
    fixed = []
    for text in texts:
        try:
            override = parse_override(text)
        except HydraException:
            fixed.append(text)  # it is refused where it is read
            continue
        hydra = override.key_or_group.partition("/")[0].partition(".")[0] == "hydra"
        if not override.is_sweep_override() and not hydra:
            fixed.append(text)
    return fixed


def _print_config(composition: Composition, config: Any, kind: str) -> None:
    """Print the configuration as YAML, or Hydra's own, or both."""
    if kind != "job":
        with initialize_config_dir(str(composition.files.conf.resolve()), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.show_cfg("config", composition.options, "hydra", None)
    if kind != "hydra":
        sys.stdout.write(OmegaConf.to_yaml(config))


def _print_info(composition: Composition, info: str) -> None:
    with initialize_config_dir(str(composition.files.conf.resolve()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.show_info(info, "config", composition.options)


def _print_help(doc: str | None, keys: tuple[str, ...], texts: list[str], composes: bool) -> None:
    print((doc or "").strip())
    print(
        "\nArguments are overrides, key=value. Others print something and run nothing:\n"
        "  -h, --help          this page\n"
        f"  -c, --cfg KIND      the configuration as YAML: {', '.join(CFG)}\n"
        f"  -i, --info [KIND]   how it is composed: {', '.join(INFO)}\n"
        "  --version           the version of Athanor"
    )
    conf = Workspace.here().conf
    try:
        composition = compose(conf, [*_without_sweeps(texts)] if composes else [])
    except UserError as error:
        print(f"\nThe keys cannot be listed: {error}")
        return
    if composes:
        print(f"\nOptions of {conf}/ (group=option; the first is selected):")
        options = {group: _options(group, conf, composition) for group in config_groups(conf)}
        _print_columns([(group, ", ".join(names)) for group, names in options.items()])
    print(f"\nKeys, with their values in {conf}/:")
    _print_columns([*_describe_keys(composition, keys)])


def _options(group: str, conf: Path, composition: Composition) -> list[str]:
    selected = composition.choices.get(group, "None")
    others = [option for option in config_groups(conf)[group] if option != selected]
    return [selected if selected != "None" else "null", *others]


def _describe_keys(composition: Composition, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return each key with its value, as an override, and its comment."""
    comments = composition.files.comments(composition.choices)
    described = []
    for key, value in flatten(composition.config).items():
        if not f"{key}.".startswith(tuple(f"{name.rstrip('.')}." for name in keys)):
            continue
        entries = dict(_leaves(key, value))
        if key not in entries and key in comments:
            described.append((f"{key}:", comments[key]))
        for name, entry in entries.items():
            text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
            shown = text.encode("unicode_escape").decode() if not text.isprintable() else text
            described.append((f"{name}={shown}", comments.get(name, "")))
    return described


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values inside a value by dotted key."""
    if isinstance(value, dict) and value:
        for name, entry in value.items():
            yield from _leaves(f"{key}.{name}", entry)
    else:
        yield key, value


def _print_columns(rows: list[tuple[str, str]]) -> None:
    """Print texts with comments beside them, below where the text is long."""
    for text, comment in rows:
        lines = textwrap.wrap(comment, console.out.width - COLUMN) or [""]
        if len(text) + 2 < COLUMN - 1:
            print(f"  {text:{COLUMN - 2}}{lines.pop(0)}".rstrip())
        else:
            print(f"  {text}")
        for line in filter(None, lines):
            print(f"{'':{COLUMN}}{line}")
