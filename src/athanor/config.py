"""Stage `config`: composes conf/ into params.yaml, the one file that every later stage reads.

    uv run python -m athanor.config                                  # conf/ as it stands
    uv run python -m athanor.config model=qwen2.5-0.5b train.iters=500

Under `dvc exp run` DVC itself composes conf/ with the -S overrides and writes params.yaml just
before this stage: then it is only checked. Either way every typo, wrong type and impossible value
is reported before any work, all of them together, each with its file and line.
"""

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from athanor import console, files, settings
from athanor.paths import CONF, PARAMS
from athanor.schema import Config, TrainConfig
from athanor.settings import ConfigError

HEADER = "# Composed from conf/ by athanor.config. To change a value, edit conf/. "


def write(config: Config, params: Path = PARAMS, lock: Path = Path("dvc.lock")) -> None:
    """Writes params.yaml, unless that would overwrite values that a person typed into it.

    Raises:
        UserError: with the values that would be lost and the command that runs them.
    """
    body = OmegaConf.to_yaml(config)
    if params.exists() and not _ours(params.read_bytes(), lock):
        typed = _differences(params, body)
        if typed:
            options = " ".join(f"-S {shlex.quote(option)}" for option in typed)
            raise console.UserError(
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
        raise console.UserError(f"{params} is not YAML; mend it or remove it: {error}") from error
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


def main() -> None:
    overrides = sys.argv[1:]
    if os.environ.get("DVC_EXP_NAME") and PARAMS.exists():
        try:
            config = settings.load(overrides)
        except ConfigError:
            # DVC wrote what was just refused; left there, the next `dvc repro` would take it up.
            PARAMS.unlink()
            raise
        console.done("config", {"checked": f"{PARAMS}, as DVC composed it", **_summary(config)})
    else:
        config = settings.compose(CONF, overrides)
        write(config)
        console.done(
            "config", {"wrote": f"{PARAMS}; commit it together with dvc.lock", **_summary(config)}
        )


def _summary(config: Config) -> dict[str, Any]:
    train = config.train
    return {
        "model": config.model.path,
        "training": f"{train.method}, {_duration(train)} of {train.batch_size} rows a batch, "
        f"learning rate {train.learning_rate:g}",
    }


def _duration(train: TrainConfig) -> str:
    return f"{train.iters} iterations" if train.epochs is None else f"{train.epochs} epochs"


if __name__ == "__main__":
    console.run(main)
