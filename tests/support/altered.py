"""Altered folders: each is given to a forked process that must succeed or refuse it in one line.

A module of folders has three functions; `run_altered` calls them in processes of their own:

    load()                                what a process imports and loads before any fork
    alter(folder, chance, canary) -> str  fill an empty folder; return what is wrong with it. Code
                                          that is planted in it touches `canary` if it is run
    work(folder)                          do what is tested; a UserError is a refusal

    python -m support.altered MODULE COUNT FOLDER [NUMBER]    # with tests/ as PYTHONPATH
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

SEED = 18
# Of the clock; a busy machine needs more: ALTERED_SECONDS.
SECONDS = float(os.environ.get("ALTERED_SECONDS", "10"))
MEMORY = 1500  # MB, resident at the peak
# A process that needs more address space than this ends before the machine does.
ADDRESS_SPACE = 24 << 30
SUCCEEDED, REFUSED, TRACEBACK, HANG, DIED, EXECUTED, TOO_MUCH, PRINTED = (
    "succeeded",
    "refused",
    "traceback",
    "hang",
    "died",
    "executed",
    "too much memory",
    "raw control characters",
)
CLEAN = (SUCCEEDED, REFUSED)


@dataclass(frozen=True)
class Outcome:
    """What became of a folder: `memory` is the peak in MB, `text` the error or what was printed.

    `seconds` are the process's own, on all its cores.
    """

    number: int
    about: str
    kind: str
    seconds: float
    memory: int
    text: str

    def __str__(self) -> str:
        facts = f"{self.kind}, {self.seconds:.1f} s, {self.memory} MB"
        return f"{self.number}: {self.about}: {facts}\n{self.text[-3000:]}"


def run_altered(module: str, count: int) -> list[Outcome]:
    """Return the outcomes of the first `count` folders of a module."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(
            [sys.executable, "-m", "support.altered", module, str(count), name],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            check=True,
        )
        lines = Path(name, "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    return [Outcome(**json.loads(line)) for line in lines]


def summary(outcomes: list[Outcome]) -> str:
    """Return the numbers of all outcomes as a text of two lines."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    counts = ", ".join(f"{kind} {kinds[kind]}" for kind in (*CLEAN, TRACEBACK, HANG, DIED))
    slowest = max(outcome.seconds for outcome in outcomes)
    memory = max(outcome.memory for outcome in outcomes)
    return (
        f"{len(outcomes)} folders: {counts}, {EXECUTED} {kinds[EXECUTED]}, {PRINTED} "
        f"{kinds[PRINTED]}\nslowest {slowest:.1f} s, peak memory {memory} MB of {MEMORY} MB"
    )


def check(outcomes: list[Outcome]) -> None:
    """Print the summary, and fail with every outcome that is not clean."""
    print(f"\n{summary(outcomes)}")
    wrong = [str(outcome) for outcome in outcomes if outcome.kind not in CLEAN]
    assert not wrong, "\n".join(["", *wrong, summary(outcomes)])


def _in_fork(
    function: Callable[[], int], output: Path, seconds: float
) -> tuple[int | None, float, int]:
    """Return a forked process's status (None if it was ended), CPU seconds, peak memory in MB."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    status = None
    while status is None and time.monotonic() - begin < seconds:
        done, ended, usage = os.wait4(pid, os.WNOHANG)
        if done:
            status = ended
        else:
            time.sleep(0.003)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and what it started
    if status is None:
        _, _, usage = os.wait4(pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit // 10**6


def _attempt(module: Any, number: int, folder: Path, output: Path) -> Outcome:
    canary = folder.parent / f"{folder.name}.canary"
    about_file = folder.parent / f"{folder.name}.txt"
    folder.mkdir()

    def alter() -> int:
        about = module.alter(folder, Random(f"{SEED} {number}"), canary)
        about_file.write_text(about, encoding="utf-8", errors="backslashreplace")
        return 0

    def work() -> int:
        from athanor import console
        from athanor.errors import UserError

        try:
            module.work(folder)
        except UserError as error:
            console.warn(f"error: {error}")  # as all that is printed
            return 3
        return 0

    made, _, _ = _in_fork(alter, output, 120)
    if made != 0:
        raise RuntimeError(f"folder {number}: {output.read_text(encoding='utf-8')}")
    status, seconds, memory = _in_fork(work, output, SECONDS)
    text = output.read_bytes().decode(errors="backslashreplace")
    if status is None:
        kind = HANG
    elif os.WIFSIGNALED(status):
        kind, text = DIED, f"signal {os.WTERMSIG(status)}\n{text}"
    else:
        kind = {0: SUCCEEDED, 3: REFUSED}.get(os.WEXITSTATUS(status), TRACEBACK)
    if kind in CLEAN and "Traceback (most recent call last)" in text:
        kind = TRACEBACK  # a thread's
    if memory > MEMORY and kind in CLEAN:
        kind = TOO_MUCH
    if any((ord(c) < 32 and c not in "\t\r\n") or 0x7F <= ord(c) < 0xA0 for c in text):
        kind = kind if kind not in CLEAN else PRINTED
    if canary.exists():
        kind = EXECUTED
    about = about_file.read_text(encoding="utf-8")
    return Outcome(number, about, kind, round(seconds, 2), memory, text)


def main(name: str, count: str, place: str, only: str | None = None) -> None:
    """Write the outcomes of a module's folders to outcomes.jsonl in the folder `place`."""
    module = importlib.import_module(name)
    module.load()
    numbers = range(int(count)) if only is None else [int(only)]
    with Path(place, "outcomes.jsonl").open("w", encoding="utf-8") as file:
        for number in numbers:
            folder = Path(place, str(number))
            outcome = _attempt(module, number, folder, Path(place, "output.txt"))
            file.write(json.dumps(asdict(outcome)) + "\n")
            if only is not None:
                print(outcome)
            else:
                subprocess.run(
                    ["rm", "-rf", folder], check=True
                )  # deeper than Python's own reaches


if __name__ == "__main__":
    main(*sys.argv[1:])
