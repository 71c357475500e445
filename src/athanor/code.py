"""The imports of modules, and a digest of their code without docstrings and comments."""

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

SRC = Path(__file__).parents[1]
# Rooms that check, show or record, and decide no byte of a stage's output.
NO_OUTPUT = (
    *("athanor", "code", "config", "console", "errors", "locks", "paths", "runs"),
    *("startup", "switches"),
)


def digest_code(modules: Iterable[str]) -> str:
    """Return the sha256 of modules and of all that they import of ours, rooms in NO_OUTPUT aside.

    It covers syntax trees: rewording a docstring or a comment, or reformatting, leaves it as it is.
    Of a tree it takes the fields that have a value, which are the same in Python 3.11 to 3.13, as
    ast.dump's text is not: a training can resume under another Python.
    """
    total = hashlib.sha256()
    for name in sorted(find_imports(modules)):
        total.update(f"{name} {_read(name)[1]}\n".encode())
    return total.hexdigest()


def find_imports(modules: Iterable[str]) -> set[str]:
    """Return modules and all that they import of ours, rooms in NO_OUTPUT aside."""
    todo, reached = list(modules), set[str]()
    while todo:
        name = todo.pop()
        if name not in reached and room(name) not in NO_OUTPUT:
            reached.add(name)
            todo += _read(name)[0]
    return reached


def read_imports() -> dict[str, set[str]]:
    """Return the modules of ours that each of them imports, by their dotted names."""
    paths = [path.relative_to(SRC) for path in sorted((SRC / "athanor").rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: _read(name)[0] - {name} for name in names}


def room(module: str) -> str:
    """Return the room of a module: a package of athanor, a flat module, or `athanor` itself."""
    return ([*module.split("."), "athanor"])[1]


def module_path(name: str) -> Path:
    """Return the file of one of our modules, or of a package."""
    path = SRC.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _read(name: str) -> tuple[set[str], str]:
    """Return the modules of ours that a module imports, and the digest of its syntax tree."""
    return _parse(module_path(name).read_bytes())


@lru_cache(256)
def _parse(content: bytes) -> tuple[set[str], str]:
    tree = ast.parse(content)
    imports = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from athanor.chat import templates` uses nothing of the package's own file.
            imports |= {name for name in below if _is_ours(name)} or {node.module}
    digest = hashlib.sha256(repr(_fields(tree)).encode()).hexdigest()
    return set(filter(_is_ours, imports)), digest


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == "athanor" and module_path(name).is_file()


def _fields(node: Any) -> Any:
    """Return a tree as nested tuples, without positions, empty fields and bare strings."""
    if isinstance(node, list):
        return tuple(_fields(item) for item in node if not _is_text(item))
    if isinstance(node, ast.AST):
        values = ((name, _fields(value)) for name, value in ast.iter_fields(node))
        return type(node).__name__, *(pair for pair in values if pair[1] not in (None, ()))
    return node


def _is_text(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
