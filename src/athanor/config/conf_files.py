"""The files of conf/, followed from config.yaml through the defaults lists before Hydra does so.

Hydra stops at the first fault and names it in its own terms. Here the files are read first, and
each fault has its file and line.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from athanor.config import schema
from athanor.config.overrides import unknown_option
from athanor.config.yaml_files import FileError, YamlFile, read_yaml
from athanor.errors import Problem

# Groups that are no folders of conf/: Hydra's own, and the types of src/athanor/config/schema.py.
NOT_IN_CONF = ("hydra", "schema")


@dataclass
class ConfFiles:
    """The files that a composition reads, in the order in which it first comes to them.

    Attributes:
        conf: the folder.
        chosen: the options that the command line selects, by group; None deselects it.
        files: by path.
        typed: whether that list has the types, which Hydra would stop at.
        selected: the options that the defaults list of config.yaml selects, by group.
        problems: the faults of files and of their defaults lists.
    """

    conf: Path
    chosen: dict[str, str | None]
    files: dict[Path, YamlFile] = field(default_factory=dict)
    typed: bool = False
    selected: dict[str, str | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def follow(cls, conf: Path, chosen: dict[str, str | None]) -> "ConfFiles":
        """Read config.yaml and all that its defaults list and `chosen` lead to."""
        found = cls(conf, chosen)
        found._visit(conf / "config.yaml", "", [])
        for group, option in chosen.items():
            if option is not None and group not in found.selected:
                found._visit(conf / group / f"{option}.yaml", group, [])
        return found

    def places(self, choices: dict[str, str]) -> dict[str, str]:
        """Return the "file:line" of each key's value: that of the composition's last file.

        Args:
            choices: the options that were composed, by group.
        """
        places: dict[str, str] = {}
        for file, group in self._composed(choices):
            places |= {
                key: f"{file.path}:{line}" for key, line in _in_package(file, group, file.lines)
            }
        return places

    def comments(self, choices: dict[str, str]) -> dict[str, str]:
        """Return the comment of each key that has one; a file without keeps an earlier file's."""
        comments: dict[str, str] = {}
        for file, group in self._composed(choices):
            comments |= dict(_in_package(file, group, file.comments))
        return comments

    def _composed(self, choices: dict[str, str]) -> list[tuple[YamlFile, str]]:
        """Return the composed files and their groups; experiments come last."""
        order = sorted(choices, key=lambda group: group == "experiment")
        paths = [(self.conf / "config.yaml", "")]
        for group in order:
            paths += [(path, group) for path in self._bases(group, choices[group], [])]
        return [(self.files[path], group) for path, group in paths if path in self.files]

    def _bases(self, group: str, option: str, above: list[Path]) -> list[Path]:
        """Return the file of an option, behind those beside it that its defaults list names."""
        path = self.conf / group / f"{option}.yaml"
        if path not in self.files or path in above:
            return []
        names = [item for item in _defaults(self.files[path]) if isinstance(item, str)]
        bases = [self._bases(group, name, [*above, path]) for name in names]
        return [*(base for several in bases for base in several), path]

    def _visit(self, path: Path, group: str, above: list[Path]) -> None:
        if path in above:
            files = " -> ".join(map(str, [*above[above.index(path) :], path]))
            line = self.files[above[-1]].lines.get("defaults")
            where = f"{above[-1]}:{line}"
            self.problems.append(Problem("config.circular_defaults", where, files=files))
            return
        if path in self.files:
            return
        try:
            file = self.files[path] = read_yaml(path)
        except FileError as error:
            self.problems.append(error.problem)
            return
        if file.tree is not None and not isinstance(file.tree, dict):
            self.problems.append(Problem("config.no_mapping", f"{path}:1", value=file.tree))
            return
        self._refuse_own_section(file, group)
        where = f"{path}:{file.lines.get('defaults', 1)}"
        defaults = (file.tree or {}).get("defaults", [])
        if not isinstance(defaults, list):
            self.problems.append(Problem("config.invalid_defaults", where, value=defaults))
            return
        for item in defaults:
            self._follow(item, file, group, [*above, path], where)

    def _refuse_own_section(self, file: YamlFile, group: str) -> None:
        """Add a problem where the keys of a file are in a section that is not of the schema."""
        section = group.split("/")[0]
        if not section or section in schema.SECTIONS or file.package is not None:
            return
        if set(file.tree or {}) - {"defaults"}:
            self.problems.append(Problem("config.no_package", f"{file.path}:1", group=group))

    def _follow(self, item: Any, file: YamlFile, group: str, above: list[Path], where: str) -> None:
        """Visit the files of an item of a defaults list."""
        if isinstance(item, str):
            if item != "_self_" and "${" not in item:
                self._select(group, item, above, where)
            return
        if not isinstance(item, dict) or len(item) != 1:
            self.problems.append(Problem("config.invalid_defaults", where, value=item))
            return
        [(key, options)] = item.items()
        *words, name = str(key).split()
        name = name.split("@")[0]
        name = name.lstrip("/") if name.startswith("/") or not group else f"{group}/{name}"
        if name.split("/")[0] in NOT_IN_CONF:
            self.typed = self.typed or name == "schema"
            return
        if not above[1:]:
            self.selected[name] = options if isinstance(options, str) else None
        if name in self.chosen:
            options = self.chosen[name]
        for option in options if isinstance(options, list) else [options]:
            if isinstance(option, str) and "${" not in option:
                self._select(name, option, above, where, optional="optional" in words)
            elif option is not None and not isinstance(option, str):
                self.problems.append(Problem("config.invalid_defaults", where, value=item))

    def _select(
        self, group: str, option: str, above: list[Path], where: str, *, optional: bool = False
    ) -> None:
        if option.startswith("/"):
            group, _, option = option.lstrip("/").rpartition("/")
        path = self.conf / group / f"{option.removesuffix('.yaml')}.yaml"
        if not path.exists() and not path.is_symlink():
            if optional:
                return
            options = config_groups(self.conf).get(group, [])
            key = f"{group}: {option}" if group else option
            self.problems.append(unknown_option(key, group, option, options, place=where))
            return
        self._visit(path, group, above)


def _defaults(file: YamlFile) -> list[Any]:
    defaults = file.tree.get("defaults") if isinstance(file.tree, dict) else None
    return defaults if isinstance(defaults, list) else []


def _in_package(file: YamlFile, group: str, named: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return what is known of a file's keys by their names in the configuration."""
    package = group if file.package is None else file.package.removeprefix("_global_")
    return [
        (f"{package}.{key}".lstrip("."), value)
        for key, value in named.items()
        if key.split(".")[0] != "defaults"
    ]


def config_groups(conf: Path) -> dict[str, list[str]]:
    """Return the groups of conf/ with their options."""
    groups: dict[str, list[str]] = {}
    for folder, _, names in sorted(os.walk(conf)):
        options = sorted(Path(name).stem for name in names if name.endswith(".yaml"))
        group = Path(folder).relative_to(conf).as_posix()
        if options and group != ".":
            groups[group] = options
    return groups
