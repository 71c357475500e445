"""What a person sees: a stage's closing table, its progress bar, its errors."""

import errno
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from athanor.errors import UserError

# DVC's log is no terminal: a width of 80 would break paths there.
out = Console(width=None if sys.stdout.isatty() else 100, soft_wrap=False)


err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)


# What an OSError says where a disk or a person's share of it is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


GOES_ON = "the same command goes on from there"


CHECKOUT = "what this stage wrote before comes back with `uv run dvc checkout`"


def run(main: Callable[[], None], after_a_stop: str = CHECKOUT) -> None:
    """Runs a stage's main; an error that a person can mend ends in its text alone.

    `after_a_stop` says what to do after Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What was imported stays: Python need not look through it each time that MLflow brings more.
    gc.freeze()
    try:
        main()
    except UserError as error:
        err.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        then = f"{interrupt}; " if str(interrupt) else ""
        err.print(
            f"[bold red]stopped[/] by Ctrl-C or SIGTERM; {_plain(then)}{after_a_stop}",
            soft_wrap=True,
        )
        sys.exit(130)
    except OSError as error:
        if error.errno not in FULL:
            _unexpected()
        err.print(
            f"[bold red]error:[/] the disk is full ({error.filename or 'while writing'}): make "
            "room and run this again; a training goes on from its last checkpoint",
            soft_wrap=True,
        )
        sys.exit(1)
    except Exception:
        _unexpected()
    finally:
        # Python looks through every object once more when it ends: half a second after MLflow.
        gc.freeze()


def _unexpected() -> NoReturn:
    traceback.print_exc()
    err.print("[bold red]unexpected error[/]: the lines above are what a report of it needs")
    sys.exit(1)


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """While the block runs, the first Ctrl-C or SIGTERM is only noted, for the block to ask about.

    A second one interrupts at once, as outside of it. Only the main thread is told of signals.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        with suppress(OSError):  # whoever read it may have been stopped by the same Ctrl-C
            os.write(2, b"stopping after this iteration; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warn(text: str) -> None:
    """Says what a person should know although the work goes on."""
    err.print(f"[bold yellow]note:[/] {_plain(text)}", soft_wrap=True)


def done(stage: str, facts: dict[str, Any]) -> None:
    """Prints what a stage did and where it lies, a fact a line."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=stage, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _plain(str(value)))
    out.print(table)


def side_by_side(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Prints a table with a header."""
    table = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(_plain, row))
    out.print(table)


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
    """A progress bar for long work: live on a terminal, silent in a log."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )


def _plain(text: str) -> str:
    return escape(text)
