"""Process-wide switches: all that a stage changes in Python and in libraries for a whole process.

None of these changes a result. Those that do are in the room device: device.blas has the threads of
OpenBLAS, device.backend turns mlx's compiler on or off.

Collector, threads: `freeze_objects`, `rare_collections`, `switch_threads_often`
Signals:            `interrupt_on_signals`, `end_with_parent`
mlx:                `limit_cache`, `wire_memory`, `release_memory`
Other libraries:    `disable_telemetry`, `parallel_tokenizers`, `configure_mlflow`,
                    `mlflow_timeout`, `configure_hydra`
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TELEMETRY = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Seconds for a checkpoint in a process whose parent is gone, before it is killed.
GRACE = 5
# Seconds that a Python thread runs before another may; Python's default is the second.
OFTEN, USUALLY = 0.0005, 0.005
MLFLOW = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Else a copy of uv.lock, which names this machine's package registry, goes into each model.
    "MLFLOW_LOG_UV_FILES": "false",
    # The journal retries: MLflow's client would create a second run where only an answer was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # A server answers once it has written a file to wherever it keeps files.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def freeze_objects() -> None:
    """Exempt all present objects from garbage collection for good.

    Imported modules stay: scanning them takes half a second once MLflow is among them.
    """
    gc.freeze()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect cyclic garbage rarely while the block runs.

    Rows have no cycles and are freed as they go; looking for some takes a tenth of the time.
    """
    previous = gc.get_threshold()
    gc.set_threshold(100_000, *previous[1:])
    try:
        yield
    finally:
        gc.set_threshold(*previous)


def switch_threads_often(on: bool) -> None:
    """Let a training wait 0.5 ms for the thread that imports MLflow, or again Python's 5 ms."""
    sys.setswitchinterval(OFTEN if on else USUALLY)


def interrupts() -> list[signal.Signals]:
    """Return the signals that stop a command: Ctrl-C, SIGTERM, and a closed terminal's SIGHUP.

    Those that whoever started it has it ignore, as nohup does, are left out.
    """
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]


def interrupt_on_signals() -> None:
    """Make the signals that stop a command raise KeyboardInterrupt, as Ctrl-C does."""
    for number in interrupts():
        signal.signal(number, signal.default_int_handler)


def end_with_parent(wait: Callable[[], object], group: bool = False) -> None:
    """Stop this process as SIGTERM does when `wait` returns, and kill it where that takes long.

    Args:
        wait: returns when the process that this one belongs to is gone.
        group: whether the processes of its group, which it leads, end with it.
    """

    def end() -> None:
        wait()
        target = 0 if group else os.getpid()
        os.kill(target, signal.SIGTERM)
        time.sleep(GRACE)
        os.kill(target, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def wait_for_end(process: int) -> None:
    """Return when a process of this machine has ended, or the one that started this one."""
    parent = os.getppid()
    with suppress(ProcessLookupError):
        while os.getppid() == parent:
            os.kill(process, 0)
            time.sleep(0.5)


def limit_cache(size: int) -> None:
    """Let mlx keep at most `size` bytes of freed memory, until the next training sets its own."""
    import mlx.core as mx

    mx.set_cache_limit(size)


def wire_memory() -> None:
    """Keep a large model from being paged out by Metal."""
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()


def release_memory() -> None:
    """Free all that the last trial left in memory, and exempt the rest from later collections."""
    import mlx.core as mx

    gc.collect()
    gc.freeze()
    mx.clear_cache()


def disable_telemetry() -> None:
    """Keep libraries from sending usage statistics, before they are imported."""
    for name, value in TELEMETRY.items():
        os.environ.setdefault(name, value)
    # Else tokenizers warn in every child process; see `parallel_tokenizers`.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parallel_tokenizers() -> None:
    """Let tokenizers use all cores; for processes that do not fork, which its threads forbid."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def configure_mlflow() -> None:
    """Make MLflow quiet and impatient, before it is imported; the user's variables win."""
    for name, value in MLFLOW.items():
        os.environ.setdefault(name, value)


@contextmanager
def mlflow_timeout(seconds: int) -> Iterator[None]:
    """Give MLflow's server at least so long to answer while the block runs.

    `configure_mlflow` was called before.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    previous = os.environ[name]
    os.environ[name] = str(max(int(previous), seconds))
    try:
        yield
    finally:
        os.environ[name] = previous


def configure_hydra(optuna: bool) -> None:
    """Make Hydra raise a job's exceptions as they are, and its Optuna sweeper report less."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if optuna:
        from optuna.logging import WARNING, set_verbosity

        set_verbosity(WARNING)
