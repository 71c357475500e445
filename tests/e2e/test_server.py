"""MLflow's server on a real PostgreSQL, both killed while a training goes on: nothing is lost."""

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from athanor.paths import Workspace
from athanor.runs.run import send_left_journals, start_run
from support import mlflow_store, warm

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Postgres:
    """A PostgreSQL in a folder of its own, which listens on a socket there and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, PROGRAMS[-1]
        self.uri = f"postgresql://postgres@/postgres?host={folder}"
        # It refuses to be run by root; the package brings a user for it.
        self.user: dict[str, Any] = (
            {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        )
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        subprocess.run(
            [self.programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust"],
            check=True,
            capture_output=True,
            cwd=folder,
            **self.user,
        )
        self.start()

    def start(self) -> None:
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={self.folder}"]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", *options],
            cwd=self.folder,
            stderr=(self.folder / "log").open("a"),
            **self.user,
        )
        ready = [str(self.programs / "pg_isready"), "-q", "-h", str(self.folder)]
        until(lambda: subprocess.run(ready).returncode == 0)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Server:
    """`mlflow server` on a database, with the files that go through it in a folder."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self.database = folder, database
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", self.database),
                *("--artifacts-destination", str(self.folder / "files")),
            ],
            cwd=self.folder,
            # Runners of jobs, which nothing here asks for, are nine processes more.
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(self.answers)

    def answers(self) -> bool:
        with suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql`")
    folder = Path(tempfile.mkdtemp())  # a socket's path is short, and pytest's folders are root's
    database = Postgres(folder)
    yield database
    database.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), postgres.uri)
    yield server
    server.kill()


# Stage train, which sends as soon as it can, and waits at the iteration that a file names: so it is
# at work while a service is away on any machine.
TRAIN = """
import time
from pathlib import Path
from athanor.runs import run as runs
runs.SECONDS_BETWEEN_SENDS = runs.SECONDS_BETWEEN_TRIES = 1
record = runs.Run.log_metrics
def wait_and_record(run, step, values, once=False):
    while step > int(Path("until").read_text() or 0):
        time.sleep(0.05)
    record(run, step, values, once)
runs.Run.log_metrics = wait_and_record
from athanor import console
from athanor.train.__main__ import main
console.run_command(main)
"""


class Training:
    """A training as a process, whose output is read while it runs."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.log = folder / "log"
        self.until = folder / "until"
        self.until.write_text("30")
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            cwd=folder,
            env=env,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def iteration(self) -> int:
        lines = re.findall(r"^iteration +(\d+)", self.log.read_text("utf-8"), re.MULTILINE)
        return int(lines[-1]) if lines else 0

    def goes_on_without(self, service: Postgres | Server) -> None:
        """Kill a service, check that the training goes on, and bring the service back."""
        service.kill()
        before = self.iteration()
        self.until.write_text(str(before + 60))
        until(lambda: self.iteration() >= before + 40)
        service.start()


@pytest.fixture
def client(server: Server) -> Any:
    return mlflow_store.connect(server.uri)


def runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("athanor")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def read_metric(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def test_nothing_is_lost_while_server_and_database_are_killed(
    repo: Path, data: Path, postgres: Postgres, server: Server, client: Any, tmp_path: Path
) -> None:
    for part in (repo / "conf", data):
        shutil.copytree(part, tmp_path / part.name)
    (tmp_path / "models").symlink_to(repo / "models")
    env = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "PYTHONUNBUFFERED": "1"}
    settings = ["train.iters=200", "train.steps_per_report=2", "train.steps_per_eval=50"]
    for stage in (["config", *settings], ["prepare"]):
        command = [warm.python(), "-m", f"athanor.{stage[0]}", *stage[1:]]
        subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    training = Training(tmp_path, env)

    def stored() -> int:
        steps = [step for run in runs(client) for step, _ in read_metric(client, run, "train_loss")]
        return max(steps, default=0)

    until(lambda: stored() > 0)
    for service in (server, postgres):
        training.goes_on_without(service)
        reached = training.iteration()
        until(lambda: stored() >= reached)  # noqa: B023  # called at once
    training.until.write_text("200")
    assert training.process.wait() == 0, training.log.read_text("utf-8")
    log = training.log.read_text("utf-8")
    assert "note:" not in log, log
    assert not any((tmp_path / "mlruns/outbox").iterdir())

    [run] = runs(client)
    assert run.info.status == "FINISHED"
    history = (tmp_path / "artifacts/train/history.csv").read_text("utf-8")
    lines = list(csv.DictReader(history.splitlines()))
    assert int(lines[-1]["iteration"]) == 200
    for key in set(lines[0]) - {"iteration"}:
        written = [(int(line["iteration"]), float(line[key])) for line in lines if line[key]]
        assert read_metric(client, run, key) == written, key
    for key in ("tokens_per_second", "peak_memory"):
        assert [step for step, _ in read_metric(client, run, key)] == list(range(2, 201, 2)), key
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    trained = tmp_path / "artifacts/train/adapters/adapters.safetensors"
    kept = client.download_artifacts(run.info.run_id, "adapters/adapters.safetensors")
    assert Path(kept).read_bytes() == trained.read_bytes()


def test_what_ended_while_the_server_was_away_is_sent_when_it_is_back(
    server: Server,
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.kill()
    with start_run("ended without it", {"seed": 0}, {"device": "cpu"}, []) as ended:
        ended.log_metrics(1, {"train_loss": 2.5})
        ended.log_text("seed: 0", "params.yaml")
    assert "the next stage sends it" in capsys.readouterr().err
    server.start()
    send_left_journals()
    [run] = [run for run in runs(client) if run.data.tags["athanor.run"] == ended.name]
    assert run.info.status == "FINISHED"
    assert read_metric(client, run, "train_loss") == [(1, 2.5)]
    kept = client.download_artifacts(run.info.run_id, "params.yaml")
    assert Path(kept).read_text("utf-8") == "seed: 0"
    assert not any(Workspace.here().outbox.iterdir())
