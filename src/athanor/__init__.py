"""Athanor: reproducible fine-tuning of language models on your own machine.

Importing the package settles, before anything else is imported, what can't be settled later: whose
code a command runs, that no library calls home, and which BLAS mlx multiplies with on Linux's CPU.
The number of its threads is settled anew by each configuration.
"""

from athanor import startup, switches
from athanor.device import blas

__version__ = "0.1.0"

startup.prepare_command()
switches.disable_telemetry()
blas.use_threads(None)
