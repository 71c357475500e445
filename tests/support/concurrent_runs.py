"""Processes that record a run each in the same new stores, at once."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from athanor.runs.entries import Dataset
from athanor.runs.run import start_run

PROCESSES, ROUNDS, STEPS = 8, 5, 30
KEYS = ("train_loss", "val_loss")


def record(number: int, folder: Path, barrier: Any) -> None:
    """Record a run in each round's store, which none of the processes finds there."""
    rows = Dataset("train.jsonl", "training", "0" * 64, 6)
    params = {f"train.key_{i}": i for i in range(30)}
    for stored in range(ROUNDS):
        os.chdir(folder / f"round {stored}")
        barrier.wait()
        with start_run(f"run {number}", params, {"number": number}, [rows]) as run:
            for step in range(1, STEPS + 1):
                run.log_metrics(step, dict.fromkeys(KEYS, number * 1000 + step), once=True)
                if step == STEPS // 2:
                    run.set_tags({"half": "way"})
            run.log_text(f"seed: {number}", "params.yaml")


def record_together(folder: Path) -> int:
    """Fork the processes from one that has imported MLflow; return how many failed."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)
    workers = [
        context.Process(target=record, args=(number, folder, barrier))
        for number in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


if __name__ == "__main__":
    sys.exit(record_together(Path(sys.argv[1])))
