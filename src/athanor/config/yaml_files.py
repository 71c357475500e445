"""YAML files as plain values: each is read whole, within limits, and every fault has its line."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.plugins.config_source import ConfigSource
from omegaconf._utils import get_yaml_loader

from athanor.errors import Problem

# A table of synonyms may be long; a file of more than this is no configuration.
MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
DEPTH = 50
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Python's names for the encodings that Chinese and Windows editors write, the strictest first.
ENCODINGS = ("utf-16", "gb18030", "cp1252", "latin-1")


@dataclass(frozen=True)
class YamlFile:
    """A YAML file.

    Attributes:
        tree: its plain value.
        lines: the line of each dotted key in it, from 1.
        comments: the comment behind or above each dotted key that has one.
        package: the section that Hydra puts its keys into, None for that of its folder.
    """

    path: Path
    tree: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    package: str | None = None


class FileError(Exception):
    """A fault of a file, as a problem whose key is "file:line"."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


def read_yaml(path: Path) -> YamlFile:
    """Read a file.

    Raises:
        FileError: where it is no regular file, no UTF-8, no YAML, or too large.
    """
    text = _read_text(path)
    try:
        loader = get_yaml_loader()(text)
        root = loader.get_single_node()
        if root is None:
            return YamlFile(path, package=_package(path, text))
        _refuse_expansion(path, root)
        tree = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise FileError(
            Problem("config.invalid_yaml", f"{path}:{line}", error=error.problem)
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character U+{error.character:04X}"
        raise FileError(Problem("config.invalid_yaml", f"{path}:{line}", error=reason)) from error
    except RecursionError as error:
        raise FileError(Problem("config.nested_too_deep", str(path), depth=DEPTH)) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise FileError(Problem("config.invalid_yaml", str(path), error=error)) from error
    lines = dict(_lines(root, ""))
    return YamlFile(path, tree, lines, _comments(text, lines), _package(path, text))


def _read_text(path: Path) -> str:
    try:
        # Opening a pipe would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            kind = os.fstat(file.fileno())
            if not stat.S_ISREG(kind.st_mode):
                raise FileError(
                    Problem("config.not_regular", str(path), error="it is not a regular file")
                )
            if kind.st_size > MOST_BYTES:
                size = kind.st_size
                raise FileError(
                    Problem("config.file_too_large", str(path), size=size, most=MOST_BYTES)
                )
            content = file.read()
    except OSError as error:
        raise FileError(Problem("config.not_regular", str(path), error=error.strerror)) from error
    if content.startswith(BYTE_ORDER_MARK):
        raise FileError(Problem("config.byte_order_mark", f"{path}:1"))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        encoding = next(name for name in ENCODINGS if _decodes(content, name))
        raise FileError(
            Problem("config.not_utf8", f"{path}:{line}", line=line, encoding=encoding.upper())
        ) from error


def _decodes(content: bytes, encoding: str) -> bool:
    if encoding == "utf-16" and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return False
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _refuse_expansion(path: Path, root: yaml.Node) -> None:
    """Raise FileError where a document is too deep, or its aliases stand for too much."""
    counts: dict[int, int | None] = {}  # by node; None for those that are being counted

    def count(node: yaml.Node, depth: int) -> int:
        line = node.start_mark.line + 1
        if depth > DEPTH:
            raise FileError(Problem("config.nested_too_deep", f"{path}:{line}", depth=DEPTH))
        if id(node) in counts:
            known = counts[id(node)]
            if known is None:
                raise FileError(
                    Problem("config.invalid_yaml", f"{path}:{line}", error="it contains itself")
                )
            return known
        counts[id(node)] = None
        total = 1
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            for each in child if isinstance(child, tuple) else (child,):
                total += count(each, depth + 1)
        counts[id(node)] = total
        if total > MOST_VALUES:
            raise FileError(Problem("config.expands", f"{path}:{line}", most=MOST_VALUES))
        return total

    count(root, 0)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the line of each dotted key below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}".lstrip(".")
            yield name, key.start_mark.line + 1
            yield from _lines(value, name)


def _comments(text: str, lines: dict[str, int]) -> dict[str, str]:
    """Return the comments behind keys, or else those on the lines above them."""
    source, comments = text.splitlines(), {}
    for key, line in lines.items():
        behind = source[line - 1].partition(" # ")[2]
        above: list[str] = []
        while line - 2 - len(above) >= 0 and source[line - 2 - len(above)].lstrip().startswith("#"):
            above.insert(0, source[line - 2 - len(above)].lstrip(" #"))
        if comment := behind or " ".join(text for text in above if "@package" not in text):
            comments[key] = comment.strip()
    return comments


def _package(path: Path, text: str) -> str | None:
    """Return the package that the first lines of a file name, as Hydra reads them."""
    try:
        return ConfigSource._get_header_dict(text[:512])["package"]
    except ValueError as error:
        raise FileError(Problem("config.invalid_yaml", f"{path}:1", error=error)) from error
