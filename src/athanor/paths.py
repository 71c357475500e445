"""Where things lie, relative to the repository: each stage writes to artifacts/<stage>/."""

from pathlib import Path

DATA = Path("data")
CONF = Path("conf")
PARAMS = Path("params.yaml")
PREPARED = Path("artifacts/prepare")
TRAINED = Path("artifacts/train")
TESTED = Path("artifacts/test")
FUSED = Path("artifacts/fuse")

SPLITS = ("train", "valid", "test")
