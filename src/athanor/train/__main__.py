"""Stage `train`: fine-tune the base model on the output of `prepare`.

    uv run python -m athanor.train
    uv run python -m athanor.train train.learning_rate=3e-4

Reads params.yaml and artifacts/prepare/; writes to artifacts/train/: adapters/ (mlx-lm's format;
the best or the last, as train.keep has it), other_adapters/ (the other of the two), history.csv and
metrics.json (the metrics by iteration, and the last of each) and run.json (the MLflow run of later
stages). Checkpoints beside them let the same command continue after an interrupt.
"""

from athanor import console, files, locks
from athanor.config.command import read_overrides
from athanor.config.compose import load_config, warn_if_params_differ_from_conf
from athanor.config.schema import Config
from athanor.device import blas
from athanor.paths import Workspace
from athanor.prepare import result
from athanor.prepare.result import Prepared
from athanor.runs.initial import find_initial_adapters
from athanor.runs.stage_records import name_run, record_training, start_training
from athanor.train.checkpoints import Checkpoints
from athanor.train.fit import fit, warn_of_rows_without_targets
from athanor.train.identity import run_of, training_identity
from athanor.train.plan import refuse_too_many_iterations
from athanor.train.result import describe_metrics, write_result


def main() -> None:
    train(load_config(read_overrides(__doc__, ("seed", "train"))))


@locks.stage("train", "prepare")
def train(cfg: Config) -> None:
    """Train, or continue the training that was interrupted."""
    workspace = Workspace.here()
    warn_if_params_differ_from_conf(cfg)
    blas.use_threads(cfg.train.blas_threads)
    base = Prepared.read(cfg, workspace)
    refuse_too_many_iterations(workspace, cfg.train.epochs or 0, cfg.train.batch_size)
    rows = result.read_rows(workspace, ("train", "valid"))
    initial = find_initial_adapters(cfg, workspace)
    checkpoints = Checkpoints(workspace.checkpoints, training_identity(cfg, base, initial))
    with start_training(
        workspace,
        cfg,
        base.source,
        base.folder,
        name_run(cfg),
        checkpoints.folder.name,
        run_of(checkpoints.folder),
        initial=initial,
    ) as run:
        model, tokenizer = base.load()
        tokens = {split: base.tokens(rows[split], tokenizer, cfg) for split in rows}
        warn_of_rows_without_targets(workspace, rows, tokens)
        trainer = fit(
            cfg,
            base,
            model,
            tokens,
            checkpoints,
            lambda metrics: run.log_metrics(metrics.iteration, metrics.values, once=True),
            initial=initial,
            log=console.out.print,
        )
        metrics = write_result(cfg, trainer, base.source, workspace.trained)
        record_training(run, workspace, workspace.trained, metrics)
        kept = metrics["kept_iteration"]
        trained = {"run": run.name, "run_id": run.wait_for_id(), "iteration": kept}
        files.write_json(workspace.trained / "run.json", trained)
    checkpoints.clear()
    facts = {"adapters": workspace.trained / "adapters", "MLflow run": run.describe()}
    console.print_facts("train", describe_metrics(cfg, metrics) | facts)


if __name__ == "__main__":
    console.run_command(main, f"{console.RESUMES}; {console.CHECKOUT}")
