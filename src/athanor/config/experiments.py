"""Experiments of DVC, which composes the configuration in its own process before any stage runs."""

import sys
from pathlib import Path

from athanor.errors import UserError

ELSEWHERE = {"--temp", "--queue"}  # options of `dvc exp run`: not in the workspace


def refuse_path_of_cache() -> None:
    """Raise DVC's error where it is about to queue an experiment that it cannot run.

    DVC 3.67 writes the path of its cache into the experiment's folder as ASCII.
    """
    if "dvc" not in sys.modules or not ELSEWHERE & set(sys.argv):
        return
    from dvc.config import Config
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    folder = Path(Repo.find_dvc_dir())
    cache = folder / (Config(folder).get("cache", {}).get("dir") or "cache")
    if not str(cache.resolve()).isascii():
        raise DvcException(str(UserError("config.cache_path_not_ascii", cache=cache)))
