"""The terminal: literal texts, output that loses its reader, signals that stop a command."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from athanor import console, switches
from athanor.errors import UserError


@pytest.mark.parametrize("text", [r"\[/INST] [/INST]", "[bold]x[/bold]", r"\[a+b\]", "[/x]"])
def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], text: str) -> None:
    console.print_table("title", ["head"], [[text]])
    console.print_facts("stage", {"fact": text})
    assert capsys.readouterr().out.count(text) == 2


def closed_pipe() -> int:
    """Return a pipe that nobody reads, as after `head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    """Return a terminal whose window was closed."""
    window, terminal = pty.openpty()
    os.close(window)
    return terminal


def full_disk() -> int:
    """Return a file on a full disk."""
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("lost", [closed_pipe, closed_terminal, full_disk])
def test_output_that_is_lost_stops_nothing(lost: Callable[[], int]) -> None:
    if lost is full_disk and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    number = lost()
    stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
    with pytest.raises(OSError):
        print("text", file=stream, flush=True)
    lasting = console.LastingStream(stream)
    for _ in range(3):
        print("text" * 10_000, file=lasting, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # what is buffered goes somewhere
    stream.close()
    os.close(number)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stops_nothing(number: signal.Signals) -> None:
    """As nohup has it, and a shell that starts a command in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert set(switches.interrupts()) == {
            *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        } - {number}
        with console.defer_interrupts() as interrupted:
            os.kill(os.getpid(), number)
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()
    finally:
        signal.signal(number, before)


CHILD = """
import os, signal, sys, time
from athanor import switches
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    switches.GRACE = 0.1
switches.end_with_parent(lambda: switches.wait_for_end(os.getppid()))
print(os.getpid(), flush=True)
time.sleep(1000)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("child", ["well", "deaf"])
def test_a_process_ends_with_its_parent(child: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    assert parent.stdout.read() == ""  # ends when the child does
    parent.wait()


@pytest.mark.parametrize("width", [100, 60, 30])
def test_numbers_of_a_table_are_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(console, "out", out)
    numbers = [f"{1_234_567_890 + i:,}" for i in range(6)]
    console.print_table("", ["split", *"abcdef"], [["train", *numbers]])
    text = "data/train.jsonl:1: 123,456 of 345,678 tokens are cut, with the end of an answer"
    console.print_table("", ["check", "rows", "example"], [["too_long", "1,234,567", text]])
    printed = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(number in printed for number in [*numbers, "1,234,567", "123,456", "345,678"])
    assert "…" not in printed


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EACCES, "no_permission"),
        (errno.EROFS, "read_only"),
        (errno.EMFILE, "too_many_files"),
        (errno.EIO, "disk_failed"),
    ],
)
def test_a_fault_of_the_machine_is_one_line(
    capfd: pytest.CaptureFixture[str], fault: int, code: str
) -> None:
    def fail() -> None:
        raise OSError(fault, os.strerror(fault), "artifacts/x")

    printed = run_command(capfd, fail)
    assert printed == f"error: {UserError(f'console.{code}', path='artifacts/x')}\n"


def test_a_subfolder_of_a_project_is_refused(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo / "src/athanor")
    assert f"`cd {repo}`" in run_command(capfd, lambda: None)
    console.run_command(lambda: None, console.UNCHANGED, in_project=False)


def run_command(capfd: pytest.CaptureFixture[str], main: Callable[[], None]) -> str:
    """Run a command that fails in this process; return what it printed."""
    before = {number: signal.getsignal(number) for number in switches.interrupts()}
    try:
        with pytest.raises(SystemExit) as ended:
            console.run_command(main, console.UNCHANGED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 1
    return capfd.readouterr().err


OBEYED = {
    "\x1b[2J": r"\x1b[2J",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "a\rb\x08\x7f\0": r"a\x0db\x08\x7f\x00",
    "\u202egnp.exe\u2066": r"\u202egnp.exe\u2066",
    "\udcff \ud83d": r"\xff \ud83d",
    "两é🌊": "两é🌊",
}


@pytest.mark.parametrize(("text", "shown"), OBEYED.items())
def test_a_terminal_obeys_no_text(text: str, shown: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever way a text is printed, it is shown as text."""

    def refuse() -> None:
        raise UserError("prepare.unreadable", path=text, reason=text)

    def fail() -> None:
        raise RuntimeError(text)

    assert console.visible(text) == shown
    console.out.print(text, markup=False, soft_wrap=True)
    console.out.print(Text(f"{text} {text}"))
    console.print_table(text, ["head"], [[text]])
    console.print_facts("stage", {text: text})
    console.warn(text)
    printed = "".join(capfd.readouterr())
    printed += run_command(capfd, refuse) + run_command(capfd, fail)
    assert console.OBEYED.search(printed) is None
    # The table's title and what rich itself takes out of a text are shown in part.
    assert printed.count(shown) >= 6
