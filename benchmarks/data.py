"""How long rows take to be prepared, beside `datasets`' own load and tokenize of the same file.

    uv run python benchmarks/data.py                       # a million rows: half an hour
    uv run python benchmarks/data.py --rows 100000         # a look

For rows of plain text both sides give the text to the tokenizer; for questions and answers both
give them to the chat template first, the other side in `datasets`' batches, which is its fastest
way. Each run is a process of its own with the same cores for the tokenizer's threads; what is
counted begins after the imports and ends when everything is written. The other side does nothing
but load, tokenize and write; prepare also checks, shares out, compares and reports.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).parent.parent
MODEL = REPO / "models" / "tiny"
SIDES = ("datasets", "athanor", "athanor, near leaks too")


def load_and_tokenize(folder: Path, format: str) -> Callable[[], int]:
    """Return the work of the other side: Hugging Face's datasets and transformers."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if format == "text":
            return dict(tokenizer(batch["text"]))
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        return dict(tokenizer(texts, add_special_tokens=False))

    def work() -> int:
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset(
                "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache
            )
            return len(rows.map(tokenize, batched=True))

    return work


def prepare(folder: Path, near: bool) -> Callable[[], int]:
    """Our side: the whole stage but MLflow, which it does not touch, and Hydra."""
    from athanor.config.compose import compose_config
    from athanor.config.values import to_dataclass
    from athanor.prepare.prepare import prepare as stage

    overrides = [f"model.path={MODEL}", "train.max_seq_length=2048"]
    config = to_dataclass(compose_config(REPO / "conf", overrides))
    config.data.checks["near_leak"] = "skip" if near else "ignore"

    def work() -> int:
        with tempfile.TemporaryDirectory() as out:
            report = stage(folder, Path(out), config)
        return int(report["rows"]["read"])

    return work


def one_side(side: str, folder: Path, format: str) -> None:
    """Run one side in this process and print its rows a second and its peak memory in MB."""
    if side == "datasets":
        work = load_and_tokenize(folder, format)
    else:
        work = prepare(folder, near=side.endswith("too"))
    start = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / (1e6 if sys.platform == "darwin" else 1e3)
    print(json.dumps({"rows_per_second": count / seconds, "peak_mb": peak_mb}))


def measured(side: str, folder: Path, format: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--formats", format],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(format: str, rows: int, repeats: int) -> None:
    """Print the medians of both sides, and the ratios of consecutive runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [
                *(sys.executable, "-m", "athanor.synthesize", str(folder / "rows.jsonl")),
                *("--rows", str(rows), "--format", format),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        print(f"{rows:,} rows of {format}, {size:.0f} MB", flush=True)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(repeats):
            for side in SIDES:
                runs[side].append(measured(side, folder, format))
        for side, found in runs.items():
            speeds = [run["rows_per_second"] for run in found]
            ratios = [
                run["rows_per_second"] / other["rows_per_second"]
                for run, other in zip(found, runs["datasets"], strict=True)
            ]
            print(
                f"  {side:24} {statistics.median(speeds):8,.0f} rows/s   "
                f"{statistics.median(ratios):.2f} of datasets' "
                f"({min(ratios):.2f} to {max(ratios):.2f})   "
                f"peak {max(run['peak_mb'] for run in found):,.0f} MB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["text", "completions"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        one_side(args.side, args.folder, args.formats[0])
        return
    for format in args.formats:
        compare(format, args.rows, args.repeats)


if __name__ == "__main__":
    main()
