"""Runs in the tracking store and their records, and git repositories."""

import subprocess
from pathlib import Path
from typing import Any

from athanor.runs import tracking_store
from athanor.runs.compare import RunRecord


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def create_run(**settings: Any) -> str:
    """Create a run in the experiment; return its id."""
    client = tracking_store.connect()
    experiment = tracking_store.ensure_experiment(client, tracking_store.EXPERIMENT)
    return str(client.create_run(experiment, **settings).info.run_id)


def make_record(folder: Path, **tags: str) -> RunRecord:
    """Return the record of a finished run with these tags and nothing else."""
    return RunRecord("1", "a run", "FINISHED", tags, {}, {}, {}, folder)
