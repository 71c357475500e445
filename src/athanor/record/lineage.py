"""What a run was made from, so that it can be made again: code, data, libraries."""

import getpass
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from athanor import __version__


def tags() -> dict[str, str]:
    """Tags that say which code, data and libraries a run was made with."""
    found = {
        "mlflow.user": _user(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"athanor.{Path(sys.argv[0]).stem}",
        "athanor.version": __version__,
        "mlx.version": version("mlx"),
        "mlx_lm.version": version("mlx-lm"),
    }
    commit = _git("rev-parse", "HEAD")
    if commit:
        outputs = (":(exclude)params.yaml", ":(exclude)dvc.lock")
        found["mlflow.source.git.commit"] = commit
        found["git.dirty"] = str(bool(_git("status", "--porcelain", "--", ".", *outputs))).lower()
    tracked = Path("data.dvc")
    if tracked.exists():
        found["dvc.data"] = yaml.safe_load(tracked.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if experiment := os.environ.get("DVC_EXP_NAME"):
        found["dvc.experiment"] = experiment
    return found


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return ""
