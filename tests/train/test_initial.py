"""Trainings that begin with the adapters of an earlier run or of a file."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from athanor import diff
from athanor.config.compose import compose_config
from athanor.paths import Workspace
from athanor.runs import compare, restore, tracking_store
from support.refused import refused, refused_keys
from support.stages import Stages

SHORT = ("train.iters=4", "train.num_layers=2", "train.steps_per_report=1", "train.keep=last")
KEY = "train.resume_adapter_file"


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    path = tmp_path / "store.db"
    shutil.copyfile(empty_store, path)
    return f"sqlite:///{path}"


def losses() -> list[float]:
    with Path("artifacts/train/history.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def test_a_training_goes_on_from_a_run_or_a_file(stages: Stages, tmp_path: Path) -> None:
    stages("config", overrides=SHORT)
    stages("prepare", "train")
    first = json.loads(Path("artifacts/train/run.json").read_text())["run_id"]
    kept = tmp_path / "kept"
    shutil.copytree("artifacts/train/adapters", kept)
    alone = losses()

    stages("train", overrides=(f"{KEY}={first[:8]}",))
    from_run, adapters = losses(), Path("artifacts/train/adapters/adapters.safetensors")
    digest = adapters.read_bytes()
    second = json.loads(Path("artifacts/train/run.json").read_text())["run_id"]
    assert from_run[0] < alone[-1]
    stages("train", overrides=(f"{KEY}={kept}",))
    assert adapters.read_bytes() == digest
    third = json.loads(Path("artifacts/train/run.json").read_text())["run_id"]

    client = tracking_store.connect()
    tags = [client.get_run(run).data.tags for run in (second, third)]
    assert tags[0]["mlflow.parentRunId"] == tags[0]["initial.run"] == first
    assert tags[0]["athanor.point"] == tags[1]["athanor.point"]
    records = [compare.load_record(run, tmp_path / run) for run in (first, second, third)]
    lines = list(diff.list_differences(records[0], records[1]))
    assert f"initial.run: – -> {first[:12]}" in lines
    restored = restore.restore_initial_adapters(records[2], tmp_path / "tree")
    assert restored is not None
    copied = tmp_path / "tree" / restored / "adapters.safetensors"
    assert copied.read_bytes() == (kept / "adapters.safetensors").read_bytes()

    changed = json.loads((kept / "adapter_config.json").read_text()) | {"model_digest": "0" * 64}
    changed["num_layers"] = -1  # all, as mlx-lm records it
    (kept / "adapter_config.json").write_text(json.dumps(changed))
    for override, named in (
        ("train.rank=4", ["train.rank: 8", "train.rank: 8 in adapter_config.json, 4 here"]),
        ("train.num_layers=1", ["train.num_layers: 6 in adapter_config.json, 1 here"]),
        ("train.method=dora", ["train.method: lora"]),
        ("train.scale=10", ["train.scale: 20"]),
        ("train.iters=5", ["model.path: "]),
    ):
        with refused("train.other_adapters") as refusal:
            stages("train", overrides=(f"{KEY}={kept}", override))
        for text in named:
            assert text in refusal.value.facts["differences"]
    (kept / "adapter_config.json").unlink()
    weights: Any = mx.load(str(kept / "adapters.safetensors"))
    name = next(iter(weights))
    weights[name] = weights[name] * mx.nan
    mx.save_safetensors(str(kept / "adapters.safetensors"), weights)
    with refused("train.adapters_not_finite", name=name):
        stages("train", overrides=(f"{KEY}={kept}", "train.iters=6"))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("artifacts/train/adapters", "train.own_adapters"),
        ("artifacts/train/adapters/adapters.safetensors", "train.own_adapters"),
        ("no/such/folder", "runs.no_such_adapters"),
        ("x" * 5000, "runs.no_such_adapters"),
        ("''", "config.empty_text"),
    ],
)
def test_adapters_that_are_not_there_are_refused(
    repo: Path, value: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    with refused_keys((code, KEY)):
        compose_config(Workspace.here().conf, [f"{KEY}={value}"])
