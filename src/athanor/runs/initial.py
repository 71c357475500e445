"""The adapters that a training begins with, found by their path or by the id of their run."""

from functools import lru_cache

from athanor import files
from athanor.config.schema import RUN_ID, Config
from athanor.errors import UserError
from athanor.model.adapters import WEIGHTS, InitialAdapters
from athanor.model.json_files import refuse_irregular
from athanor.paths import Workspace
from athanor.runs.compare import fetch_adapters


def find_initial_adapters(cfg: Config, workspace: Workspace) -> InitialAdapters | None:
    """Return the adapters that train.resume_adapter_file names, None where it is null.

    It names a file of weights, a folder that holds one, or the beginning of a run's id.

    Raises:
        UserError: where they cannot be found, or DVC removes them before the stage runs.
    """
    asked = cfg.train.resume_adapter_file
    return None if asked is None else _find(asked, workspace)


@lru_cache(maxsize=64)
def _find(asked: str, workspace: Workspace) -> InitialAdapters:
    run, place = None, workspace.locate(asked)
    if place is None and RUN_ID.fullmatch(asked):
        run, place = fetch_adapters(asked, workspace.initial_adapters)
    if place is None:
        raise UserError("runs.no_such_adapters", path=asked)
    weights = place / WEIGHTS if place.is_dir() else place
    if not weights.exists():
        raise UserError("runs.no_adapters_in_folder", path=weights)
    refuse_irregular(weights)
    return InitialAdapters(weights, files.digest([weights]), run)
