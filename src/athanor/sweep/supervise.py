"""A sweep: many trainings on what `prepare` left, compared by their validation loss.

    uv run python -m athanor.sweep -m train.learning_rate=1e-4,3e-4 train.num_layers=2,4,-1
    uv run python -m athanor.sweep sweep=grid                 # named ones are in conf/sweep/
    uv run python -m athanor.sweep sweep=search               # chosen by Optuna
    uv run python -m athanor.sweep sweep=grid hydra/launcher=joblib hydra.launcher.n_jobs=2

Composes conf/ with Hydra's multirun; reads artifacts/prepare/; writes to MLflow a run for the sweep
and one below it for each point, and to artifacts/sweep/ a summary and the adapters. Nothing of the
pipeline is touched. Points that were trained before are not trained again, so the same command goes
on where it was interrupted. A point that fails is noted, and the rest goes on: also where its
process was killed, since the work is done in a process that this one watches.
"""

import os
import signal
import subprocess
import uuid
from contextlib import suppress
from typing import Any

# How the two processes speak: which start of the sweep this is, and what ended the last worker.
COMMAND = "ATHANOR_SWEEP_COMMAND"


ENDED_BY = "ATHANOR_SWEEP_ENDED_BY"


# The exit status of a worker of which another process was killed.
LOST = 70


def supervise(command: list[str]) -> int:
    """Runs the worker, again where it was killed, and returns its exit status.

    The worker notes which point was under way, and does not take that up again.
    """
    environment = os.environ | {COMMAND: uuid.uuid4().hex}
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def tell(number: int, frame: Any) -> None:
        asked.append(number)
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            # It ends when this pipe does, however that came; signals reach it through us alone,
            # so that one Ctrl-C is one.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, process_group=0
            )
            status = process.wait()
            if asked or (status >= 0 and status != LOST):
                return status if status >= 0 else 128 - status
            cause = signal.Signals(-status).name if status < 0 else "the system"
            environment |= {ENDED_BY: cause}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
