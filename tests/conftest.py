"""What tests share: the repository's own parts, and copies of it to work in."""

import os
from pathlib import Path

import pytest

# No test may reach a hub: a try fails at once, wherever it happens.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("DVC_ROOT", None)

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository."""
    return REPO


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny base model's folder."""
    return REPO / "models" / "tiny"
