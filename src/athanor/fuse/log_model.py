"""Stage `fuse`: adds the adapters to the base model's own weights and writes a model by itself.

    uv run python -m athanor.fuse

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes to artifacts/fuse/ model/, a
folder in Hugging Face's format that mlx_lm.generate --model and transformers read, what is exported
from it (a GGUF, Modelfiles, the adapters in PEFT's format), and fused.json, which says how it was
fused and what parity.py found; adds the model to the training's MLflow run. A model that is not the
trained one is not written.
"""

from pathlib import Path

from athanor import files
from athanor.chat.contract import Contract
from athanor.chat.load import load_tokenizer
from athanor.chat.templates import Message
from athanor.chat.tokens import select_validation_texts, tokenize_rows
from athanor.config.schema import Config
from athanor.model.source import Source
from athanor.paths import Workspace
from athanor.runs import registry
from athanor.runs.run import Run


def log_model(
    workspace: Workspace,
    run: Run,
    cfg: Config,
    source: Source,
    base: Path,
    digest: str,
    rows: list[Message],
    iteration: int,
) -> None:
    """Makes the fused model the run's model, with the validation loss of its adapters."""
    # As it was for the training: the fused folder's names another end, which plain texts get.
    tokenizer = load_tokenizer(base)
    valid = tokenize_rows(
        files.read_jsonl(workspace.rows("valid")),
        tokenizer,
        cfg.train.mask_prompt,
        cfg.train.max_seq_length,
        Contract.read(workspace.prepared / "chat.json").end,
    )
    valid = select_validation_texts(valid, cfg.train.val_batches, cfg.train.batch_size)
    measured = files.read_json(workspace.trained / "metrics.json")
    is_best = measured["kept_iteration"] == measured["best_iteration"]
    turns = (turn for row in rows for turn in row.get("messages", ()))
    asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "?")
    run.log_model(
        workspace.fused / "model",
        digest,
        question=asked,
        step=iteration,
        val_loss=measured["best_val_loss" if is_best else "val_loss"],
        valid_digest=registry.digest_validation(valid),
        tags={"model.path": source.path, "model.digest": source.digest},
        registered_name=cfg.fuse.registered_model_name,
    )
