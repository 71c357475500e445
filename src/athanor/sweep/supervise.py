"""The supervisor of a sweep: it starts the worker, and again where the worker was killed."""

import os
import signal
import subprocess
import uuid
from contextlib import suppress
from typing import Any

# Variables for the worker: a unique name of this start, and the cause of the last worker's end.
COMMAND = "ATHANOR_SWEEP_COMMAND"
ENDED_BY = "ATHANOR_SWEEP_ENDED_BY"
# The exit status of a worker of which another process was killed.
LOST = 70


def supervise(command: list[str]) -> int:
    """Run the worker, again where it was killed, and return its exit status.

    The worker records which trial was running, and does not start that one again.
    """
    environment = os.environ | {COMMAND: uuid.uuid4().hex}
    signals: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: Any) -> None:
        signals.append(number)
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            # The worker ends when this pipe does, however this process ended. Signals reach it
            # through this process alone, so that it gets one for each Ctrl-C.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, process_group=0
            )
            status = process.wait()
            if signals or (status >= 0 and status != LOST):
                return status if status >= 0 else 128 - status
            cause = signal.Signals(-status).name if status < 0 else "the system"
            environment |= {ENDED_BY: cause}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
