"""Import the large libraries, then fork a process for each request, until standard input ends."""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "dvc.cli",
    "dvc.commands.repro",
    "dvc.repo",
    "hydra",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlx_lm.generate",
    "mlx_lm.tuner.utils",
    "mlx_lm.utils",
    "transformers",
)
# What these read when they are imported, as src/athanor/__init__.py and conftest.py set it.
ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


def import_libraries() -> None:
    """Import what stages import, and no code of ours: a process has that of its own folder."""
    os.environ.update(ENVIRONMENT)
    with suppress(OSError):  # before mlx, whose BLAS it replaces
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()


def run_for(connection: socket.socket, python: Path) -> None:
    """Run the process that a client asks for, and send it the exit status."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    (length,) = struct.unpack("!I", head)
    request = b""
    while len(request) < length:
        request += connection.recv(length - len(request))
    process = os.fork()
    if process == 0:
        connection.close()
        module, arguments, folder, environment = json.loads(request)
        become(module, arguments, folder, environment, streams, python)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(process)
    watched: list[Any] = [ended, connection]
    while ended not in (ready := select.select(watched, [], [])[0]):
        signals = ready[0].recv(1)
        if not signals:
            watched.remove(connection)
        with suppress(ProcessLookupError):  # a client that is killed takes its process along
            os.kill(process, signals[0] if signals else signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with suppress(OSError):
        connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))


def become(
    module: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    streams: list[int],
    python: Path,
) -> NoReturn:
    """Turn this fork into `python -m module arguments`, in a process group of its own."""
    status = 1
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = str(python)
        sys.stdin, sys.stdout = os.fdopen(0, "r"), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        if environment.get("PYTHONUNBUFFERED"):
            sys.stdout.reconfigure(line_buffering=True)
        own = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:0] = [folder, *own]
        sys.orig_argv = [str(python), "-m", module, *arguments]
        sys.argv = ["-m", *arguments]  # as Python has it until it finds the module
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        for output in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                output.flush()
        os._exit(status)


def main() -> None:
    """Listen on the socket that is named, until standard input ends."""
    address = Path(sys.argv[1])
    sys.path.pop(0)  # the folder of this file
    import_libraries()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks of this process
    os.write(1, b"ready\n")
    watched: list[Any] = [listener, 0]
    while 0 not in select.select(watched, [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            run_for(connection, address.parent / "bin/python")
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
