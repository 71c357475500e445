"""Stage `config`: compose conf/ into params.yaml, the one file that every later stage reads.

    uv run python -m athanor.config                                  # conf/ as it stands
    uv run python -m athanor.config model=qwen2.5-0.5b train.iters=500

Under `dvc exp run` DVC itself composes conf/ with the -S overrides and writes params.yaml just
before this stage: then it is only checked. Either way every typo, wrong type and impossible value
is reported before any work, all of them together, each with its file and line.
"""

import os

from athanor import console
from athanor.config.command import read_overrides
from athanor.config.compose import compose_config, load_config
from athanor.config.params_file import write_params
from athanor.config.rules import ConfigError
from athanor.config.schema import SECTIONS
from athanor.paths import Workspace


def main() -> None:
    """Write params.yaml, or check it where DVC wrote it."""
    workspace = Workspace.here()
    overrides = read_overrides(__doc__, ("seed", *SECTIONS), composes=True)
    if os.environ.get("DVC_EXP_NAME") and workspace.params.exists():
        try:
            config = load_config(overrides)
        except ConfigError:
            # The values that DVC wrote are wrong; the next `dvc repro` must not run with them.
            workspace.params.unlink()
            raise
        done = {"checked": f"{workspace.params}, as DVC composed it"}
    else:
        config = compose_config(workspace.conf, overrides)
        write_params(config, workspace)
        done = {"wrote": f"{workspace.params}; commit it together with dvc.lock"}
    train = config.train
    length = f"{train.iters} iterations" if train.epochs is None else f"{train.epochs} epochs"
    training = (
        f"{train.method}, {length} of {train.batch_size} rows a batch, "
        f"learning rate {train.learning_rate:g}"
    )
    console.print_facts("config", {**done, "model": config.model.path, "training": training})


if __name__ == "__main__":
    console.run_command(main)
