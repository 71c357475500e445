"""Athanor: reproducible fine-tuning of language models on your own machine.

Importing the package settles, before anything else is imported, two things that can't be settled
later: that no library calls home, and which BLAS mlx multiplies with on Linux's CPU. The number of
its threads is settled anew by each configuration.
"""

import os

from athanor.device import blas

__version__ = "0.1.0"

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

blas.use_threads(None)
