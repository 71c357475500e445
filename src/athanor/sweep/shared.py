"""The model, rows and base results that the trials of a sweep share in a process."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from athanor import files
from athanor.compute.arrays import TokenizedText
from athanor.compute.forward import Forward
from athanor.compute.frozen import FrozenLayers
from athanor.config.compose import read_params
from athanor.config.schema import Config
from athanor.paths import SPLITS, Workspace
from athanor.prepare import result
from athanor.prepare.result import Prepared
from athanor.test.examine import Split, build_splits, examine
from athanor.test.figures import Outcome
from athanor.train.build import build_frozen
from athanor.train.fit import warn_of_rows_without_targets
from athanor.train.shared import SharedBase

# The splits that every trial is tested on; the rows of `test` are for the chosen trial alone.
TESTED_SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Shared:
    """The objects that trials share in memory; no trial's result depends on another's use of them.

    `cfg` is the sweep's own configuration; `outcomes` are the base model's by split.
    """

    cfg: Config
    base: Prepared
    model: Any
    frozen: FrozenLayers
    tokenizer: Any
    tokens: dict[str, list[TokenizedText]]
    splits: dict[str, Split]
    outcomes: dict[str, Outcome]
    peaks: dict[str, int] = field(default_factory=dict)

    def shared_for(self, cfg: Config) -> SharedBase:
        """Return what trainings share; without activations where `cfg` computes others."""
        ours, theirs = self.cfg.train, cfg.train
        same = (ours.reuse_activations, ours.compile) == (theirs.reuse_activations, theirs.compile)
        return SharedBase(self.frozen if same else None, self.peaks)

    @property
    def labels(self) -> set[str]:
        """The labels of all classification rows."""
        return set[str]().union(*(split.labels for split in self.splits.values()))


@lru_cache(1)
def load_shared(folder: Path) -> Shared:
    """Load what the trials of the sweep in `folder` share; the first process tests the base."""
    cfg = read_params(folder / "params.yaml")
    base = Prepared.read(cfg, Workspace.here())
    rows = result.read_rows(base.workspace, SPLITS)
    model, tokenizer = base.load()
    splits = build_splits(cfg, base, tokenizer, rows)
    tokens = {split: splits[split].tokens for split in TESTED_SPLITS}
    cuts = _first_trained_layers(cfg, folder, len(model.layers))
    frozen = build_frozen(cfg, base.workspace, model, tokens["train"], cuts)
    path = folder / "base.json"
    if path.exists():
        outcomes = msgspec.convert(files.read_json(path), dict[str, Outcome])
    else:
        warn_of_rows_without_targets(base.workspace, rows, tokens)
        forward = Forward(model, frozen.parts)
        outcomes = examine(cfg, model, tokenizer, splits, "base", forward)
        # The loss of a split without rows is NaN, which only Python's JSON has.
        files.write_text(path, json.dumps(msgspec.to_builtins(outcomes), indent=2) + "\n")
    return Shared(cfg, base, model, frozen, tokenizer, tokens, splits, outcomes)


def _first_trained_layers(cfg: Config, folder: Path, layers: int) -> list[int]:
    """Return the first trained layer of each trial, as far as the sweep's values are known."""
    swept = dict(files.read_json(folder / "about.json")["swept"])
    numbers = swept.get("train.num_layers", [str(cfg.train.num_layers)])
    cuts = {layers - int(number) for number in numbers if number.isdecimal()}
    return sorted(cut for cut in cuts if cut > 0)
