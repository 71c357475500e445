"""The fused model as a model of the training's MLflow run."""

from itertools import islice
from pathlib import Path

from athanor import files
from athanor.chat.contract import Contract
from athanor.chat.conversation import read_line
from athanor.chat.load import load_tokenizer
from athanor.chat.rendering import describe_rendering
from athanor.chat.tokens import select_validation_texts, tokenize_rows
from athanor.config.schema import Config
from athanor.model.source import Source
from athanor.paths import Workspace
from athanor.runs import registry
from athanor.runs.run import Run

# Training rows that are searched for a question.
ROWS = 8


def log_model(
    workspace: Workspace,
    run: Run,
    cfg: Config,
    source: Source,
    base: Path,
    digest: str,
    iteration: int,
) -> None:
    """Make the fused model the run's model, with the validation loss of its adapters.

    `digest` is the fused model's, `iteration` the one that its weights are from.
    """
    contract = Contract.read(workspace.prepared / "chat.json")
    # The base's: the fused folder's tokenizer names a different end, which plain texts would get.
    tokenizer = load_tokenizer(base, contract.rendering)
    valid = tokenize_rows(
        files.read_jsonl(workspace.rows("valid"), read_line),
        tokenizer,
        cfg.train.mask_prompt,
        cfg.train.max_seq_length,
        contract.end,
    )
    valid = select_validation_texts(valid, cfg.train.val_batches, cfg.train.batch_size)
    metrics = files.read_json(workspace.trained / "metrics.json")
    is_best = metrics["kept_iteration"] == metrics["best_iteration"]
    run.log_model(
        workspace.fused / "model",
        digest,
        question=_first_question(workspace),
        step=iteration,
        val_loss=metrics["best_val_loss" if is_best else "val_loss"],
        valid_digest=registry.digest_validation(valid),
        tags={"model.path": source.path, "model.digest": source.digest},
        registered_name=cfg.fuse.registered_model_name,
        settings=describe_rendering(tokenizer),
    )


def _first_question(workspace: Workspace) -> str:
    """Return the first question of the first training rows, the model's input example."""
    rows = islice(files.iterate_jsonl(workspace.rows("train"), read_line), ROWS)
    turns = (turn for row in rows for turn in row.turns)
    return next((str(turn.content) for turn in turns if turn.role == "user"), "?")
