"""Stages in this process: as `python -m athanor.<stage>` runs them, without its start."""

import importlib
import sys
from collections.abc import Callable

import pytest

Stages = Callable[..., None]


def run_stages(*names: str, overrides: tuple[str, ...] = ()) -> None:
    """Run stages in this process and the working directory, each with the same overrides."""
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *overrides])
            _command(name)()


def _command(name: str) -> Callable[[], None]:
    """Return the main function of a stage or, for a command beside the pipeline, of its module."""
    module = importlib.import_module(f"athanor.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"athanor.{name}.__main__")
    main: Callable[[], None] = module.main
    return main
