"""The identity of a training: the digest of everything that decides its result."""

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from athanor import files
from athanor.config.schema import Config
from athanor.config.values import effective_values
from athanor.device.backend import blas_threads, describe_device
from athanor.prepare.result import Prepared

# The packages and modules whose code decides a training: this stage's deps in dvc.yaml.
DECIDING = ("chat", "compute", "device", "files.py", "model", "prepare/result.py", "train")


def training_identity(cfg: Config, base: Prepared) -> dict[str, Any]:
    """Everything that the result depends on: a training goes on from no other's checkpoint."""
    deciding, source = ("seed", "train."), base.source
    return {
        **{key: value for key, value in effective_values(cfg).items() if key.startswith(deciding)},
        "train.blas_threads": blas_threads(),  # null and its number are the same training
        # When it is saved, and where activations are kept, decides nothing.
        **dict.fromkeys(("train.save_every", "train.activations_memory", "train.activations_disk")),
        "data": files.digest([base.workspace.rows(split) for split in ("train", "valid")]),
        "model": [source.path, source.commit, source.digest],
        "code": files.digest(_modules()),
        "libraries": [
            f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "numpy", "transformers")
        ],
        "device": describe_device(),
        "end": [base.contract.end, base.contract.trains_end],
    }


def _modules() -> list[Path]:
    """The files of the modules and packages that decide."""
    places = [Path(__file__).parents[1] / name for name in DECIDING]
    return [
        path
        for place in places
        for path in (sorted(place.glob("*.py")) if place.is_dir() else [place])
    ]


def run_of(folder: Path) -> str:
    """The name of the MLflow run that a training has, however often it is interrupted."""
    path = folder / "run.json"
    if not path.exists():
        files.write_json(path, {"run": uuid.uuid4().hex})
    return str(files.read_json(path)["run"])
