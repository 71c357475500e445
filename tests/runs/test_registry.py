"""The fused model in MLflow: it answers there, has one version, and the best one has the alias."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from athanor.compute.arrays import TokenizedText
from athanor.paths import Workspace
from athanor.runs import registry, run
from athanor.runs.entries import Dataset
from athanor.runs.run import Run, resume_run, start_run
from support import mlflow_store
from support.stages import Stages

NAME = "facts"


@pytest.fixture(name="store")
def store_uri(tmp_path: Path) -> str:
    """A store of its own for each test."""
    return f"sqlite:///{tmp_path}/store/runs.db"


@pytest.fixture
def apart(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """That store is the tracking store, and the working directory is a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "SECONDS_BETWEEN_TRIES", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return store


@pytest.fixture
def client(apart: str, tmp_path: Path, empty_store: Path) -> Any:
    (tmp_path / "store").mkdir()
    shutil.copyfile(empty_store, tmp_path / "store/runs.db")
    return mlflow_store.connect(apart)


def train(name: str) -> str:
    """A training's run, with a loss at iteration 5; returns MLflow's id."""
    rows = [Dataset("valid.jsonl", "validation", "0" * 64, 3)]
    with start_run(name, {"seed": 0}, {}, rows, name) as run:
        run.log_metrics(5, {"val_loss": 1.5})
        run.log_metrics(6, {"val_loss": 1.75})
    return str(run.id)


def fuse(
    run: str, model: Path, digest: str, *, loss: float = 1.5, rows: str = "rows", **more: Any
) -> Run:
    """Record a model as the stage fuse does."""
    with resume_run(run, None) as again:
        again.log_model(
            model,
            digest,
            question="月亮哪天最圆",
            step=5,
            val_loss=loss,
            valid_digest=rows,
            tags={"model.path": "models/tiny"},
            **{"registered_name": NAME, **more},
        )
    return again


def best_version(client: Any) -> int:
    return int(client.get_model_version_by_alias(NAME, "best").version)


def test_the_registered_model_answers_a_training_question(stages: Stages) -> None:
    stages("config", overrides=("train.iters=20", f"fuse.registered_model_name={NAME}"))
    stages("prepare", "train", "fuse")
    [row, *_] = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    [prompt, expected] = [message["content"] for message in row["messages"]]

    question = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 20}
    Path("input.json").write_text(json.dumps(question, ensure_ascii=False), encoding="utf-8")
    command = ["predict", "-m", f"models:/{NAME}@best", "-i", "input.json", "-t", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "models", *command, "--env-manager", "local"],
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    completion = json.loads(done.stdout)
    [choice] = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert choice["finish_reason"] == "stop"
    assert completion["model"] == NAME


def test_a_model_is_logged_and_registered_once(client: Any, store: str, tiny: Path) -> None:
    """Whatever is interrupted in between, and however often it is sent."""
    run = train("a")
    fuse("a", tiny, "one", registered_name=None)
    assert client.search_registered_models() == []
    for _ in range(2):
        fused = fuse("a", tiny, "one")
        client.delete_registered_model_alias(NAME, "best")  # a kill came before it was given
    fused = fuse("a", tiny, "one")
    assert fused.describe_version() == "facts version 1; best is this one"
    [version] = client.search_model_versions(f"name = '{NAME}'")
    assert version.run_id == run
    assert version.tags == {
        "fused.digest": "one",
        "model.path": "models/tiny",
        "val_loss": "1.5",
        "valid.digest": "rows",
    }
    recorded = client.get_run(run)
    [output] = recorded.outputs.model_outputs
    assert output.step == 5
    model = client.get_logged_model(output.model_id)
    assert model.status == "READY"
    assert model.source_run_id == run
    assert model.params == recorded.data.params
    [metric] = model.metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("val_loss", 1.5, "valid.jsonl")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]
    assert mlflow_store.read_metric(store, run, "val_loss") == [(5, 1.5), (6, 1.75)]


def test_the_best_of_what_was_validated_on_the_same_rows_has_the_alias(
    client: Any, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for digest, loss, rows, best, words in (
        ("one", 1.5, "rows", 1, "facts version 1; best is this one"),
        ("worse", 1.6, "rows", 1, "best stays version 1 (validation loss 1.6000 to 1.5000)"),
        ("better", 1.4, "rows", 3, "better than version 1 (validation loss 1.4000 to 1.5000)"),
        ("other", 0.1, "other rows", 3, "best stays version 3, validated on different rows"),
    ):
        train(digest)
        fused = fuse(digest, tiny, digest, loss=loss, rows=rows)
        assert words in fused.describe_version()
        assert best_version(client) == best
    command = capsys.readouterr().err.partition("To move it: uv run python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    assert best_version(client) == 4


def test_of_two_that_end_at_once_the_better_one_has_the_alias(
    client: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks who is the best only when the other is done, or both wait for the other here."""
    from mlflow import MlflowClient

    both = threading.Barrier(2)
    look = MlflowClient.get_registered_model

    def look_together(self: MlflowClient, name: str) -> Any:
        model = look(self, name)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return model

    monkeypatch.setattr(MlflowClient, "get_registered_model", look_together)
    losses = {"one": 1.5, "two": 1.4}
    for digest in losses:
        train(digest)
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda digest: fuse(digest, tiny, digest, loss=losses[digest]), losses)
        texts = [run.describe_version() for run in runs]
    assert sum("(validation loss" in text for text in texts) == 1
    best = client.get_model_version_by_alias(NAME, "best")
    assert best.tags["fused.digest"] == "two"


def test_a_store_that_is_away_or_full_gets_the_model_later(
    apart: str, tiny: Path, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of it, whole, and its gigabytes are copied once: into the store."""
    fused = Path(shutil.copytree(tiny, "fused"))
    away = tmp_path / "store"
    away.write_text("", encoding="utf-8")
    train("a")
    fuse("a", fused, "one")
    assert "the next stage sends it" in capsys.readouterr().err
    [waits] = Workspace.here().outbox.rglob("model.safetensors")
    assert waits.samefile(fused / waits.name)

    away.unlink()
    closed = tmp_path / "closed"
    closed.write_text("", encoding="utf-8")
    away.mkdir()
    shutil.copyfile(empty_store, away / "runs.db")
    client = mlflow_store.connect(apart)
    experiment = client.create_experiment("athanor", artifact_location=closed.as_uri())
    train("b")
    assert "did not take fused (" in capsys.readouterr().err
    closed.unlink()
    train("c")
    [model] = client.search_logged_models([experiment])
    assert model.status == "READY"
    assert len(client.get_run(model.source_run_id).outputs.model_outputs) == 1
    assert len(model.metrics) == 1
    assert best_version(client) == 1
    assert list(Workspace.here().outbox.glob("*")) == []
    copies = {path.stat().st_ino for path in tmp_path.rglob("model.safetensors")}
    assert len(copies) == 2


def test_losses_compare_where_the_same_tokens_were_counted() -> None:
    row = TokenizedText([1, 2, 3], [False, True, True])
    different = [
        row.truncate(2),
        TokenizedText([1, 2, 4], row.supervised),
        TokenizedText(row.ids, [True] * 3),
    ]
    digests = {registry.digest_validation([text]) for text in [row, *different]}
    assert len(digests) == 4
    assert registry.digest_validation([TokenizedText([1, 2, 3], [False, True, True])]) in digests
