"""A copy of this repository to work in: a git and DVC repository of its own, driven by commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from support import mlflow_store, warm


class Workspace:
    """A clone of this repository in a folder of its own, driven by commands."""

    def __init__(self, folder: Path, warm: bool = True) -> None:
        self.folder = folder
        self.warm = warm  # whether its commands are started by support.warm

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command and returns what it printed; a failure shows all of it."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def env(self) -> dict[str, str]:
        """The environment of its commands, which run its own code and not the installed one."""
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
        if self.warm:
            programs.insert(0, str(warm.programs()))
        return os.environ | {
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": str(self.folder / "src"),
            "SHELL": "/bin/sh",
        }

    def dvc(self, *arguments: str) -> list[str]:
        """Runs dvc and returns the stages that it ran, in order."""
        printed = self.run("dvc", *arguments)
        return [line.split("'")[1] for line in printed.splitlines() if "Running stage '" in line]

    def edit(self, path: Path, old: str, new: str) -> None:
        text = (self.folder / path).read_text(encoding="utf-8")
        assert old in text
        (self.folder / path).write_text(text.replace(old, new), encoding="utf-8")

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text(encoding="utf-8"))

    def predictions(self) -> list[dict[str, Any]]:
        path = self.folder / "artifacts/test/predictions.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def params(self) -> Any:
        return yaml.safe_load((self.folder / "params.yaml").read_text(encoding="utf-8"))

    def mlflow_run(self, run_id: str | None = None) -> Any:
        run_id = run_id or self.json("artifacts/train/run.json")["run_id"]
        return mlflow_store.connect(self.folder).get_run(run_id)

    def metric_steps(self, key: str) -> list[int]:
        """The iterations at which the training's run has a metric."""
        run_id = self.json("artifacts/train/run.json")["run_id"]
        return [step for step, _ in mlflow_store.read_metric(self.folder, run_id, key)]

    def copy(self, folder: Path) -> "Workspace":
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace(folder)

    def cold(self) -> "Workspace":
        """Return the same workspace, with processes that start as a person's do."""
        return Workspace(self.folder, warm=False)


def of_the_repository(repo: Path, folder: Path) -> Workspace:
    """What a fresh clone of this repository would be if it were committed as it is."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (repo / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repo / name, folder / name)
    # As it was committed: what an experiment left in it is no default.
    shown = ["git", "show", "HEAD:params.yaml"]
    params = subprocess.run(shown, cwd=repo, capture_output=True, check=True).stdout
    (folder / "params.yaml").write_bytes(params)
    clone = Workspace(folder)
    clone.run("git", "init", "-q", "-b", "main")
    for key, value in (("user.name", "Tester"), ("user.email", "tester@localhost")):
        clone.run("git", "config", key, value)
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "The repository as it is")
    return clone
