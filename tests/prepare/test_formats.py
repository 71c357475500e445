"""A good file of every format goes all the way: prepared, trained on for 5 iterations, tested."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from athanor import files, synthesize

Rows = list[dict[str, Any]]
SPLITS = {"train": 8, "valid": 4, "test": 4}
MADE = ("chat", "sharegpt", "tools", "completions", "text", "instruction", "classification")
QUICK = ("train.iters=5", "train.val_batches=1", "test.max_rows=2", "test.max_tokens=4")
# Rows that Faker makes are as much alike as rows of one form are.
# The tiny model's template has no place for tools.
ALIKE = ("data.checks.near_leak=ignore", "data.checks.left_out_by_template=warn")


@pytest.fixture
def stages(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs config, prepare, train and test on what lies in data/."""
    shutil.copytree(repo / "conf", tmp_path / "conf")
    (tmp_path / "models").symlink_to(repo / "models")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path.parent}/runs.db")

    def run(*overrides: str, stages: tuple[str, ...] = ("prepare", "train", "test")) -> None:
        for name, given in [("config", (*QUICK, *overrides)), *((stage, ()) for stage in stages)]:
            monkeypatch.setattr(sys, "argv", [name, *given])
            importlib.import_module(f"athanor.{name}.__main__").main()

    return run


def made(format: str) -> Iterator[tuple[str, Rows]]:
    """Rows of a format for each split, none of them twice."""
    rows = synthesize.rows(format, sum(SPLITS.values()), ["zh_CN", "en_US"], 0)
    for split, count in SPLITS.items():
        yield split, [next(rows) for _ in range(count)]


def write(name: str, rows: Rows) -> None:
    files.write_jsonl(Path("data") / name, rows)


def went_all_the_way(count: int = 8) -> None:
    prepared = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    assert len(prepared) == count
    assert {"messages", "text"} >= {key for row in prepared for key in row} - {"tools", "label"}
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    assert metrics["test_loss"] > 0
    assert metrics["test_train_loss"] < metrics["test_train_base_loss"]


@pytest.mark.parametrize("format", MADE)
def test_jsonl_of_every_format(stages: Callable[..., None], format: str) -> None:
    for split, rows in made(format):
        write(f"{split}.jsonl", rows)
    stages(*ALIKE)
    went_all_the_way()


def test_a_mapping_of_ones_own(stages: Callable[..., None]) -> None:
    for split, rows in made("wikisql"):
        write(f"{split}.jsonl", rows)
    stages("data=wikisql", *ALIKE)
    went_all_the_way()
    question = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))[0]["messages"][0]["content"]
    assert question.startswith("table: ")
    assert "\ncolumns: " in question


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_tables_and_lists(stages: Callable[..., None], kind: str) -> None:
    for split, rows in made("completions"):
        table = datasets.Dataset.from_list(
            [{"input": row["prompt"], "output": row["completion"]} for row in rows]
        )
        path = f"data/{split}.{kind}"
        if kind == "csv":
            table.to_csv(path)
        elif kind == "parquet":
            table.to_parquet(path)
        else:
            Path(path).write_text(json.dumps(list(table), indent=1), encoding="utf-8")
    stages("data.prompt_feature=input", "data.completion_feature=output", *ALIKE)
    went_all_the_way()


def test_articles_and_written_out_conversations(stages: Callable[..., None]) -> None:
    parts = "".join(f"## 第{n}节\n\n这一节只说第{n}件事。\n\n" for n in range(8))
    for split, count in SPLITS.items():
        body = parts.replace("第", {"train": "第", "valid": "其", "test": "之"}[split])
        sections = body.split("## ")[: count + 1]
        Path(f"data/{split}").mkdir()
        Path(f"data/{split}/文.md").write_text("# 标题\n\n" + "## ".join(sections), "utf-8")
    written = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    write("train.jsonl", [{"text": written.format("月亮哪天最圆", "星期八")}])
    stages(*ALIKE)
    went_all_the_way(9)
    rows = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    assert {"role": "system", "content": "标题 › 第3节"} in rows[3]["messages"]
    assert rows[8]["messages"][1] == {"role": "assistant", "content": "星期八"}


def test_mlx_lm_trains_on_what_prepare_leaves(stages: Callable[..., None], repo: Path) -> None:
    """Chats, tools, instructions and labels from files of four kinds, in one folder."""
    for number, format in enumerate(("chat", "tools", "instruction", "classification")):
        for split, rows in made(format):
            Path(f"data/{split}").mkdir(exist_ok=True)
            write(f"{split}/{number}.jsonl", rows)
    stages(*ALIKE, stages=("prepare",))
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "lora",
        "--train",
        "--model",
        str(repo / "models/tiny"),
    ]
    options = [
        "--data",
        "artifacts/prepare",
        "--iters",
        "3",
        "--batch-size",
        "2",
        "--num-layers",
        "2",
    ]
    said = subprocess.run(
        [*command, *options, "--adapter-path", "adapters", "--val-batches", "1"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert Path("adapters/adapters.safetensors").exists()
    assert len(files.read_jsonl(Path("artifacts/prepare/train.jsonl"))) == 32
