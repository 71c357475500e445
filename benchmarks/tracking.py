"""What the record of a training costs, in shares of the training's time.

    uv run python benchmarks/tracking.py        # ten minutes

Trains the tiny model on made rows, each time as a process with an SQLite store of its own, and
counts inside of it: the seconds that the training's own thread spends in saying things to the run,
the processor's seconds of the thread that sends them, and, each by itself, the seconds to import
MLflow and to make a new store, which a training has once however long it is, and the wait at the
end for what was not sent yet. Said for the default report every few iterations, and for one of
every iteration.
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
    """Runs stage train in this process, and returns where its time went."""
    from athanor.runs import tracking_store
    from athanor.runs.run import Run
    from athanor.train import __main__ as train_main
    from athanor.train.trainer import Trainer

    spent = dict.fromkeys(("training", "saying", "opening", "waiting", "sending"), 0.0)

    def count(place: Any, what: str, name: str, clock: Callable[[], float]) -> None:
        done = getattr(place, what)

        def counted(*args: Any, **options: Any) -> Any:
            start = clock()
            try:
                return done(*args, **options)
            finally:
                spent[name] += clock() - start

        setattr(place, what, counted)

    count(Trainer, "run", "training", time.perf_counter)
    for what in ("log_metrics", "set_tags", "log_artifact", "log_text", "log_table"):
        count(Run, what, "saying", time.perf_counter)
    for what in ("wait_for_id", "__exit__"):
        count(Run, what, "waiting", time.perf_counter)
    # All of the tracking thread, and what of it is the import of MLflow and the store's making.
    count(Run, "_work", "sending", time.thread_time)
    count(tracking_store, "connect", "opening", time.thread_time)
    sys.argv = ["train"]
    train_main.main()
    return spent | {"sending": spent["sending"] - spent["opening"]}


def trained(folder: Path) -> Seconds:
    """Measures in a process of its own, on a store that is not there yet."""
    shutil.rmtree(folder / "mlruns", ignore_errors=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(Path(__file__).resolve()), "--inside"]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found: Seconds = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="what the record of a training costs")
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
            found = [trained(folder) for _ in range(args.runs + 1)][1:]  # the first warms up
            shares = [(one["saying"] + one["sending"]) / one["training"] for one in found]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            print(
                f"{'default reports' if every is None else 'a report every iteration'}: "
                f"{args.iters} iterations in {middle['training']:.1f} s; said in "
                f"{middle['saying']:.3f} s, sent with {middle['sending']:.3f} s of a processor: "
                f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}); once: "
                f"import and a new store {middle['opening']:.1f} s of a processor, beside it; "
                f"{middle['waiting']:.2f} s of waiting for it at the end"
            )


if __name__ == "__main__":
    main()
