"""Every package that the code imports is declared, with the version that is installed."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def declared(repo: Path) -> dict[str, Requirement]:
    """The requirements of the project and of its extras by name."""
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def imported_packages(path: Path) -> set[str]:
    """Return the top-level names of a file's absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


def test_imported_packages_are_declared(repo: Path, declared: dict[str, Requirement]) -> None:
    ours = {path.stem for path in (repo / "src").iterdir()}
    distributions = packages_distributions()
    undeclared = {
        f"{path.relative_to(repo)}: {package}"
        for path in (repo / "src").rglob("*.py")
        for package in imported_packages(path) - ours - sys.stdlib_module_names
        if not {canonicalize_name(name) for name in distributions[package]} & declared.keys()
    }
    assert undeclared == set()


def test_installed_versions_are_the_declared_ones(declared: dict[str, Requirement]) -> None:
    for name, requirement in declared.items():
        assert str(requirement.specifier) == f"=={version(name)}", name
