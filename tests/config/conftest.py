"""A copy of conf/ to change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def conf(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ beside the tiny model, in the current folder."""
    shutil.copytree(repo / "conf", tmp_path / "conf")
    (tmp_path / "models").symlink_to(repo / "models")
    monkeypatch.chdir(tmp_path)
    return Path("conf")
