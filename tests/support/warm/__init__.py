"""Python processes that start warm: forked from one that has imported the large libraries already.

A start of a stage is mostly the import of MLflow, Hydra, DVC and mlx-lm: some three seconds. Here
one process imports them once, and each `python -m …` is a fork of it, with its own code, arguments,
environment, folder and streams. `programs()` has a `python` and a `dvc` like the real ones: what
starts them sees their exit status, their signals reach the fork, and it ends with them.

Tests of how a process starts, and tests that kill one, use the real programs.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent


@lru_cache(1)
def programs() -> Path:
    """Return a folder with a warm `python` and `dvc`; the real ones' where forks are not safe."""
    if sys.platform != "linux":
        return Path(sys.executable).parent
    folder = Path(tempfile.mkdtemp(prefix="athanor-warm-"))
    for name, first in (("python", ""), ("dvc", "-m dvc ")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        client = f"{sys.executable} -I -S {HERE / 'client.py'} {folder / 'socket'}"
        program.write_text(f'#!/bin/sh\nexec {client} {first}"$@"\n', encoding="utf-8")
        program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py", folder / "socket"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(_stop, server, folder, os.getpid())
    return folder / "bin"


def python() -> str:
    """Return the path of the warm `python`."""
    return str(programs() / "python")


def _stop(server: "subprocess.Popen[bytes]", folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
