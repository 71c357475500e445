"""MLflow's UI on the tracking store of the runs, for this machine alone.

    uv run python -m athanor.ui                 # all runs
    uv run python -m athanor.ui 3f2a            # a run or sweep, by the beginning of its id
    uv run python -m athanor.ui 3f2a 77b1       # several side by side

Sends the journals waiting in mlruns/outbox/, then serves the store in mlruns/, or the database in
MLFLOW_TRACKING_URI, on the loopback address until Ctrl-C. If MLFLOW_TRACKING_URI is a server's
address, prints its link only.
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

from athanor import console, files
from athanor.errors import UserError
from athanor.paths import Workspace
from athanor.runs import mlflow_views, tracking_store
from athanor.runs.run import send_left_journals

# Not MLflow's own 5000, which macOS has its AirPlay receiver on.
PORT = 5199
SECONDS_TO_START = 300


def find_page(base: str, prefixes: Sequence[str]) -> str:
    """Return the link to the page of the runs with these ids, on the server at `base`.

    Raises:
        UserError: if the store has no runs, or no run or several have a prefix.
    """
    client = tracking_store.connect()
    if not prefixes:
        experiment = client.get_experiment_by_name(tracking_store.EXPERIMENT)
        if experiment is None:
            raise UserError("runs.no_runs", store=tracking_store.shown_uri())
        if experiment.lifecycle_stage == "deleted":
            raise UserError(
                "ui.deleted_experiment",
                name=experiment.name,
                id=experiment.experiment_id,
                store=tracking_store.uri_in_command(),
            )
        query = mlflow_views.save_runs_view(client, experiment.experiment_id)
        return mlflow_views.link_runs(base, experiment.experiment_id, query=query)
    runs = [tracking_store.find_run(prefix) for prefix in prefixes]
    run_ids, experiment_id = [run.info.run_id for run in runs], runs[0].info.experiment_id
    if len(runs) > 1:
        return mlflow_views.link_comparison(base, experiment_id, run_ids)
    if "athanor.sweep" in runs[0].data.tags:
        query = mlflow_views.build_sweep_query(run_ids[0])
        return mlflow_views.link_runs(base, experiment_id, query=query)
    return mlflow_views.link_runs(base, experiment_id, run_ids[0])


@contextmanager
def hold_free_port(first: int) -> Iterator[int]:
    """Yield the first free port from `first` on.

    The server binds it seconds later, so a lock keeps other processes of this command off it.

    Raises:
        UserError: if a hundred ports are taken.
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
    raise UserError("ui.no_free_port", first=first)


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def start_server(port: int, log: Path) -> "subprocess.Popen[bytes]":
    """Start MLflow's server on the store, and wait until it answers.

    Raises:
        UserError: with the end of its log, if it does not start.
    """
    # In variables, because all users of the machine can read a command.
    env = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": tracking_store.uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if tracking_store.sqlite_path() is not None:
        env["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = (Workspace.here().runs / "artifacts").as_uri()
    options = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which stops it
        )
    deadline = time.monotonic() + SECONDS_TO_START
    try:
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return server
            time.sleep(0.1)
    except BaseException:
        stop_server(server)
        raise
    stop_server(server)
    lines = log.read_text("utf-8", errors="replace").splitlines()[-15:]
    end = tracking_store.hide_passwords("\n".join(lines))
    raise UserError("ui.not_started", store=tracking_store.shown_uri(), log=end)


def stop_server(server: "subprocess.Popen[bytes]") -> None:
    """End the server and all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)


def has_browser() -> bool:
    """Return whether there is a browser to open, and a person to see it."""
    if not sys.stdout.isatty():
        return False
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        return False  # Python would open a browser in the terminal
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def show_link(link: str, browser: bool) -> None:
    """Print a link, and open it if `browser` and there is one."""
    console.out.print(link, soft_wrap=True, highlight=False, markup=False)
    if browser and has_browser():
        webbrowser.open(link)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m athanor.ui",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="run", help="an id, or the beginning of one")
    parser.add_argument("--port", type=int, default=PORT, help=f"or the next free one; {PORT}")
    parser.add_argument("--no-browser", action="store_true", help="print the link, open nothing")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:
        parser.error("argument --port: from 1 to 65535")
    tracking_store.require_store()
    if not any(Workspace.here().outbox.glob("*")):  # else the run may be among what waits there
        for prefix in args.runs:
            tracking_store.find_run_id(prefix)
    with tracking_store.report_errors():
        send_left_journals()
        if tracking_store.is_server():
            show_link(find_page(tracking_store.shown_uri(), args.runs), not args.no_browser)
            return
    with hold_free_port(args.port) as port, tempfile.TemporaryDirectory() as folder:
        with tracking_store.report_errors():
            link = find_page(f"http://127.0.0.1:{port}", args.runs)
        try:
            server = start_server(port, Path(folder) / "log")
            try:
                console.out.print(
                    f"{tracking_store.shown_uri()}, until Ctrl-C:", soft_wrap=True, markup=False
                )
                show_link(link, not args.no_browser)
                server.wait()
            finally:
                stop_server(server)
        except KeyboardInterrupt:
            return
    raise UserError("ui.ended", status=server.returncode)


if __name__ == "__main__":
    console.run_command(main, console.UNCHANGED)
