"""The BLAS that mlx multiplies with on Linux's CPU, and how many threads it computes with.

The bytes of a product of matrices depend on the number of threads that share it. Every process
sets that number itself, whatever OPENBLAS_NUM_THREADS or OMP_NUM_THREADS in its environment say.
"""

import ctypes
import os
import re
import sys
from functools import cache
from pathlib import Path

WHEEL = "wheel"
# The logical processors on the same core as this one.
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
# What openblas_get_parallel returns for a library built with OpenMP.
OPENMP = 2


@cache
def library() -> ctypes.CDLL | None:
    """Load a system OpenBLAS; return None where there is none, or it is not wanted.

    The dynamic linker gives mlx the first `cblas_sgemm` it finds, so this has to run before mlx is
    imported. ATHANOR_BLAS=wheel keeps the slower BLAS of mlx's Linux wheel.
    """
    if sys.platform != "linux" or os.environ.get("ATHANOR_BLAS") == WHEEL:
        return None
    # OpenMP reads the variable when it is loaded, and mlx's threads keep what was read then.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(physical_cores())
    try:
        for name in ("libopenblas.so.0", "libopenblas.so"):
            try:
                return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
        return None
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def physical_cores() -> int:
    """Count the physical cores this process may use, or its logical ones where they are unknown."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        return len({Path(SIBLINGS.format(cpu)).read_text("ascii") for cpu in cpus})
    except OSError:
        return len(cpus)


def use_threads(asked: int | None) -> int | None:
    """Set the number of threads, None for the physical cores; return the number that computes.

    OpenBLAS has an upper limit, and one that was built with OpenMP keeps the number that it was
    loaded with. Does nothing where the BLAS is not OpenBLAS, and returns None.
    """
    openblas = library()
    if openblas is not None and openblas.openblas_get_parallel() != OPENMP:
        openblas.openblas_set_num_threads(asked or physical_cores())
    return threads()


def threads() -> int | None:
    """Return how many threads OpenBLAS computes with, None where it is not the BLAS."""
    openblas = library()
    return None if openblas is None else int(openblas.openblas_get_num_threads())


def version() -> str:
    """Return OpenBLAS's version and the core whose kernels it chose: "OpenBLAS 0.3.21 Zen"."""
    if library() is None:
        return WHEEL
    release = re.search(r"OpenBLAS (\d\S*)", configuration())
    return " ".join(
        ["OpenBLAS", *([release[1]] if release else []), _text("openblas_get_corename")]
    )


def configuration() -> str:
    """Return how OpenBLAS was built, as it says itself."""
    return WHEEL if library() is None else _text("openblas_get_config")


def _text(function: str) -> str:
    ask = getattr(library(), function)
    ask.restype = ctypes.c_char_p
    return bytes(ask()).decode()
