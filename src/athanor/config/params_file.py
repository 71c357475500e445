"""Stage `config`: composes conf/ into params.yaml, the one file that every later stage reads.

    uv run python -m athanor.config                                  # conf/ as it stands
    uv run python -m athanor.config model=qwen2.5-0.5b train.iters=500

Under `dvc exp run` DVC itself composes conf/ with the -S overrides and writes params.yaml just
before this stage: then it is only checked. Either way every typo, wrong type and impossible value
is reported before any work, all of them together, each with its file and line.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import files
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.paths import Workspace

HEADER = "# Composed from conf/ by athanor.config. To change a value, edit conf/. "


def write_params(config: Config, workspace: Workspace) -> None:
    """Writes params.yaml, unless that would overwrite values that a person typed into it.

    Raises:
        UserError: with the values that would be lost and the command that runs them.
    """
    params, lock = workspace.params, workspace.root / "dvc.lock"
    body = OmegaConf.to_yaml(config)
    if params.exists() and not _ours(params.read_bytes(), lock):
        typed = _differences(params, body)
        if typed:
            options = " ".join(f"-S {shlex.quote(option)}" for option in typed)
            raise UserError(
                f"{params} was edited by hand, and conf/ says otherwise; nothing was overwritten\n"
                f"  to run what it says:  uv run dvc exp run {options}\n"
                f"  to go back to conf/:  rm {params}"
            )
    files.write_text(params, f"{HEADER}{_digest(body)}\n{body}")


def _differences(params: Path, body: str) -> list[str]:
    """What params.yaml says otherwise than `body`, as Hydra overrides.

    Raises:
        UserError: where it can't be read.
    """

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key in tree for k, v in leaves(tree[key], f"{prefix}.{key}").items()}

    try:
        typed = leaves(OmegaConf.to_container(OmegaConf.load(params)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{params} is not YAML; mend it or remove it: {error}") from error
    composed = leaves(OmegaConf.to_container(OmegaConf.create(body)))
    return [
        f"{key[1:]}={value if isinstance(value, str) and value.isalnum() else json.dumps(value)}"
        for key, value in typed.items()
        if key not in composed or composed[key] != value
    ]


def _ours(content: bytes, lock: Path) -> bool:
    """Whether params.yaml is as this stage wrote it, or as DVC has it on record."""
    head, _, body = content.decode("utf-8").partition("\n")
    if head == HEADER + _digest(body):
        return True
    return lock.exists() and hashlib.md5(content).hexdigest() in lock.read_text(encoding="utf-8")


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]
