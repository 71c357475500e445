"""Athanor: reproducible fine-tuning of language models on your own machine.

Importing the package settles, before anything else is imported, two things that can't be settled
later: that no library calls home, and which BLAS mlx multiplies with on Linux's CPU.
"""

import ctypes
import os
import sys

__version__ = "0.1.0"

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _load_openblas() -> str:
    """Makes a system OpenBLAS, where there is one, win over the slower BLAS in mlx's Linux wheel.

    The dynamic linker gives mlx the first `cblas_sgemm` it finds, so this has to run before mlx is
    imported. ATHANOR_BLAS=wheel keeps the wheel's own.
    """
    if sys.platform == "linux" and os.environ.get("ATHANOR_BLAS") != "wheel":
        for name in ("libopenblas.so.0", "libopenblas.so"):
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name
    return "wheel"


BLAS = _load_openblas()
