"""The start of a command: its streams, its encoding, and the code that it runs.

Importing athanor for `python -m athanor.<command>` calls `prepare_command` before anything else is
imported. Where Python itself has to start differently, the process executes itself again.
"""

import codecs
import locale
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

# The variable that holds the folder whose code this process was started again for.
CODE = "ATHANOR_CODE"
MLX_LM_FILES = 4096  # the hard limit of open files that mlx-lm sets
PACKAGE = Path(__file__).parent


def prepare_command() -> None:
    """Open missing streams, and start Python again with UTF-8 or with the folder's code."""
    _keep_low_limits()
    if sys.argv[:1] != ["-m"]:  # a library's process, a test, or a script
        _forget_other_code()
        return
    _open_missing_streams()
    changed = _use_utf8() | _use_code_of_folder()
    if changed:
        environment = os.environ | changed
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    _forget_other_code()


def _keep_low_limits() -> None:
    """Let mlx-lm be imported where a process may open fewer files than it asks for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= MLX_LM_FILES:
        return
    set_limits = resource.setrlimit

    def set_or_keep(kind: int, limits: tuple[int, int]) -> None:
        with suppress(ValueError):
            set_limits(kind, limits)

    resource.setrlimit = set_or_keep


def _open_missing_streams() -> None:
    """Open /dev/null in the place of standard streams that were closed.

    Else the next file that is opened takes such a stream's number and gets what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _use_utf8() -> dict[str, str]:
    """Return the variables with which Python reads and writes UTF-8 in a locale without it.

    Libraries open UTF-8 files without naming an encoding. Standard streams keep the terminal's.
    """
    if sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1":
        return {}
    encoding = codecs.lookup(locale.getencoding()).name
    if encoding == "utf-8":
        return {}
    streams = os.environ.get("PYTHONIOENCODING") or f"{encoding}:backslashreplace"
    return {"PYTHONUTF8": "1", "PYTHONIOENCODING": streams}


def _use_code_of_folder() -> dict[str, str]:
    """Return the variables with which Python imports the code of the working directory.

    An experiment that DVC queued runs in a copy of the repository, and DVC records the copy's
    code, but Python imports the installed package.
    """
    try:
        source = Path.cwd() / "src"
    except FileNotFoundError:
        sys.exit("error: the working directory was removed; change to the project's folder")
    package = source / PACKAGE.name
    if not os.access(package / "__init__.py", os.R_OK) or package.samefile(PACKAGE):
        return {}
    if os.environ.get(CODE) == str(source):  # Python ignores PYTHONPATH: python -I, -E
        sys.exit(
            f"error: this folder has code of its own in {package}, and Python imported {PACKAGE}; "
            "run the command without Python's options -I and -E"
        )
    others = filter(None, [os.environ.get("PYTHONPATH")])
    return {CODE: str(source), "PYTHONPATH": os.pathsep.join([str(source), *others])}


def _forget_other_code() -> None:
    """Import nothing from other copies of this package, whose plugins Hydra would find."""
    if CODE in os.environ:
        own = PACKAGE.parent
        sys.path[:] = [
            path
            for path in sys.path
            if Path(path) == own or not (Path(path) / PACKAGE.name / "__init__.py").is_file()
        ]
