"""A sweep: many trainings on what `prepare` left, compared by their validation loss.

    uv run python -m athanor.sweep -m train.learning_rate=1e-4,3e-4 train.num_layers=2,4,-1
    uv run python -m athanor.sweep sweep=grid                 # named ones are in conf/sweep/
    uv run python -m athanor.sweep sweep=search               # chosen by Optuna
    uv run python -m athanor.sweep sweep=grid hydra/launcher=joblib hydra.launcher.n_jobs=2

Composes conf/ with Hydra's multirun; reads artifacts/prepare/; writes to MLflow a run for the sweep
and one below it for each point, and to artifacts/sweep/ a summary and the adapters. Nothing of the
pipeline is touched. Points that were trained before are not trained again, so the same command goes
on where it was interrupted. A point that fails is noted, and the rest goes on: also where its
process was killed, since the work is done in a process that this one watches.
"""

import os
import signal
import sys
import threading

from athanor import console
from athanor.sweep.supervise import COMMAND, supervise


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        console.out.print(__doc__, highlight=False)
    elif COMMAND in os.environ:
        from athanor.sweep import worker

        _end_with_the_one_who_watches()
        worker.main([text for text in sys.argv[1:] if text not in ("-m", "--multirun")])
    else:
        sys.exit(supervise([sys.executable, "-m", "athanor.sweep", *sys.argv[1:]]))


def _end_with_the_one_who_watches() -> None:
    """Ends this process as SIGTERM does when the one that watches it is gone, and so its pipe."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    console.run_command(main, console.RESUMES)
