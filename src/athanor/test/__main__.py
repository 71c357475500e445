"""Stage `test`: compare base and tuned model on every prepared row.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line for each row of a classification), and adds them to the
training's MLflow run, the answers also as a table. scores.py defines the figures. The training
questions are asked as well: `test_train_*` show if they were learned by heart.
"""

from omegaconf import OmegaConf

from athanor import console, files, locks
from athanor.config.command import read_overrides
from athanor.config.compose import load_config
from athanor.config.schema import Config
from athanor.device import blas
from athanor.model.adapters import load_adapters
from athanor.paths import SPLITS, Workspace
from athanor.prepare import result
from athanor.prepare.result import Prepared
from athanor.runs.run import resume_run
from athanor.runs.stage_records import record_test
from athanor.test.examine import Examination, build_splits, examine, forward_as_trained
from athanor.test.predictions import as_columns
from athanor.test.tables import print_examination


def main() -> None:
    test_models(load_config(read_overrides(__doc__, ("seed", "test"))))


@locks.stage("test", "prepare", "train")
def test_models(cfg: Config) -> None:
    """Examine both models, record the results and print them."""
    workspace = Workspace.here()
    blas.use_threads(cfg.train.blas_threads)
    trained = files.read_json(workspace.trained / "run.json")
    with resume_run(trained["run"], trained["run_id"]) as run:
        base = Prepared.read(cfg, workspace)
        model, tokenizer = base.load()
        splits = build_splits(cfg, base, tokenizer, result.read_rows(workspace, SPLITS))
        base_outcomes = examine(cfg, model, tokenizer, splits, "base")
        load_adapters(model, workspace.trained / "adapters")
        rows = [row for split in splits.values() for row in split.tokens]
        forward = forward_as_trained(model, workspace, rows)
        tuned_outcomes = examine(cfg, model, tokenizer, splits, "tuned", forward)
        labels = set[str]().union(*(split.labels for split in splits.values()))
        examination = Examination.compare(splits, base_outcomes, tuned_outcomes, tokenizer, labels)
        examination.write(workspace.tested)
        # The values of this test: the stage may have run with other ones than the training.
        run.log_text(OmegaConf.to_yaml(cfg), f"test/{workspace.params.name}")
        record_test(
            run,
            workspace.tested,
            examination.metrics,
            as_columns(examination.predictions),
            examination.confusion_csv(),
            trained["iteration"],
        )
    print_examination(workspace, examination)


if __name__ == "__main__":
    console.run_command(main)
