"""The folders and files of a project: each stage writes to artifacts/<stage>/."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROJECT = ("conf/config.yaml", "dvc.yaml")
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Workspace:
    """The folders and files of a project.

    `root` holds what the pipeline reads and writes: usually the working directory. `home` is the
    repository's main folder, absolute, which a queued experiment that runs in a copy of it shares:
    checkpoints, sweeps and runs outlive the copy.
    """

    root: Path
    home: Path

    @classmethod
    def here(cls) -> "Workspace":
        """Return the workspace of the working directory; DVC_ROOT names its home, if set."""
        return cls(Path(), Path(os.environ.get("DVC_ROOT", ".")).resolve())

    @property
    def conf(self) -> Path:
        """The folder of the configuration."""
        return self.root / "conf"

    @property
    def params(self) -> Path:
        """The composed configuration, which every stage reads."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """The folder of the rows, tracked by DVC."""
        return self.root / "data"

    @property
    def artifacts(self) -> Path:
        """The outputs of the stages, a folder each."""
        return self.root / "artifacts"

    @property
    def prepared(self) -> Path:
        """The output of the stage `prepare`."""
        return self.root / "artifacts/prepare"

    @property
    def trained(self) -> Path:
        """The output of the stage `train`."""
        return self.root / "artifacts/train"

    @property
    def tested(self) -> Path:
        """The output of the stage `test`."""
        return self.root / "artifacts/test"

    @property
    def fused(self) -> Path:
        """The output of the stage `fuse`."""
        return self.root / "artifacts/fuse"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of trainings. DVC deletes a stage's outs before it runs, and not these."""
        return self.home / "artifacts/train/checkpoints"

    @property
    def initial_adapters(self) -> Path:
        """Adapters of earlier runs, fetched for trainings that begin with them."""
        return self.home / "artifacts/train/initial_adapters"

    @property
    def sweeps(self) -> Path:
        """The output of sweeps."""
        return self.home / "artifacts/sweep"

    @property
    def runs(self) -> Path:
        """The folder of MLflow's embedded store."""
        return self.home / "mlruns"

    @property
    def outbox(self) -> Path:
        """Journals of runs, until MLflow has them."""
        return self.runs / "outbox"

    @property
    def answered(self) -> Path:
        """The names of stores that have answered, one a line."""
        return self.runs / "stores.txt"

    def locate(self, path: str) -> Path | None:
        """Return the file or folder that a person names, from root or home; None if absent."""
        for folder in (self.root, self.home):
            with suppress(OSError, ValueError):  # too long a name, a NUL
                if (folder / path).exists():
                    return folder / path
        return None

    def rows(self, split: str) -> Path:
        """Return the file of the prepared rows of a split, JSON Lines."""
        return self.prepared / f"{split}.jsonl"


def find_enclosing_project() -> Path | None:
    """Return the project that the working directory is a subfolder of; None for one of its own."""
    here = Path.cwd()
    if (here / PROJECT[0]).exists():
        return None
    return next((path for path in here.parents if all((path / f).exists() for f in PROJECT)), None)
