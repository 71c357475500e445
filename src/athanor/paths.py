"""Where each stage writes, relative to the repository: artifacts/<stage>/."""

from pathlib import Path

DATA = Path("data")
CONF = Path("conf")
PARAMS = Path("params.yaml")
PREPARED = Path("artifacts/prepare")
TRAINED = Path("artifacts/train")
TESTED = Path("artifacts/test")
FUSED = Path("artifacts/fuse")
