"""Stages that would write, or read, what another process writes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from athanor import locks
from support.refused import refused

TRAIN, TEST = ("train", "prepare"), ("test", "prepare", "train")
PREPARE, FUSE, SWEEP = ("prepare",), ("fuse", "prepare", "train"), (None, "prepare")
HOLD = """
import sys
from athanor import locks
with locks.stage(*sys.argv[1:]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("running", "started", "used"),
    [
        *((stage, stage, stage[0]) for stage in (PREPARE, TRAIN, TEST, FUSE)),
        *((PREPARE, reader, "prepare") for reader in (TRAIN, TEST, FUSE, SWEEP)),
        *((reader, PREPARE, "prepare") for reader in (TRAIN, TEST, FUSE, SWEEP)),
        *((TRAIN, reader, "train") for reader in (TEST, FUSE)),
        *((reader, TRAIN, "train") for reader in (TEST, FUSE)),
        (TEST, FUSE, None),
        (SWEEP, TRAIN, None),
        (SWEEP, SWEEP, None),
    ],
)
def test_a_stage_is_refused_while_another_uses_its_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: tuple[str | None, ...],
    started: tuple[str | None, ...],
    used: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("artifacts").mkdir()
    with locks.stage(*running), ExitStack() as held:  # type: ignore[arg-type]
        if used is not None:
            held.enter_context(refused("locks.in_use", folder=Path("artifacts") / used))
        with locks.stage(*started):  # type: ignore[arg-type]
            pass
    with locks.stage(*started):  # type: ignore[arg-type]
        pass


def test_a_killed_stage_frees_its_folder_and_the_next_removes_its_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *FUSE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    artifacts = tmp_path / "artifacts"
    kept = artifacts / "fuse/model"
    for folder in (artifacts / ".fuse.x1y2/model", artifacts / "train/.adapters.0", kept):
        folder.mkdir(parents=True)
    # Names of git's, of macOS and of NFS, which are nobody's leftovers.
    hidden = [artifacts / "train" / name for name in (".gitignore", ".DS_Store", ".nfs00a1")]
    for path in hidden:
        path.touch()
    with (artifacts / ".locks/fuse").open("ab") as file:
        file.write(b"\0\xff\n12 \nno process\n")  # as a crash of the machine leaves it
    (artifacts / "prepare").mkdir()
    (artifacts / "prepare/.report.json.0").touch()
    with refused("locks.in_use") as error, locks.stage(*FUSE):
        pass
    assert f"(process {process.pid})" in str(error.value)
    with locks.stage("test"):  # any other stage: what is written at this moment stays
        assert (artifacts / ".fuse.x1y2").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with locks.stage("test"):
        left = [path for path in artifacts.rglob(".*") if path.name != ".locks"]
    assert sorted(left) == sorted(hidden)
    assert kept.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_used_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.stage("train", "prepare"):
        assert (tmp_path / "artifacts/.locks/train").exists()
