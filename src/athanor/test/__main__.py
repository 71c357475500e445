"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json,
predictions.jsonl and labels.csv (a line a row of a classification), and adds them to the training's
MLflow run, the answers also as a table. What the figures mean is in scores.py. The training
questions are asked too: whether they were learned by heart is what `test_train_*` say.
"""

import sys

from omegaconf import OmegaConf

from athanor import console, files
from athanor.config.compose import load_config
from athanor.device import blas
from athanor.model.adapters import load_adapters
from athanor.paths import SPLITS, Workspace
from athanor.prepare import result
from athanor.prepare.result import Prepared
from athanor.runs.run import resume_run
from athanor.runs.stage_records import record_test
from athanor.test.examine import Examined, as_trained, build_splits, examine, examine_options
from athanor.test.figures import as_columns
from athanor.test.tables import show


def main() -> None:
    workspace = Workspace.here()
    cfg = load_config(sys.argv[1:])
    blas.use_threads(cfg.train.blas_threads)
    trained = files.read_json(workspace.trained / "run.json")
    with resume_run(trained["run"], trained["run_id"]) as run:
        base = Prepared.read(cfg, workspace)
        model, tokenizer = base.load()
        splits = build_splits(cfg, base, tokenizer, result.read_rows(workspace, SPLITS))
        before = examine(model, tokenizer, splits, who="base", **examine_options(cfg))
        load_adapters(model, workspace.trained / "adapters")
        forward = as_trained(
            model, workspace, [row for split in splits.values() for row in split.tokens]
        )
        after = examine(
            model, tokenizer, splits, who="tuned", forward=forward, **examine_options(cfg)
        )
        labels = set[str]().union(*(split.labels for split in splits.values()))
        examined = Examined.of(splits, before, after, tokenizer, labels)
        examined.write(workspace.tested)
        run.log_text(
            OmegaConf.to_yaml(cfg), f"test/{workspace.params.name}"
        )  # it may run again with others
        record_test(
            run,
            workspace.tested,
            examined.metrics,
            as_columns(examined.lines),
            examined.confusion(),
            trained["iteration"],
        )
    show(workspace, examined.metrics, examined.lines, examined.labels)


if __name__ == "__main__":
    console.run_command(main)
