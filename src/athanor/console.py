"""The terminal: a stage's closing table, its progress bar, its errors, its interrupts."""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from athanor import switches
from athanor.errors import UserError
from athanor.paths import find_enclosing_project

# Characters that a terminal obeys instead of showing them (C0 but tabs and line feeds, DEL, C1),
# that turn the direction of a line, or that no output can encode.
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return a text with each character that a terminal would obey as its escape.

    A byte of a file's name that is not UTF-8, a lone surrogate in Python, becomes `\\xff`.
    """
    return OBEYED.sub(_escape_of, text)


def _escape_of(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Terminal(Console):
    """A console that prints every text as text; only rich's own controls reach the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for segment in super().render(renderable, options):
            if segment.control is None and OBEYED.search(segment.text):
                yield Segment(visible(segment.text), segment.style)
            else:
                yield segment


# DVC's log is no terminal: a width of 80 would break paths there.
out = _Terminal(width=None if sys.stdout.isatty() else 100, soft_wrap=False)
err = _Terminal(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)

# Cells of a table that are longer than the first wrap, where a table is wide to the second.
WHOLE, NARROW = 24, 12

# The numbers of an OSError where a disk or a person's share of it is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Those of a pipe that nobody reads, and of a terminal that was closed.
READER_GONE = (errno.EPIPE, errno.EIO)

RESUMES = "the same command continues from there"
UNCHANGED = "nothing here was changed"
CHECKOUT = "`uv run dvc checkout` restores the stage's previous output"


class LastingStream:
    """A standard stream that drops what it cannot write.

    A training goes on where its terminal was closed, `head` has read enough, or its log is on a
    full disk.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., object], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if error.errno in READER_GONE:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def run_command(
    main: Callable[[], None], after_interrupt: str = CHECKOUT, in_project: bool = True
) -> None:
    """Run a command's main, and exit with 1 after an error, with 130 after an interrupt.

    An error that the user can fix is printed without its traceback; `after_interrupt` is printed
    after Ctrl-C, SIGTERM or SIGHUP. A command that writes files goes on where its output has lost
    its reader. A command that works `in_project` is refused in a subfolder of one.
    """
    switches.interrupt_on_signals()
    if after_interrupt != UNCHANGED:
        streams: Any = LastingStream(sys.stdout), LastingStream(sys.stderr)
        sys.stdout, sys.stderr = streams
    switches.freeze_objects()
    try:
        if in_project and (project := find_enclosing_project()):
            raise UserError("console.in_subfolder", folder=Path.cwd(), project=project)
        main()
    except UserError as error:
        _exit_with_error(str(error))
    except KeyboardInterrupt as interrupt:
        state = f"{interrupt}; " if str(interrupt) else ""
        err.print(
            f"[bold red]stopped[/] by Ctrl-C or a signal; {escape(visible(state))}"
            f"{after_interrupt}",
            soft_wrap=True,
        )
        sys.exit(130)
    except OSError as error:
        fault = _machine_fault(error)
        if fault is None:
            _exit_with_traceback()
        _exit_with_error(str(fault))
    except Exception:
        _exit_with_traceback()
    finally:
        switches.freeze_objects()  # else Python's last collection scans all of them


def _machine_fault(error: OSError) -> UserError | None:
    """Return the error for a fault that a person mends in the machine; None for any other."""
    path = error.filename or "while writing"
    if error.errno in DISK_FULL:
        return UserError("console.disk_full", path=path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError("console.no_permission", path=path)
    if error.errno == errno.EROFS:
        return UserError("console.read_only", path=path)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError("console.too_many_files", path=path)
    if error.errno == errno.EIO:
        return UserError("console.disk_failed", path=path)
    return None


def _exit_with_error(text: str) -> NoReturn:
    err.print(f"[bold red]error:[/] {escape(visible(text))}", soft_wrap=True)
    sys.exit(1)


def _exit_with_traceback() -> NoReturn:
    print(visible(traceback.format_exc()), end="", file=sys.stderr)
    err.print("[bold red]unexpected error[/]: please include the traceback above in a bug report")
    sys.exit(1)


@contextmanager
def defer_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells if a signal to stop arrived; the first one does nothing else.

    The second one interrupts at once. In other threads than the main one, nothing changes.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # the reader of our stderr may have got the same Ctrl-C
            os.write(2, b"stopping after this iteration; interrupt again to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, receive) for number in switches.interrupts()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def warn(text: str) -> None:
    """Print a note to stderr: the work goes on."""
    err.print(f"[bold yellow]note:[/] {escape(visible(text))}", soft_wrap=True)


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """Print a table of names and values, a fact a line."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=title, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(visible(str(value))))
    out.print(table)


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table with a header."""
    table = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table whose long cells wrap and whose numbers stay whole, however narrow `out` is."""
    widths = []
    for column in table.columns:
        cells = [column.header, *column.cells]
        longest = max(Measurement.get(out, out.options, cell).maximum for cell in cells)
        column.no_wrap, column.overflow = longest <= WHOLE, "fold"
        widths.append(longest if column.no_wrap else NARROW)
    needed = sum(widths) + 3 * len(widths) + 1  # with the space between columns
    if needed > out.width:
        table.width = needed
    out.print(table, crop=False)


def share(part: float | None, whole: float = 1.0) -> str:
    """Return a share as a percentage; one that is not all, or not none, is never rounded to it."""
    if not whole or part is None or not isfinite(part):
        return "–"
    if 0 < part / whole < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= part / whole < 1 else f"{part / whole:.1%}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{int(count):,} {noun}" + "s" * (count != 1)


def progress() -> Progress:
    """Return a progress bar: live on a terminal, silent in a log."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )
