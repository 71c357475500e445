"""Trainings that are killed, interrupted, or run out of disk, and go on to the same bytes.

uv run pytest tests/e2e/test_resuming.py --kills 20
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from support import mlflow_store, warm

SETTINGS = [
    "train.num_layers=2",
    "train.batch_size=2",
    "train.dropout=0.1",
    "train.grad_accumulation_steps=2",
    "train.save_every=7",
    "train.steps_per_report=3",
    "train.steps_per_eval=5",
    "train.keep=best",
]


# Where what the frozen layers made is kept changes no byte, so each start may do it otherwise: in a
# file, nowhere, a part in memory and the rest in a file; the last start has all in memory.
KEPT_ACTIVATIONS = [
    ("train.activations_memory=0",),
    ("train.activations_memory=0", "train.activations_disk=0"),
    ("train.activations_memory=5e-5",),
]


class Place:
    """A folder in which this repository's stages are run as processes, with a store of its own."""

    def __init__(self, folder: Path, repo: Path, data: Path, store: Path) -> None:
        self.folder = folder
        self.empty_store = store
        (folder / "mlruns").mkdir(parents=True)
        shutil.copyfile(store, folder / "mlruns/mlflow.db")
        for part in (repo / "conf", data):
            shutil.copytree(part, folder / part.name)
        (folder / "models").symlink_to(repo / "models")
        self.env = os.environ | {"PYTHONUNBUFFERED": "1"}

    def beside(self, name: str) -> "Place":
        """Another folder, in which the same was prepared and nothing was trained."""
        other = Place(
            self.folder.with_name(name), self.folder, self.folder / "data", self.empty_store
        )
        shutil.copyfile(self.folder / "params.yaml", other.folder / "params.yaml")
        shutil.copytree(self.folder / "artifacts/prepare", other.folder / "artifacts/prepare")
        return other

    def run(self, stage: str, *overrides: str) -> str:
        done = subprocess.run(
            [warm.python(), "-m", f"athanor.{stage}", *overrides],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def begin(
        self, *overrides: str, before: tuple[str, ...] = (), python: str = sys.executable
    ) -> "subprocess.Popen[str]":
        """Starts a training and waits for its first figures."""
        process = subprocess.Popen(
            [*before, python, "-m", "athanor.train", *overrides],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.wait_for(process, "iteration ")
        return process

    @staticmethod
    def wait_for(process: "subprocess.Popen[str]", text: str) -> str:
        assert process.stdout is not None
        read = ""
        for line in process.stdout:
            read += line
            if line.startswith(text):
                return read
        raise AssertionError(f"no {text!r} in:\n{read}")

    def result(self) -> dict[str, bytes]:
        names = ["history.csv", "adapters/adapters.safetensors"]
        names += ["other_adapters/adapters.safetensors", "adapters/adapter_config.json"]
        return {name: (self.folder / "artifacts/train" / name).read_bytes() for name in names}

    def runs(self) -> list[Any]:
        return mlflow_store.list_runs(self.folder)

    def assert_each_point_once(self) -> None:
        """The store has one run, and in it every figure of history.csv at its iteration, once."""
        [run] = self.runs()
        assert run.info.status == "FINISHED"
        assert "failure" not in run.data.tags
        text = (self.folder / "artifacts/train/history.csv").read_text(encoding="utf-8")
        lines = list(csv.DictReader(text.splitlines()))
        for key in set(lines[0]) - {"iteration"}:
            written = [(int(line["iteration"]), float(line[key])) for line in lines if line[key]]
            assert mlflow_store.read_metric(self.folder, run.info.run_id, key) == written, key
        reported = [int(line["iteration"]) for line in lines if line["train_loss"]]
        for key in ("tokens_per_second", "peak_memory", "active_memory"):
            recorded = mlflow_store.read_metric(self.folder, run.info.run_id, key)
            assert [step for step, _ in recorded] == reported, key

    def nothing_is_left(self) -> bool:
        outbox, saved = self.folder / "mlruns/outbox", self.folder / "artifacts/train/checkpoints"
        return not any(outbox.iterdir()) and not any(saved.iterdir())


@pytest.fixture(scope="module")
def place(
    repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> Callable[..., Place]:
    """Makes a folder whose rows are prepared, and whose training is as long as is said."""

    def make(iters: int, *overrides: str) -> Place:
        made = Place(tmp_path_factory.mktemp("place") / "whole", repo, data, empty_store)
        made.run("config", *SETTINGS, f"train.iters={iters}", *overrides)
        made.run("prepare")
        return made

    return make


@pytest.fixture(scope="module")
def whole(place: Callable[..., Place]) -> Place:
    """A training of 40 iterations that nothing interrupted."""
    whole = place(40)
    whole.run("train")
    return whole


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    place: Callable[..., Place], kills: int
) -> None:
    iters = 60 + 20 * kills
    whole = place(iters)
    whole.run("train")
    killed = whole.beside("killed")
    while_writing = 0
    for number in range(kills):
        process = killed.begin(*KEPT_ACTIVATIONS[number % 3])
        if number % 2:
            while_writing += wait_for_half_a_checkpoint(killed.folder)
        else:
            wait_for_iterations(process, random.randint(1, 30))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert while_writing >= kills // 2
    assert [run.info.status for run in killed.runs()] in ([], ["RUNNING"])
    said = killed.run("train")
    assert "resumes after iteration" in said
    assert killed.result() == whole.result()
    killed.assert_each_point_once()
    assert killed.nothing_is_left()


def wait_for_iterations(process: "subprocess.Popen[str]", count: int) -> None:
    """Returns after so many more iterations, somewhere between two reports."""
    assert process.stdout is not None
    first = None
    for line in process.stdout:
        if line.startswith("iteration "):
            iteration = int(line.split()[1])
            first = iteration if first is None else first
            if iteration >= first + count:
                time.sleep(random.uniform(0, 0.1))
                return


def wait_for_half_a_checkpoint(folder: Path) -> bool:
    """Returns as soon as a checkpoint is being written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(folder.glob("artifacts/train/checkpoints/*/.0*")):
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_training_saves_and_goes_on_in_its_run(
    whole: Place, number: signal.Signals
) -> None:
    one = whole.beside(number.name)
    process = one.begin("train.save_every=1000", python=warm.python())
    Place.wait_for(process, "iteration     9 ")
    if number == signal.SIGHUP:  # a terminal that is closed shows nothing more
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(number)
        process.wait()
    else:
        process.send_signal(number)
        said, _ = process.communicate()
        assert "the same command continues from there" in said.replace("\n", " ")
    assert process.returncode == 130
    [run] = one.runs()
    assert run.info.status == "KILLED"
    assert run.data.metrics["train_loss"] > 0
    said = one.run("train")
    assert "resumes after iteration" in said
    assert int(said.split("resumes after iteration ")[1].split(",")[0]) >= 9
    one.assert_each_point_once()
    assert one.result() == whole.result()


def test_a_full_disk_and_a_truncated_checkpoint_are_survived(whole: Place) -> None:
    """Checkpoints go to a disk of their own that has room for one of them."""
    one = whole.beside("full disk")
    saved = one.folder / "artifacts/train/checkpoints"
    saved.mkdir(parents=True)
    user = () if os.getuid() == 0 else ("--map-root-user",)
    mounted = 'mount -t tmpfs -o size=1400k x "$0" && "$@"'
    inside = ("unshare", *user, "--mount", "sh", "-c", mounted)
    try:
        subprocess.run([*inside, str(saved), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")

    # The small disk is there for one process: what is in it when it dies is copied out.
    process = one.begin(before=(*inside, str(saved)))
    said = Place.wait_for(process, "iteration    25 ")
    assert "no checkpoint after iteration" in said
    assert "the disk is full" in said
    root = Path(f"/proc/{child_of(process.pid)}/root")
    shutil.copytree(root / saved.relative_to("/"), one.folder / "copied", symlinks=True)
    os.kill(child_of(process.pid), signal.SIGKILL)
    process.wait()
    saved.rmdir()
    (one.folder / "copied").rename(saved)
    [first] = [path.name for path in saved.glob("*/0*")]

    # With room again it goes on; the next checkpoint is then truncated.
    process = one.begin("train.save_every=5")
    Place.wait_for(process, "iteration    36 ")
    process.kill()
    process.wait()
    latest = max(saved.glob("*/0*"))
    assert latest.name > first
    weights = latest / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = one.run("train")
    assert f"{latest.name} is damaged" in said.replace("\n", "")
    assert "resumes after iteration" in said
    assert one.result() == whole.result()
    one.assert_each_point_once()


def child_of(process: int) -> int:
    """The process that a shell runs, or the process itself where it has none."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return child_of(int(children[0])) if children else process


def test_looking_elsewhere_and_more_often_changes_no_adapter(place: Callable[..., Place]) -> None:
    one = place(20, "train.keep=last")
    one.run("train")
    adapters = one.result()["adapters/adapters.safetensors"]
    one.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{one.folder}/elsewhere.db"
    one.run("train", "train.steps_per_eval=1", "train.val_batches=1", "train.steps_per_report=1")
    assert one.result()["adapters/adapters.safetensors"] == adapters
    one.run("train")
    assert one.result()["adapters/adapters.safetensors"] == adapters


def test_a_run_whose_process_is_gone_is_closed_by_the_next_start(
    place: Callable[..., Place],
) -> None:
    one = place(2000)
    process = one.begin()
    Place.wait_for(process, "iteration    10 ")
    process.kill()
    process.wait()
    # Killed this early, its journal may know more than the store does.
    assert [run.info.status for run in one.runs()] in ([], ["RUNNING"])
    said = one.run("train", "train.learning_rate=1e-5", "train.iters=4")
    assert "holds checkpoints of 1 interrupted trainings" in " ".join(said.split())
    closed = {run.data.params["train.iters"]: run.info.status for run in one.runs()}
    assert closed == {"2000": "KILLED", "4": "FINISHED"}
    # The one that died still has its checkpoint, for when it is run again.
    assert files.read_json(next(one.folder.glob("artifacts/train/checkpoints/*/about.json")))
