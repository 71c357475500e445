"""A sweep: many trainings on the rows that `prepare` wrote, compared by their validation loss.

    uv run python -m athanor.sweep -m train.learning_rate=1e-4,3e-4 train.num_layers=2,4,-1
    uv run python -m athanor.sweep sweep=grid                 # named sweeps are in conf/sweep/
    uv run python -m athanor.sweep sweep=search               # trials chosen by Optuna
    uv run python -m athanor.sweep sweep=grid hydra/launcher=joblib hydra.launcher.n_jobs=2

Composes conf/ with Hydra's multirun and reads artifacts/prepare/. Writes to MLflow a run for the
sweep and a child run for each trial, and to artifacts/sweep/ a summary and the adapters; the
pipeline's outputs stay as they are. Trained trials are never trained again, so the same command
resumes an interrupted sweep. A trial that fails is recorded and the sweep goes on, even where its
process was killed: a second process does the work, and this one starts it again.
"""

import os
import sys

from athanor import console, switches
from athanor.sweep.supervise import COMMAND, WORKER, supervise


def main() -> None:
    sys.argv = [text for text in sys.argv if text not in ("-m", "--multirun")]
    if COMMAND in os.environ:
        switches.end_with_parent(lambda: os.read(0, 1), group=True)  # its end of the pipe is closed
        os.environ[WORKER] = str(os.getpid())
        from athanor.sweep import worker

        worker.main(sys.argv[1:])
    else:
        if any(text.startswith("-") for text in sys.argv[1:]):
            from athanor.config.command import read_overrides  # imports Hydra

            read_overrides(__doc__, ("seed", "train"), composes=True)
        sys.exit(supervise([sys.executable, "-m", "athanor.sweep", *sys.argv[1:]]))


if __name__ == "__main__":
    console.run_command(main, console.RESUMES)
