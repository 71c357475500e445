"""How long a training takes, beside mlx_lm.lora on the same work.

    uv run python benchmarks/training.py

Both train LoRA adapters on the same rows, one epoch, the same number of rows at a time, and
validate before and after it; each run is a process of its own, timed from start to end, Athanor's
with its SQLite store and checkpoints. Runs alternate. On a CPU mlx_lm.lora gets all that helps it:
the same BLAS, no compilation, and a base in float32. Twice: on rows of one length that mlx-lm need
not pad, where only the loops differ, and on rows of log-normal lengths, as real ones are.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from athanor import BLAS, models

REPO = Path(__file__).parent.parent


def rows(tokenizer: Any, lengths: list[int]) -> list[dict[str, str]]:
    """Rows whose conversations have these many tokens, a quarter of them the question's."""
    draw = np.random.default_rng(0)
    # Words that are a token each, alone and after one another.
    letters = [chr(code) for code in range(0x4E00, 0x4F00)]
    known = [one for one in letters if len(tokenizer.encode(one, add_special_tokens=False)) == 1]

    def text(length: int) -> str:
        return "".join(draw.choice(known, max(1, length)))

    def tokens(row: dict[str, str]) -> int:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return len(tokenizer.apply_chat_template(messages, return_dict=False))

    found = []
    for length in lengths:
        row = {"prompt": text(length // 4), "completion": "一"}
        row["completion"] = text(length - tokens(row) + 1)
        while tokens(row) > length and len(row["completion"]) > 1:  # merged otherwise than expected
            row["completion"] = row["completion"][:-1]
        found.append(row)
    return found


def in_float32(model: Path, folder: Path) -> Path:
    """A copy of a model with its weights in float32, in which mlx is fast on a CPU."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in model.glob("*.safetensors"):
        weights: Any = mx.load(str(path))
        cast = {name: value.astype(mx.float32) for name, value in weights.items()}
        mx.save_safetensors(str(folder / path.name), cast, {"format": "mlx"})
    return folder


def prepare(folder: Path, model: Path, lengths: list[int], args: argparse.Namespace) -> None:
    """Both trainings' data and settings."""
    found = rows(models.load_tokenizer(model), lengths)
    shutil.copytree(REPO / "conf", folder / "conf")
    for split, part in (("train", found), ("valid", found[: args.batch_size])):
        (folder / "data").mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {
        "num_layers": args.num_layers,
        "batch_size": args.batch_size,
        "iters": len(lengths) // args.batch_size,
        "learning_rate": 1e-5,
        "steps_per_report": 10,
        "steps_per_eval": 10000,
        "save_every": 100,
        "val_batches": -1,
        "mask_prompt": True,
        "max_seq_length": 2048,
        "grad_checkpoint": args.grad_checkpoint,
    }
    ours = [f"train.{key}={json.dumps(value)}" for key, value in settings.items()]
    for stage in (["config", f"model.path={model}", *ours], ["prepare"]):
        run([sys.executable, "-m", f"athanor.{stage[0]}", *stage[1:]], folder, {})
    settings |= {"model": str(model), "data": "data", "train": True, "adapter_path": "theirs"}
    settings["lora_parameters"] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    (folder / "theirs.json").write_text(json.dumps(settings), encoding="utf-8")


def run(command: list[str], folder: Path, env: dict[str, str]) -> float:
    """Runs a command and returns the seconds that it took."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs.db"}
        | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return time.perf_counter() - start


def compare(title: str, lengths: list[int], args: argparse.Namespace) -> None:
    """Times both trainings in turn and prints the ratio of each pair."""
    theirs = [str(Path(sys.executable).with_name("mlx_lm.lora")), "--config", "theirs.json"]
    env = {} if BLAS == "wheel" else {"LD_PRELOAD": BLAS}
    if models.on_cpu():
        env["MLX_DISABLE_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model.resolve()
        model = in_float32(model, folder / "model") if models.on_cpu() else model
        prepare(folder, model, lengths, args)
        times: list[tuple[float, float]] = []
        for number in range(args.runs + 1):
            ours = run([sys.executable, "-m", "athanor.train"], folder, {})
            pair = (ours, run(theirs, folder, env))
            if number:  # the first pair warms up
                times.append(pair)
    ratios = [ours / peers for ours, peers in times]
    print(
        f"{title}: {len(lengths)} rows, {sum(lengths)} tokens; athanor.train "
        f"{statistics.median(ours for ours, _ in times):.1f} s, mlx_lm.lora "
        f"{statistics.median(peers for _, peers in times):.1f} s; ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx_lm.lora beside athanor.train")
    parser.add_argument("--model", type=Path, default=REPO / "models/tiny")
    parser.add_argument("--num-layers", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--grad-checkpoint", action="store_true")
    args = parser.parse_args()
    count = args.batch_size * args.batches
    print(f"on {models.device()}, {args.runs} pairs of runs")
    compare("rows of 64 tokens", [64] * count, args)
    drawn = np.random.default_rng(0).lognormal(4, 0.8, count)
    compare("log-normal rows", [int(n) for n in np.clip(drawn, 16, 1024)], args)


if __name__ == "__main__":
    main()
