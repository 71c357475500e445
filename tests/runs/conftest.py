"""A git repository of code."""

from pathlib import Path

import pytest

from support.records import git


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository with a commit."""
    folder = tmp_path / "tree"
    for name, text in (
        ("src/athanor/a.py", "one = 1\n"),
        ("src/athanor/b.py", "two = 2\n"),
        ("src/athanor/staged.py", "three = 3\n"),
        ("pyproject.toml", "[project]\n"),
        ("README.md", "text\n"),
        (".gitignore", "__pycache__/\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-qm", "One")
    return folder
