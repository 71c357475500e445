"""Where things lie, relative to the repository: each stage writes to artifacts/<stage>/."""

import os
from pathlib import Path

DATA = Path("data")
CONF = Path("conf")
PARAMS = Path("params.yaml")
PREPARED = Path("artifacts/prepare")
TRAINED = Path("artifacts/train")
TESTED = Path("artifacts/test")
FUSED = Path("artifacts/fuse")

# Below root().
SWEPT = Path("artifacts/sweep")

# Below root(); beside train's outs, not in them: DVC deletes a stage's outs before it runs it.
CHECKPOINTS = Path("artifacts/train/checkpoints")
OUTBOX = Path("mlruns/outbox")

SPLITS = ("train", "valid", "test")


def root() -> Path:
    """The repository's folder: DVC's, also when a queued experiment runs in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()
