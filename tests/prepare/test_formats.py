"""Good files of every format go all the way: prepared, trained on, tested."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from athanor import files, synthesize

Rows = list[dict[str, Any]]
SPLITS = {"train": 4, "valid": 2, "test": 2}
SYNTHETIC = ("chat", "sharegpt", "tools", "completions", "text", "instruction", "classification")
TABLES = ("csv", "parquet", "json")
QUICK = ("train.iters=8", "train.val_batches=1", "test.max_rows=2", "test.max_tokens=4")
# Rows of Faker's are as much alike as rows of one form are.
# The tiny model's template has no place for tools.
ALIKE = ("data.checks.near_leak=ignore", "data.checks.left_out_by_template=warn")


@pytest.fixture
def stages(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs config, prepare, train and test on the files in data/."""
    shutil.copytree(repo / "conf", tmp_path / "conf")
    (tmp_path / "models").symlink_to(repo / "models")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path.parent}/runs.db")

    def run(*overrides: str, stages: tuple[str, ...] = ("prepare", "train", "test")) -> None:
        for name, arguments in [
            ("config", (*QUICK, *overrides)),
            *((stage, ()) for stage in stages),
        ]:
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            importlib.import_module(f"athanor.{name}.__main__").main()

    return run


def synthetic(format: str, place: int) -> dict[str, Rows]:
    """Return rows of a format for each split; of another place, they are other rows."""
    count = sum(SPLITS.values())
    rows = synthesize.rows(format, (place + 1) * count, ["zh_CN", "en_US"], 0)
    chosen = islice(rows, place * count, None)
    return {split: list(islice(chosen, count)) for split, count in SPLITS.items()}


def write_table(path: Path, rows: Rows) -> None:
    table = datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    )
    if path.suffix == ".json":
        path.write_text(json.dumps(list(table), indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)


def test_every_format_is_prepared_trained_on_and_tested(stages: Callable[..., None]) -> None:
    """A file of each format in each split, all in one training."""
    chatml = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    for split, count in SPLITS.items():
        folder = Path("data", split)
        folder.mkdir()
        for place, format in enumerate((*SYNTHETIC, "wikisql")):
            files.write_jsonl(folder / f"{format}.jsonl", synthetic(format, place)[split])
        for place, kind in enumerate(TABLES, 10):
            write_table(folder / f"table.{kind}", synthetic("completions", place)[split])
        said = [{"text": chatml.format(f"{split}{n}", f"第{n}答")} for n in range(count)]
        files.write_jsonl(folder / "chatml.jsonl", said)
        sections = [f"## 第{n}节\n\n{split}的这一节只说第{n}件事。\n\n" for n in range(count)]
        (folder / "文.md").write_text("# 标题\n\n" + "".join(sections), encoding="utf-8")
    stages("data=wikisql", "data.format=auto", "+data.formats={wikisql.jsonl: template}", *ALIKE)

    report = files.read_json(Path("artifacts/prepare/report.json"))
    formats = {format: format for format in SYNTHETIC} | {
        "sharegpt": "chat",
        "tools": "chat",
        "wikisql": "template",
        "table": "completions",
        "chatml": "text",
        "文": "article",
    }
    assert len(report["files"]) == 13 * len(SPLITS)
    for file in report["files"]:
        path = Path(file["path"])
        assert file["format"] == formats[path.stem]
        assert file["rows"] == file["kept"] == SPLITS[path.parent.name]
    rows = files.read_jsonl(Path("artifacts/prepare/train.jsonl"))
    assert len(rows) == 13 * SPLITS["train"]
    assert {key for row in rows for key in row} == {"messages", "text", "tools", "label"}
    first = [row["messages"][0]["content"] for row in rows if "messages" in row]
    [*queries] = [text for text in first if text.startswith("table: ")]
    assert len(queries) == SPLITS["train"]
    assert all("\ncolumns: " in text for text in queries)
    assert "标题 › 第3节" in first
    assert {"role": "assistant", "content": "第3答"} in [
        row["messages"][-1] for row in rows if "messages" in row
    ]
    metrics = files.read_json(Path("artifacts/test/metrics.json"))
    assert metrics["test_loss"] > 0
    assert metrics["test_train_loss"] < metrics["test_train_base_loss"]


def test_mlx_lm_trains_on_the_splits(stages: Callable[..., None], repo: Path) -> None:
    """Chats, tools, instructions and labels from files of four kinds, in one folder."""
    for place, format in enumerate(("chat", "tools", "instruction", "classification")):
        for split, rows in synthetic(format, place).items():
            Path("data", split).mkdir(exist_ok=True)
            files.write_jsonl(Path("data", split, f"{format}.jsonl"), rows)
    stages(*ALIKE, stages=("prepare",))
    assert len(files.read_jsonl(Path("artifacts/prepare/train.jsonl"))) == 4 * SPLITS["train"]
    options = {
        "model": repo / "models/tiny",
        "data": "artifacts/prepare",
        "adapter-path": "adapters",
        "iters": 3,
        "batch-size": 2,
        "num-layers": 2,
        "val-batches": 1,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_lm", "lora", "--train"),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path("adapters/adapters.safetensors").exists()
