"""How long training takes, beside mlx_lm.lora on the same work: one table.

    uv run python benchmarks/training.py                          # all, an hour on two cores
    uv run python benchmarks/training.py --only tiny,qwen-4 --repeats 3
    uv run python benchmarks/training.py --device gpu             # Metal or CUDA

Each training is a process, timed from start to end: loading, two validations, adapters written;
Athanor's with its SQLite store, checkpoints, and its measurement of what the longest batch needs.
Both have the same rows, batch size, epochs, rank and BLAS, and on a CPU neither compiles
(--compile lets both) and both read float32. The two alternate. Peak memory is mlx's own figure.
"apart" is the largest relative difference between the losses of our iterations and those of a plain
loop on the same batches: every layer, every epoch, every position, mlx's own cross-entropy.

`tiny` is this repository's own training. The others are models of random weights in the shape of
Qwen2.5-0.5B (24 layers 896 wide, 151,936 tokens in the vocabulary) on 16 rows of 64 tokens, 60% of
them prompt, 4 a batch, for 5 epochs; `lengths` are 64 log-normal rows (16 to 256 tokens), 8 a
batch, one epoch; `logits` two such layers on rows of 512, 8 a batch. Sweeps are ours of nine points
against nine processes of mlx_lm.lora; ours also measures each point on every row, and asks it for
a token of some.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: off
import athanor  # noqa: F401  first: it says which BLAS mlx computes with

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2

# isort: on
from athanor import files
from athanor.chat.load import load_tokenizer
from athanor.compute.dropouts import replace_dropouts
from athanor.config.compose import load_config
from athanor.device import blas
from athanor.device.backend import describe_device, on_cpu
from athanor.model.adapters import make_trainable
from athanor.model.load import copy_sharing_weights
from athanor.paths import Workspace
from athanor.prepare.result import Prepared, read_rows
from athanor.train.batches import Batches
from athanor.train.build import build_trainer

REPO = Path(__file__).parent.parent
PEER = (
    "import mlx.core as mx; from mlx_lm import lora; lora.main(); "
    "print('peak', mx.get_peak_memory())"
)
RATES, LAYERS = ("1e-4", "3e-4", "1e-3"), (2, 4, 8)


@dataclass(frozen=True)
class Work:
    """What is trained: on a model with so many layers (0 for models/tiny), on rows so long."""

    name: str
    layers: int
    trained: int
    lengths: tuple[int, ...]
    batch_size: int = 4
    epochs: int = 5
    prompt: float = 0.6
    sweep: bool = False

    @property
    def iters(self) -> int:
        return self.epochs * (len(self.lengths) // self.batch_size)


def workloads() -> list[Work]:
    """All of them."""
    drawn = np.random.default_rng(0).lognormal(4, 0.8, 64)
    lengths = tuple(int(length) for length in np.clip(drawn, 16, 256))
    short = (64,) * 16
    return [
        Work("tiny", 0, -1, (24,) * 6, batch_size=6, epochs=40),
        Work("qwen-4", 24, 4, short),
        Work("qwen-8", 24, 8, short),
        Work("qwen-all", 24, -1, short),
        Work("lengths", 24, -1, lengths, batch_size=8, epochs=1),
        Work("logits", 2, -1, (512,) * 8, batch_size=8, epochs=3),
        Work("sweep-tiny", 0, -1, (24,) * 6, batch_size=6, epochs=40, sweep=True),
        Work("sweep-qwen", 24, 8, short, sweep=True),
    ]


def make_model(folder: Path, layers: int) -> Path:
    """Write a model of random weights in Qwen2.5-0.5B's shape, with the tiny tokenizer."""
    shutil.copytree(REPO / "models/tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = files.read_json(folder / "config.json") | {
        "hidden_size": 896,
        "num_hidden_layers": layers,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32 if on_cpu() else mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def in_float32(folder: Path) -> Path:
    """models/tiny with its weights in float32, in which mlx is fast on a CPU."""
    shutil.copytree(REPO / "models/tiny", folder)
    for path in folder.glob("*.safetensors"):
        weights: Any = mx.load(str(path))
        cast = {name: value.astype(mx.float32) for name, value in weights.items()}
        path.unlink()
        mx.save_safetensors(str(path), cast, {"format": "mlx"})
    return folder


def made_rows(tokenizer: Any, work: Work) -> list[dict[str, str]]:
    """Rows whose conversations have these many tokens, the question's share as is said."""
    draw = np.random.default_rng(0)
    # Words that are a token each, alone and after one another.
    letters = [chr(code) for code in range(0x4E00, 0x4F00)]
    known = [one for one in letters if len(tokenizer.encode(one, add_special_tokens=False)) == 1]

    def text(length: int) -> str:
        return "".join(draw.choice(known, max(1, length)))

    def tokens(row: dict[str, str], end: int) -> int:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        asked = end == 1
        found = tokenizer.apply_chat_template(
            messages[:end], return_dict=False, add_generation_prompt=asked
        )
        return len(found)

    found = []
    for length in work.lengths:
        row = {"prompt": "一", "completion": "一"}
        row["prompt"] = text(int(length * work.prompt) - tokens(row, 1) + 1)
        row["completion"] = text(length - tokens(row, 2) + 1)
        while tokens(row, 2) > length and len(row["completion"]) > 1:  # merged unexpectedly
            row["completion"] = row["completion"][:-1]
        found.append(row)
    return found


def prepare(folder: Path, model: Path, work: Work, args: argparse.Namespace) -> None:
    """Both sides' data and settings."""
    shutil.copytree(REPO / "conf", folder / "conf")
    if work.layers:
        found = made_rows(load_tokenizer(model), work)
        splits = {"train": found, "valid": found[: work.batch_size], "test": found[:1]}
    else:
        kept = {s: files.read_jsonl(REPO / f"data/{s}.jsonl") for s in ("train", "valid", "test")}
        # mlx-lm takes no fewer rows than a batch has.
        splits = {**kept, "valid": kept["valid"] + kept["test"], "test": kept["test"][:1]}
    (folder / "data").mkdir()
    for split, part in splits.items():
        files.write_jsonl(folder / f"data/{split}.jsonl", part)
    same: dict[str, Any] = {
        "num_layers": work.trained,
        "batch_size": work.batch_size,
        "iters": work.iters,
        "learning_rate": 2e-4,
        "steps_per_report": 5,
        "steps_per_eval": 10000,
        "save_every": 100,
        "val_batches": -1,
        "mask_prompt": True,
        "max_seq_length": 2048,
    }
    ours = [f"train.{key}={json.dumps(value)}" for key, value in same.items()]
    ours += [f"model.path={model}", f"train.compile={json.dumps(args.compile)}"]
    ours += ["test.max_tokens=1", "test.max_rows=1"]
    # Some rows are validated with that are trained on; and the model's own are random characters.
    ours += [f"data.checks.{check}=warn" for check in ("leak", "near_leak", "duplicate")]
    (folder / "ours.json").write_text(json.dumps(ours), encoding="utf-8")
    run([sys.executable, "-m", "athanor.config", *ours], folder, {})
    run([sys.executable, "-m", "athanor.prepare"], folder, {})
    same |= {"model": str(model), "data": "data", "train": True, "adapter_path": "theirs"}
    same["lora_parameters"] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    (folder / "theirs.json").write_text(json.dumps(same), encoding="utf-8")


def run(command: list[str], folder: Path, env: dict[str, str]) -> tuple[float, str]:
    """Run a command; return the seconds that it took, and its output."""
    start = time.perf_counter()
    inherited = {key: v for key, v in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=inherited | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs.db"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return time.perf_counter() - start, done.stdout


def theirs(folder: Path, args: argparse.Namespace, changed: dict[str, Any]) -> tuple[float, float]:
    """Seconds and peak memory in GB of mlx_lm.lora."""
    config = files.read_json(folder / "theirs.json") | changed
    (folder / "now.json").write_text(json.dumps(config), encoding="utf-8")
    openblas = blas.library()
    env = {} if openblas is None else {"LD_PRELOAD": openblas._name}
    if not args.compile:
        env["MLX_DISABLE_COMPILE"] = "1"
    seconds, said = run([sys.executable, "-c", PEER, "--config", "now.json"], folder, env)
    return seconds, float(said.split("peak ")[-1]) / 1e9


def ours(folder: Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of athanor.train."""
    shutil.rmtree(folder / "artifacts/train", ignore_errors=True)
    seconds, _ = run([sys.executable, "-m", "athanor.train"], folder, {})
    return seconds, files.read_json(folder / "artifacts/train/metrics.json")["peak_memory"]


def both(folder: Path, work: Work, args: argparse.Namespace) -> tuple[tuple[float, float], ...]:
    """Seconds and peak memory of ours, and of theirs."""
    if not work.sweep:
        return ours(folder), theirs(folder, args, {})
    layers = LAYERS if work.layers else (2, 4, -1)
    shutil.rmtree(folder / "artifacts/sweep", ignore_errors=True)
    swept = [f"train.learning_rate={','.join(RATES)}"]
    swept += [f"train.num_layers={','.join(map(str, layers))}"]
    given = [
        one
        for one in json.loads((folder / "ours.json").read_text("utf-8"))
        if one.split("=")[0] not in ("train.learning_rate", "train.num_layers")
    ]
    seconds, _ = run([sys.executable, "-m", "athanor.sweep", *given, "-m", *swept], folder, {})
    peaks = [
        files.read_json(path)["peak_memory"]
        for path in (folder / "artifacts/sweep/points").glob("*/metrics.json")
    ]
    assert len(peaks) == len(RATES) * len(layers)
    pairs = [
        theirs(folder, args, {"learning_rate": float(rate), "num_layers": number})
        for rate in RATES
        for number in layers
    ]
    return (seconds, max(peaks)), (sum(s for s, _ in pairs), max(p for _, p in pairs))


def apart(folder: Path, iters: int, double: bool) -> float:
    """Return the largest relative difference of our first losses to a plain loop's."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        shutil.rmtree("artifacts/train", ignore_errors=True)
        short = ["train.steps_per_report=1", f"train.iters={iters}"]
        run([sys.executable, "-m", "athanor.train", *short], folder, {})
        history = Path("artifacts/train/history.csv").read_text("utf-8").splitlines()
        place = history[0].split(",").index("train_loss")
        found = [float(cell) for line in history[1:] if (cell := line.split(",")[place])]
        expected = list(plain_losses(iters, double))
    finally:
        os.chdir(before)
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def plain_losses(iters: int, double: bool) -> Iterator[float]:
    """Yield the losses of the training in this folder, nothing left out and nothing kept.

    `double`: in float64. In float32 mlx's sum of exponentials on a CPU is percents off where a loss
    is as small as what tiny learns leaves.
    """
    cfg = load_config([])
    workspace = Workspace.here()
    base = Prepared.read(cfg, workspace)
    model, tokenizer = base.load()
    tokens = base.tokens(read_rows(workspace, ["train"])["train"], tokenizer, cfg)
    make_trainable(model, cfg.train, cfg.seed)
    assert not replace_dropouts(model)
    trainer = build_trainer(cfg, workspace, copy_sharing_weights(model), tokens, tokens)
    batches = Batches(tokens, cfg.train.batch_size, cfg.seed)
    learner = trainer.learner

    def loss(model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        logits = model(inputs).astype(mx.float64 if double else mx.float32)
        return (nn.losses.cross_entropy(logits, targets) * mask).sum()

    with_gradient = nn.value_and_grad(model, loss)
    for iteration in range(1, iters + 1):
        batch = batches(iteration)
        width = max(map(len, batch.rows))
        ids = np.zeros((len(batch.rows), width), np.int32)
        mask = np.zeros((len(batch.rows), width), np.float32)
        for i, row in enumerate(batch.rows):
            ids[i, : len(row)], mask[i, : len(row)] = row.ids, row.supervised
        arrays = [mx.array(ids[:, :-1]), mx.array(ids[:, 1:]), mx.array(mask[:, 1:])]
        model.update(tree_unflatten(learner.weights))
        total, gradient = with_gradient(model, *arrays)
        learner.add(tree_flatten(gradient, destination={}))
        learner.update(mx.array(1 / batch.tokens))
        mx.eval(total, learner.weights, learner.optimizer.state)
        yield total.item() / batch.tokens


def operations(work: Work) -> float | None:
    """How many times fewer products ours needs, by the count of multiplications in matrices.

    Forward and back through the layers and the head, for each token; what is frozen is computed
    once by ours, and gradients are taken of what it is given only.
    """
    if not work.layers or work.sweep:
        return None
    layer = 2 * 896 * (896 + 128) + 3 * 896 * 4864
    head = 151936 * 896
    trained = work.layers if work.trained == -1 else work.trained
    frozen = work.layers - trained
    padded = _padded_by_peer(work) / sum(work.lengths)
    theirs = padded * (work.layers + trained) * layer + padded * 2 * head
    ours = (2 * trained + frozen / work.epochs) * layer + 2 * (1 - work.prompt) * head
    return theirs / ours


def _padded_by_peer(work: Work) -> int:
    """Count the positions of mlx-lm's batches: its rows are not sorted, and padded to 32."""
    lengths, size = work.lengths, work.batch_size
    found = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(size * 32 * -(-max(batch) // 32) for batch in found)


def compare(work: Work, args: argparse.Namespace, made: Path) -> str:
    """Time both sides in turn; return a line of the table."""
    model = made / f"model-{work.layers}"
    if not model.exists():
        if work.layers:
            make_model(model, work.layers)
        elif on_cpu():
            in_float32(model)
        else:
            model = REPO / "models/tiny"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, model, work, args)
        # Into the second epoch is enough where an iteration of the plain loop takes many seconds.
        iters = min(work.iters, 6 if work.layers else 40)
        if not work.layers:
            ours(folder)  # a store is made once, in two seconds
        pairs = [both(folder, work, args) for _ in range(args.repeats)]
        differ = (
            None
            if work.sweep or args.compile
            else apart(folder, iters, on_cpu() and not work.layers)
        )
    mine, peers = zip(*pairs, strict=True)
    ratios = sorted(b[0] / a[0] for a, b in pairs)
    limit = operations(work)
    cells = [
        f"{work.name:<11}",
        f"{statistics.median(s for s, _ in mine):7.1f} s",
        f"{statistics.median(s for s, _ in peers):7.1f} s",
        f"{statistics.median(ratios):6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{limit:5.2f}" if limit else "     ",
        f"{max(p for _, p in mine):6.2f} of {max(p for _, p in peers):5.2f} GB",
        f"{differ:.0e}" if differ is not None else "",
    ]
    return "  ".join(cells).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="athanor.train beside mlx_lm.lora")
    names = [work.name for work in workloads()]
    parser.add_argument("--only", default=",".join(names), help="of " + ", ".join(names))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", default=None, help="both; else on a GPU")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="refuse to measure another")
    args = parser.parse_args()
    here = "cpu" if on_cpu() else "gpu"
    if args.device not in (None, here):
        parser.error(f"--device {args.device}: mlx computes on {describe_device()} here")
    if args.compile is None:
        args.compile = not on_cpu()
    if unknown := set(args.only.split(",")) - set(names):
        parser.error(f"no such workload: {', '.join(unknown)}")
    print(f"on {describe_device()}, compiled: {args.compile}, {args.repeats} times in turn")
    heads = ("athanor", "mlx_lm.lora", "faster, median (of all)", "by count", "peak memory")
    print(" " * 13 + "  ".join([*heads, "apart"]), flush=True)
    with tempfile.TemporaryDirectory() as made:
        for work in workloads():
            if work.name in args.only.split(","):
                print(compare(work, args, Path(made)), flush=True)


if __name__ == "__main__":
    main()
