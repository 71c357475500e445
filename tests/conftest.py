"""What tests share: the repository's own parts, and copies of it to work in."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Each of xdist's processes computes on one core, with one thread: more threads than cores would
# wait for each other in every product of matrices. Its own processes inherit that.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import athanor  # noqa: F401  # before any test imports mlx: chooses its BLAS and threads
from support import mlflow_store
from support.stages import Stages, run_stages

# No test may reach a hub: a try fails at once, wherever it happens.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("DVC_ROOT", None)
# Each stage is a process; without a cache of bytecode each would compile MLflow again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell without job control starts what is in the background with Ctrl-C ignored, and so would be
# the processes of these tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository."""
    return REPO


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that data.dvc names, pulled from the remote in this repository.

    A fresh clone has no data/, and what a person put there is not what these tests are about.
    """
    folder = tmp_path_factory.mktemp("data")
    for name in (".dvc/config", ".dvc/demo-remote", "data.dvc"):
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copyfile
        (folder / name).parent.mkdir(exist_ok=True)
        copy(REPO / name, folder / name)
    (folder / ".dvc/config.local").write_text("[core]\nno_scm = true\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "dvc", "pull", "-q", "data.dvc"], cwd=folder, check=True)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny base model's folder."""
    return REPO / "models" / "tiny"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them; to make one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_store.connect(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def runs_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of a store without runs."""
    path = tmp_path / "store.db"
    shutil.copyfile(empty_store, path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def stages(
    repo: Path, data: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> Stages:
    """Runs stages in a folder with this repository's conf/, data/ and models/, and a `store`."""
    for part in (repo / "conf", data):
        shutil.copytree(part, tmp_path / part.name)
    (tmp_path / "models").symlink_to(repo / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)

    return run_stages


# The longest first: what begins last should be short, or one of the processes waits for the other.
LONG = ("pipeline", "sweep", "stages", "resuming", "trainer", "reproduce", "server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="kills in test_resuming")
    parser.addoption("--settings", type=int, default=100, help="examples in test_random_settings")
    parser.addoption("--altered", type=int, default=40, help="altered folders of each kind")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often a training is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture
def altered_folders(request: pytest.FixtureRequest) -> int:
    """How many altered folders of a kind are tried."""
    return int(request.config.getoption("--altered"))
