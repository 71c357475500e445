"""Sweeps as a person runs them: real trainings, a real store, processes that are killed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from athanor.config.compose import compose_config
from athanor.device import blas
from athanor.paths import Workspace
from athanor.prepare import result
from athanor.sweep import worker
from athanor.sweep.description import FOLDER
from athanor.sweep.shared import load_shared
from athanor.sweep.space import read_space, refuse_unprepared
from athanor.sweep.supervise import COMMAND
from support import mlflow_store, warm
from support.refused import refused, refused_keys
from support.stages import run_stages

# Answers of so few tokens that a trial is mostly its training.
SHORT = "test.max_tokens=4"
GRID = ("train.learning_rate=1e-4,2e-4,4e-4", "train.num_layers=1,2,-1", "train.iters=4", SHORT)


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    shutil.copyfile(empty_store, tmp_path / "runs.db")
    return f"sqlite:///{tmp_path}/runs.db"


@pytest.fixture(scope="module")
def prepared_once(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which config and prepare have run."""
    folder = tmp_path_factory.mktemp("prepared")
    for part in (repo / "conf", data):
        shutil.copytree(part, folder / part.name)
    (folder / "models").symlink_to(repo / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stages("config", "prepare")
    return folder


@pytest.fixture
def prepared(
    prepared_once: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of that folder to work in, whose path is not ASCII and would be encoded in a URI."""
    folder = tmp_path / "用户 项目#1%41&é"
    shutil.copytree(prepared_once, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return folder


def start(*arguments: str, python: str = sys.executable) -> "subprocess.Popen[str]":
    """Start a sweep, as the leader of its own process group."""
    return subprocess.Popen(
        [python, "-m", "athanor.sweep", "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str, cold: bool = False) -> str:
    """Run a sweep to its end and return its output; `cold` starts it as a person does."""
    process = start(*arguments, python=sys.executable if cold else warm.python())
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def recorded(store: str) -> tuple[Any, list[Any]]:
    """The one sweep's run, and those below it."""
    found = mlflow_store.list_runs(store)
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    [parent] = [run for run in found if run not in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    return parent, children


def predictions(store: str, run: Any) -> list[str]:
    path = mlflow_store.fetch_artifact(store, run.info.run_id, "test/predictions.jsonl")
    return path.read_text(encoding="utf-8").splitlines()


def notes(folder: Path) -> list[dict[str, Any]]:
    found = folder.glob("artifacts/sweep/*/points/*.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(process: "subprocess.Popen[str]") -> int:
    """The process that a sweep's work is done in, which leads a group of its own."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return int(found.stdout)


def states(folder: Path) -> Counter[str]:
    return Counter(note["status"] for note in notes(folder))


def test_a_killed_sweep_goes_on_and_trains_no_trial_twice(prepared: Path, store: str) -> None:
    process = start(*GRID)
    wait_for(lambda: states(prepared)["FINISHED"] >= 4 and states(prepared)["RUNNING"] > 0, process)
    process.kill()
    printed, _ = process.communicate()  # until the worker has ended too
    assert "Traceback" not in printed
    trained = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in prepared.glob("artifacts/sweep/points/*/trained.json")
    }
    assert 4 <= len(trained) < 9
    leftover = next(iter(trained)).with_name(".adapters.0")
    leftover.mkdir()

    printed = run(*GRID)
    parent, children = recorded(store)
    assert parent.info.status == "FINISHED"
    assert [child.info.status for child in children] == ["FINISHED"] * 9
    assert len({child.data.tags["athanor.point"] for child in children}) == 9
    assert states(prepared) == {"FINISHED": 9}
    assert not leftover.exists()
    assert len(list(prepared.glob("artifacts/sweep/points/*/trained.json"))) == 9
    for path, before in trained.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before, path
    assert printed.count("was trained before") >= 4
    assert list(Path("mlruns/outbox").glob("*")) == []
    # The pipeline's own outputs are DVC's.
    written = {path.name for path in prepared.glob("artifacts/*")}
    assert written == {".locks", "prepare", "train", "sweep"}
    assert [path.name for path in prepared.glob("artifacts/train/*")] == ["checkpoints"]

    names = {child.info.run_name for child in children}
    assert {"lr 1e-4, layers 1", "lr 4e-4, layers all"} <= names
    losses = {child.info.run_name: child.data.metrics["kept_val_loss"] for child in children}
    best = min(losses, key=lambda name: losses[name])
    # The rows of `test` are for the chosen alone.
    tested = {c.info.run_name for c in children if "test_loss" in c.data.metrics}
    assert tested == {best}
    assert all("test_valid_loss" in child.data.metrics for child in children)
    asked = {child.info.run_name: len(predictions(store, child)) for child in children}
    assert asked == {name: 9 + 3 * (name == best) for name in names}
    assert best in parent.data.tags["mlflow.note.content"]
    assert "dvc exp run -S" in printed
    chosen = next(child for child in children if child.info.run_name == best)
    assert chosen.info.run_id in printed
    assert "summary.html" in {path.name for path in prepared.glob("artifacts/sweep/*/*")}


def test_trials_that_fail_are_named_and_the_rest_goes_on(prepared: Path, store: str) -> None:
    """One learning rate at which the training diverges; no row fell to the split test."""
    (prepared / "artifacts/prepare/test.jsonl").write_text("")
    printed = run("train.learning_rate=1e3,1e-4", "train.iters=10", SHORT)
    assert states(prepared) == {"FINISHED": 1, "FAILED": 1}
    [reason] = [note["reason"] for note in notes(prepared) if "reason" in note]
    assert "diverged" in reason
    assert "lr 1000 failed" in printed
    parent, children = recorded(store)
    assert parent.info.status == "FINISHED"
    runs = {child.info.run_name: child for child in children}
    assert {name: run.info.status for name, run in runs.items()} == {
        "lr 1e-4": "FINISHED",
        "lr 1000": "FAILED",
    }
    assert runs["lr 1000"].data.tags["failure"][:40] in reason
    assert "train.learning_rate=0.0001" in printed


def test_a_process_that_is_killed_costs_its_trial(prepared: Path, store: str) -> None:
    """As Linux ends one that takes too much memory, and Metal one whose batch does not fit."""
    command = ("train.learning_rate=1e-4,2e-4", "train.iters=40", "train.save_every=5", SHORT)
    process = start(*command)

    def under_way() -> bool:
        return bool(list(prepared.glob("artifacts/train/checkpoints/*/0*/manifest.json")))

    wait_for(under_way, process)
    os.kill(worker_of(process), signal.SIGKILL)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "lr 1e-4 failed, and the sweep goes on: its process was ended by SIGKILL" in printed
    parent, children = recorded(store)
    assert parent.info.status == "FINISHED"
    status = {child.info.run_name: child.info.status for child in children}
    assert status == {"lr 1e-4": "FAILED", "lr 2e-4": "FINISHED"}
    # Another start tries it again, from its checkpoint.
    run(*command)
    assert states(prepared) == {"FINISHED": 2}
    assert {child.info.status for child in recorded(store)[1]} == {"FINISHED"}


def test_ctrl_c_ends_a_sweep_that_the_same_command_goes_on_with(prepared: Path, store: str) -> None:
    command = (GRID[0], "train.num_layers=1", "train.iters=40")
    process = start(*command)

    def second() -> bool:
        found = states(prepared)
        return found["FINISHED"] == 1 and found["RUNNING"] == 1

    wait_for(second, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 130, printed
    assert "the same command continues" in printed
    parent, children = recorded(store)
    assert {parent.info.status} | {child.info.status for child in children} <= {
        "KILLED",
        "FINISHED",
    }
    run(*command)
    parent, children = recorded(store)
    assert [child.info.status for child in children] == ["FINISHED"] * 3
    assert parent.info.status == "FINISHED"


def test_a_search_by_optuna_is_the_same_by_its_seed(prepared: Path, store: str) -> None:
    def tried() -> list[Any]:
        found = sorted(notes(prepared), key=lambda note: note["number"])
        return [note["values"] for note in found]

    search = ("sweep=search", "train.iters=1", SHORT, "hydra.sweeper.sampler.n_startup_trials=2")
    run(*search, "hydra.sweeper.n_trials=4")
    first = tried()
    assert len(first) == 4
    assert len(recorded(store)[1]) == 4
    (prepared / "artifacts/sweep").rename(prepared / "before")
    run(*search, "hydra.sweeper.n_trials=3")
    assert tried() == first[:3]  # the third is the first that those before it decide


def test_trials_side_by_side_are_the_same_trials(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each launcher, whatever number of BLAS threads the caller's environment asks for."""
    grid = ("train.learning_rate=1e-4,2e-4", "train.iters=4", SHORT)
    expected: dict[str, bytes] = {}
    for threads, launcher in (("2", "basic"), ("1", "joblib"), ("4", "submitit_local")):
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        printed = run(*grid, f"hydra/launcher={launcher}", cold=True)
        trained = adapters(prepared)  # below folders whose names tell the device and its threads
        expected = expected or trained
        assert trained == expected, launcher
        parent, children = recorded(store)
        assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
        assert len(trained) == len(children) == 2  # the same runs
        if launcher != "basic" and blas.library() is not None and blas.physical_cores() <= 2:
            assert "2 trials at once with" in printed
        (prepared / "artifacts/sweep").rename(prepared / f"trained-{launcher}")


def adapters(folder: Path) -> dict[str, bytes]:
    found = folder.glob("artifacts/sweep/points/*/adapters/adapters.safetensors")
    return {path.parent.parent.name: path.read_bytes() for path in found}


def test_a_wider_sweep_trains_only_what_is_new(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And loads the base once, and reads every row once, however many trials there are."""
    import mlx_lm.utils

    calls: Counter[str] = Counter()
    for module, name in ((mlx_lm.utils, "load_model"), (result, "tokenize_rows")):
        real = getattr(module, name)

        def counted(*args: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            calls[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setenv(COMMAND, "first")
    monkeypatch.setenv(FOLDER, "")
    worker.main(["train.num_layers=1,2", "seed=0,1", "train.iters=2"])
    assert calls == {"load_model": 1, "tokenize_rows": 3}
    before = adapters(prepared)
    assert len(before) == 4
    load_shared.cache_clear()
    worker.main(["train.num_layers=1,2,3", "seed=0,1", "train.iters=2"])
    assert set(before) < set(adapters(prepared))
    assert len(adapters(prepared)) == 6

    found = mlflow_store.list_runs(store)
    assert Counter("mlflow.parentRunId" in run.data.tags for run in found) == {True: 10, False: 2}
    wider = next(run for run in found if run.data.params.get("sweep.train.num_layers") == "1,2,3")
    assert re.search(r"seeds? ", wider.data.tags["mlflow.note.content"])


def test_rows_that_change_while_it_runs_stop_a_sweep(prepared: Path, store: str) -> None:
    """What is in memory are the rows of before; a digest of others would name a lie."""
    process = start("train.learning_rate=1e-4,2e-4,3e-4", "train.iters=20")
    wait_for(lambda: states(prepared)["FINISHED"] == 1, process)
    rows = prepared / "artifacts/prepare/train.jsonl"
    rows.write_text("".join(rows.read_text("utf-8").splitlines(True)[:3]), encoding="utf-8")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 1, printed
    assert "data changed while the sweep was running" in printed
    assert len(list(prepared.glob("artifacts/sweep/points/*/trained.json"))) < 3
    assert recorded(store)[0].info.status == "FAILED"


def test_the_line_that_promotes_says_what_was_typed(prepared: Path, store: str) -> None:
    """Values inside of others, no experiment, and a folder whose name Hydra would read."""
    odd = prepared / "a copy, of (it)=中"
    odd.mkdir()
    for name in ("conf", "data", "models", "artifacts", "params.yaml"):
        (odd / name).symlink_to(prepared / name)
    betas = "train.optimizer_config.adam.betas=[0.9,0.99],[0.8,0.99]"
    process = subprocess.run(
        [warm.python(), "-m", "athanor.sweep", betas, "experiment=null", "train.iters=2"],
        cwd=odd,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    line = next(line for line in process.stdout.splitlines() if "dvc exp run" in line)
    typed = [text for text in shlex.split(line)[5:] if text != "-S"]
    assert typed[:2] == ["~experiment", "train.iters=2"]
    promoted = compose_config(Path("conf"), typed)
    assert promoted.train.keep == "best"
    assert promoted.train.optimizer_config["adam"]["betas"] in ([0.9, 0.99], [0.8, 0.99])


@pytest.fixture
def conf(prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/, beside the model and params.yaml."""
    shutil.copytree(prepared_once / "conf", tmp_path / "conf")
    shutil.copyfile(prepared_once / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "models").symlink_to(prepared_once / "models")
    monkeypatch.chdir(tmp_path)
    return Path("conf")


def test_a_sweep_is_sorted_before_it_runs(conf: Path) -> None:
    found = read_space(
        conf, ["train.learning_rate=1e-4,3e-4", "sweep=grid", "seed=3", "train=dora"]
    )
    assert found.swept["train.learning_rate"] == ["0.0001", "0.0003"]  # the command line's
    assert found.swept["train.num_layers"] == ["2", "4", "-1"]
    assert (found.fixed, found.hydra, found.total) == (["seed=3", "train=dora"], ["sweep=grid"], 6)
    assert found.base.train.method == "dora"
    found = read_space(conf, ["train.learning_rate=interval(1e-5,1e-3)", "hydra/sweeper=optuna"])
    assert "hydra.sweeper.sampler.seed=0" in found.hydra
    assert found.total == 20


@pytest.mark.parametrize(
    ("arguments", "at_once"),
    [
        ([], 1),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], 2),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=64"], 3),
        (["hydra/launcher=submitit_local"], 3),
        (["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2"], 2),
        (["hydra/launcher=submitit_slurm"], 1),  # of other machines
    ],
)
def test_trials_at_once_are_the_launchers(conf: Path, arguments: list[str], at_once: int) -> None:
    assert read_space(conf, ["train.rank=2,4,8", *arguments]).at_once == at_once


@pytest.mark.parametrize(
    ("arguments", "code", "facts"),
    [
        (
            ["model=tiny,qwen2.5-0.5b"],
            "needs_prepare",
            {"keys": ["model"], "options": " -S model=tiny,qwen2.5-0.5b"},
        ),
        (
            ["data.valid_size=0.1,0.2", "train.rank=4"],
            "needs_prepare",
            {"options": " -S data.valid_size=0.1,0.2 -S train.rank=4"},
        ),
        (["train.mask_prompt=true,false"], "needs_prepare", {"keys": ["train.mask_prompt"]}),
        (["test.temp=0,1"], "key_trains_nothing", {"key": "test.temp"}),
        (["train.blas_threads=1,2"], "blas_threads_differ", {"key": "train.blas_threads"}),
        (["fuse.gguf=f16,q8_0"], "key_trains_nothing", {"key": "fuse.gguf"}),
        (
            ["train.learning_rate=interval(1e-5,1e-3)"],
            "endless_interval",
            {"arguments": "'train.learning_rate=interval(1e-5,1e-3)'"},
        ),
        (["train.rank=4"], "nothing_swept", {}),
        (["experiment=facts,null"], "group_without_option", {"key": "experiment"}),
        (["sweep=search", "seed=0,1"], "seed_in_a_search", {}),
        (["train=glob(*)"], "no_list_of_values", {"override": "train=glob(*)"}),
        (["train.rank=range(1,1000000000000)"], "too_many_values", {"key": "train.rank"}),
        (["train.rank=range(1,190)", "seed=range(0,999)"], "too_many_trials", {"trials": 188_811}),
        (["sweep=search", "hydra.sweeper.n_trials=0"], "no_trials", {"value": 0}),
    ],
)
def test_a_space_that_no_sweep_can_search_is_refused(
    conf: Path, arguments: list[str], code: str, facts: dict[str, Any]
) -> None:
    with refused(f"sweep.{code}", **facts):
        read_space(conf, arguments)


@pytest.mark.parametrize(
    ("argument", "code", "key"),
    [
        ("train.rnk=1,2", "unknown_key", "train.rnk"),
        ("train.learning_rate=1e-4,-1", "not_positive", "train.learning_rate"),
        ("train.rank=4,", "no_override", "train.rank=4,"),
        ("sweep=gird", "unknown_option", "sweep=gird"),
        ("sweep=grid,seeds", "unknown_option", "sweep=grid,seeds"),
        ("train.method=问题,问", "not_an_option", "train.method"),
        ("hydra.launcher=5", "not_composed", "conf"),
    ],
)
def test_invalid_values_are_named(conf: Path, argument: str, code: str, key: str) -> None:
    with refused_keys((f"config.{code}", key)):
        read_space(conf, [argument])


def test_a_sweep_on_other_rows_than_were_prepared_is_refused(conf: Path) -> None:
    found = read_space(conf, ["train.rank=4,8", "data.valid_size=0.3"])
    with refused("sweep.other_rows", options=" -S data.valid_size=0.3"):
        refuse_unprepared(found)
    refuse_unprepared(read_space(conf, ["train.rank=4,8", "train.iters=3"]))


def test_epochs_without_an_end_are_refused_before_any_trial(conf: Path) -> None:
    rows = Workspace.here().rows("train")
    rows.parent.mkdir(parents=True)
    rows.write_bytes(b"{}\n" * 7)
    with refused("train.too_many_iterations", epochs=500_001, batches=2):
        read_space(conf, ["train.iters=null", "train.epochs=500001", "train.batch_size=4,8"])


def test_a_named_sweep_may_fix_keys_too(conf: Path) -> None:
    named = {"train.iters": 7, "train.rank": "2,4"}
    text = yaml.safe_dump({"hydra": {"sweeper": {"params": named}}})
    (conf / "sweep/mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    found = read_space(conf, ["sweep=mine"])
    assert (found.swept, found.fixed) == ({"train.rank": ["2", "4"]}, ["train.iters=7"])
    assert found.base.train.iters == 7
    assert read_space(conf, ["sweep=mine", "train.iters=3"]).base.train.iters == 3


def test_every_named_sweep_can_be_run(conf: Path) -> None:
    assert read_space(conf, ["sweep=search"]).total == 12
    for path in conf.glob("sweep/*.yaml"):
        assert read_space(conf, [f"sweep={path.stem}"]).total > 1
    assert compose_config(conf, ["sweep=grid"]) == compose_config(conf, [])
