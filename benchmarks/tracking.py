"""Measure the cost of recording a training, as shares of the training's time.

    uv run python benchmarks/tracking.py        # ten minutes

Trains the tiny model on synthetic rows, each time as a process with an SQLite store of its own, and
counts inside of it: the seconds that the training's own thread spends in calls to the run, the
processor's seconds of the thread that sends the entries, and separately those to import MLflow and
create a store, which every training has once, and the wait at the end for unsent entries. Prints
them for the default reports every few iterations, and for a report every iteration.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
Seconds = dict[str, float]


def measure() -> Seconds:
    """Run stage train in this process; return the seconds spent by activity."""
    from athanor.runs import tracking_store
    from athanor.runs.run import Run
    from athanor.train import __main__ as train_main
    from athanor.train.trainer import Trainer

    spent = dict.fromkeys(("training", "recording", "opening", "waiting", "sending"), 0.0)

    def count(owner: Any, function: str, name: str, clock: Callable[[], float]) -> None:
        original = getattr(owner, function)

        def counted(*args: Any, **options: Any) -> Any:
            start = clock()
            try:
                return original(*args, **options)
            finally:
                spent[name] += clock() - start

        setattr(owner, function, counted)

    count(Trainer, "run", "training", time.perf_counter)
    for method in ("log_metrics", "set_tags", "log_artifact", "log_text", "log_table"):
        count(Run, method, "recording", time.perf_counter)
    for method in ("wait_for_id", "__exit__"):
        count(Run, method, "waiting", time.perf_counter)
    # All of the tracking thread, and its part that imports MLflow and creates the store.
    count(Run, "_work", "sending", time.thread_time)
    count(tracking_store, "connect", "opening", time.thread_time)
    sys.argv = ["train"]
    train_main.main()
    return spent | {"sending": spent["sending"] - spent["opening"]}


def measure_in_process(folder: Path) -> Seconds:
    """Measure in a process of its own, on a store that does not exist yet."""
    shutil.rmtree(folder / "mlruns", ignore_errors=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(Path(__file__).resolve()), "--inside"]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    seconds: Seconds = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of recording a training.")
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure()))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(REPO / "conf", folder / "conf")
        (folder / "models").symlink_to(REPO / "models")
        python = (sys.executable, "-m")
        rows = ("athanor.synthesize", "data/rows.jsonl", "--rows", "60")
        subprocess.run([*python, *rows], cwd=folder, check=True, capture_output=True)
        for every in (None, 1):
            settings = [f"train.iters={args.iters}", "train.steps_per_eval=100", "experiment=null"]
            settings += [] if every is None else [f"train.steps_per_report={every}"]
            for stage in (["athanor.config", *settings], ["athanor.prepare"]):
                subprocess.run([*python, *stage], cwd=folder, check=True, capture_output=True)
            runs = [measure_in_process(folder) for _ in range(args.runs + 1)][1:]  # one warms up
            shares = [(run["recording"] + run["sending"]) / run["training"] for run in runs]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(
                f"{'default reports' if every is None else 'a report every iteration'}: "
                f"{args.iters} iterations in {middle['training']:.1f} s; recorded "
                f"in {middle['recording']:.3f} s, sent with {middle['sending']:.3f} s of CPU: "
                f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}); once: "
                f"import and a new store {middle['opening']:.1f} s of CPU in parallel; "
                f"{middle['waiting']:.2f} s of waiting for it at the end"
            )


if __name__ == "__main__":
    main()
