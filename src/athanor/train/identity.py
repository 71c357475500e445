"""The identity of a training: the digest of everything that decides its result."""

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from athanor import files
from athanor.code import digest_code
from athanor.config.schema import Config
from athanor.config.values import effective_values
from athanor.device.backend import blas_threads, describe_device
from athanor.model.adapters import InitialAdapters
from athanor.prepare.result import Prepared

# The modules that train and write; the code that decides is theirs and what they import.
CODE = ("athanor.train.fit", "athanor.train.result")


def training_identity(
    cfg: Config, base: Prepared, initial: InitialAdapters | None = None
) -> dict[str, Any]:
    """Return everything that the result depends on, as JSON.

    A training resumes from no checkpoint of another identity. Of the code it takes the syntax trees
    (see digest_code), so that rewording a docstring orphans no checkpoint and no trial. `initial`
    are the adapters that the training begins with.
    """
    deciding, source = ("seed", "train."), base.source
    return {
        **{key: value for key, value in effective_values(cfg).items() if key.startswith(deciding)},
        "train.blas_threads": blas_threads(),  # null and its number are the same training
        # The times of saving and the place of activations decide nothing.
        **dict.fromkeys(("train.save_every", "train.activations_memory", "train.activations_disk")),
        # The same adapters are the same beginning, wherever they are.
        "train.resume_adapter_file": initial.digest if initial else None,
        "data": files.digest([base.workspace.rows(split) for split in ("train", "valid")]),
        "model": [source.path, source.commit, source.digest],
        "code": digest_code(CODE),
        "libraries": [
            f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "numpy", "transformers")
        ],
        "device": describe_device(),
        "date": base.contract.rendering.date,
        "end": [base.contract.end, base.contract.trains_end],
    }


def run_of(folder: Path) -> str:
    """Return the name of a training's MLflow run, the same however often it is interrupted."""
    path = folder / "run.json"
    if not path.exists():
        files.write_json(path, {"run": uuid.uuid4().hex})
    return str(files.read_json(path)["run"])
