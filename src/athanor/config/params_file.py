"""params.yaml: written from a configuration, and never over values that a person typed."""

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from athanor import files
from athanor.config.compose import read_params_file
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.paths import Workspace

HEADER = "# Composed from conf/ by athanor.config. To change a value, edit conf/. "


def write_params(config: Config, workspace: Workspace) -> None:
    """Write params.yaml, unless that would overwrite values that a person typed into it.

    Raises:
        UserError: with the values that would be lost, and the command that runs them.
    """
    params, lock = workspace.params, workspace.root / "dvc.lock"
    body = OmegaConf.to_yaml(config)
    if os.path.lexists(params) and not (params.is_file() and _ours(params.read_bytes(), lock)):
        typed = _differences(params, body)
        if typed:
            options = " ".join(f"-S {shlex.quote(option)}" for option in typed)
            raise UserError("config.edited_params", params=params, options=options)
    files.write_text(params, f"{HEADER}{_digest(body)}\n{body}")


def _differences(params: Path, body: str) -> list[str]:
    """Return the values of params.yaml that differ from `body`, as Hydra overrides.

    Raises:
        UserError: where it cannot be read.
    """

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key in tree for k, v in leaves(tree[key], f"{prefix}.{key}").items()}

    typed = leaves(read_params_file(params).tree)
    composed = leaves(OmegaConf.to_container(OmegaConf.create(body)))

    def show(value: Any) -> str:
        """Return a value as DVC's Hydra reads it; it takes ASCII only without quotes."""
        if isinstance(value, str) and value.isalnum() and value.isascii():
            return value
        return json.dumps(value, ensure_ascii=False)

    return [
        f"{key[1:]}={show(value)}"
        for key, value in typed.items()
        if key not in composed or composed[key] != value
    ]


def _ours(content: bytes, lock: Path) -> bool:
    """Return True if params.yaml is as this stage wrote it, or as dvc.lock has it."""
    head, _, body = content.decode("utf-8", errors="replace").partition("\n")
    if head == HEADER + _digest(body):
        return True
    return lock.exists() and hashlib.md5(content).hexdigest() in lock.read_text(encoding="utf-8")


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]
