"""The supervisor of a sweep: it starts the worker, and again where the worker was killed."""

import os
import signal
import subprocess
import uuid
from contextlib import suppress
from typing import Any

from athanor import switches

# Variables: a unique name of this start, the cause of the last worker's end, the worker's process.
COMMAND = "ATHANOR_SWEEP_COMMAND"
ENDED_BY = "ATHANOR_SWEEP_ENDED_BY"
WORKER = "ATHANOR_SWEEP_WORKER"
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

    before = {number: signal.signal(number, forward) for number in switches.interrupts()}
    try:
        while True:
            # The worker ends when this pipe does, however this process ended. Signals reach it
            # through this process alone, so that it gets one for each Ctrl-C.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, process_group=0
            )
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            if ended is not None and ended.si_code != os.CLD_EXITED:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)  # what a launcher started in its group
            status = process.wait()
            if signals or (status >= 0 and status != LOST):
                return status if status >= 0 else 128 - status
            cause = signal.Signals(-status).name if status < 0 else "the system"
            environment |= {ENDED_BY: cause}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
