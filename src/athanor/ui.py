"""MLflow's UI on the store that runs are recorded in, for this machine alone.

    uv run python -m athanor.ui                 # all runs
    uv run python -m athanor.ui 3f2a            # one, by its id or the beginning of it; or a sweep
    uv run python -m athanor.ui 3f2a 77b1       # several side by side

Serves the store in mlruns/, or the database in MLFLOW_TRACKING_URI, on the loopback address until
Ctrl-C, after what waits in mlruns/outbox/ was sent there. Where MLFLOW_TRACKING_URI is a server's
address, its link is all that is needed.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from athanor import console, files, switches
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import mlflow_views, tracking_store
from athanor.runs.run import send_left_journals

# Not MLflow's own 5000, which macOS has its AirPlay receiver on.
PORT = 5199
SECONDS_TO_START = 120


def page(base: str, beginnings: Sequence[str]) -> str:
    """The link to what a person asked for, on the server at `base`.

    Raises:
        UserError: where the store has no runs, or not one that begins so, or several.
    """
    client = tracking_store.connect()
    experiment = client.get_experiment_by_name(tracking_store.EXPERIMENT)
    if experiment is None:
        raise UserError(
            f"{tracking_store.shown_uri()} has no runs yet: `uv run dvc repro --pull` makes one"
        )
    found = [tracking_store.find_run(beginning) for beginning in beginnings]
    if not found:
        query = mlflow_views.runs_view(client, experiment.experiment_id)
        return mlflow_views.link(base, experiment.experiment_id, query=query)
    place = found[0].info.experiment_id
    if len(found) > 1:
        return mlflow_views.compare_link(base, place, [run.info.run_id for run in found])
    run_id = found[0].info.run_id
    if "athanor.sweep" in found[0].data.tags:
        return mlflow_views.link(base, place, query=mlflow_views.sweep_query(run_id))
    return mlflow_views.link(base, place, run_id)


@contextmanager
def free_port(first: int) -> Iterator[int]:
    """Yields the first port from there on that nothing on this machine listens at, nor will.

    A server binds it seconds after this has looked, so another of these is told by a lock.

    Raises:
        UserError: where a hundred of them are taken.
    """
    for port in range(first, min(first + 100, 65536)):
        try:
            lock = files.try_lock(Path(tempfile.gettempdir()) / f"athanor-ui-{port}.lock")
        except PermissionError:  # another user has had it
            continue
        if lock is None:
            continue
        try:
            if _is_free(port):
                yield port
                return
        finally:
            lock.release()
    raise UserError(f"no port from {first} on is free: `--port` chooses another")


def _is_free(port: int) -> bool:
    with socket.socket() as tried, suppress(OSError):
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(("127.0.0.1", port))
        return True
    return False


def serve(port: int, log: Path) -> "subprocess.Popen[bytes]":
    """Starts MLflow's server on the store, and waits until it answers.

    Raises:
        UserError: with the end of its log, where it does not start.
    """
    # By variables, because anyone on this machine can read a command.
    env = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": tracking_store.uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        env["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = (Workspace.here().runs / "artifacts").as_uri()
    options = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who stop it
        )
    deadline = time.monotonic() + SECONDS_TO_START
    try:
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return server
            time.sleep(0.1)
    except BaseException:
        stop(server)
        raise
    stop(server)
    said = tracking_store.hide_passwords(log.read_text("utf-8", errors="replace"))
    end = "\n".join(said.splitlines()[-15:])
    raise UserError(f"MLflow's server did not start on {tracking_store.shown_uri()}:\n{end}")


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)


def opens_a_browser() -> bool:
    """Whether there is a browser to open, and a person who sees it open."""
    if not sys.stdout.isatty():
        return False
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        return False  # what Python finds there would take the terminal
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def show(link: str, browser: bool) -> None:
    """Prints a link, and opens it where that can be done."""
    console.out.print(link, soft_wrap=True, highlight=False, markup=False)
    if browser and opens_a_browser():
        webbrowser.open(link)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.ui", description="MLflow's UI on the store of the runs."
    )
    parser.add_argument("runs", nargs="*", metavar="run", help="an id, or the beginning of one")
    parser.add_argument("--port", type=int, default=PORT, help=f"or the next free one; {PORT}")
    parser.add_argument("--no-browser", action="store_true", help="print the link, open nothing")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:
        parser.error("argument --port: from 1 to 65535")
    switches.interrupt_on(signal.SIGHUP)  # the terminal is closed
    tracking_store.require_store()
    with tracking_store.report_errors():
        send_left_journals()
        if tracking_store.is_server():
            show(page(tracking_store.shown_uri(), args.runs), not args.no_browser)
            return
    with free_port(args.port) as port, tempfile.TemporaryDirectory() as folder:
        with tracking_store.report_errors():
            link = page(f"http://127.0.0.1:{port}", args.runs)
        try:
            server = serve(port, Path(folder) / "log")
            try:
                console.out.print(
                    f"{tracking_store.shown_uri()}, until Ctrl-C:", soft_wrap=True, markup=False
                )
                show(link, not args.no_browser)
                server.wait()
            finally:
                stop(server)
        except KeyboardInterrupt:
            return
    raise UserError(f"MLflow's server ended by itself, with status {server.returncode}")


if __name__ == "__main__":
    console.run_command(main, "nothing here was changed")
