"""Stage `prepare`: data/*.jsonl, checked and brought into one form, and the base model, found.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes artifacts/prepare/{train,valid,test}.jsonl, which
mlx_lm.lora --data reads unchanged, report.json (how many rows and tokens) and model.json (which
model, at which commit, with which digest).
"""

import sys
from pathlib import Path
from typing import Any

from athanor import chat, config, console, files, models, rows
from athanor.paths import DATA, PREPARED
from athanor.schema import DataConfig


def prepare(
    data: Path,
    out: Path,
    *,
    model_path: str,
    revision: str | None,
    names: DataConfig,
    max_seq_length: int,
    mask_prompt: bool,
) -> dict[str, Any]:
    """Checks the rows of `data`, finds the model, writes both to `out` and returns the report.

    Raises:
        UserError: for bad rows, a model that can't be found or opened, or one without a template.
    """
    splits = rows.read(data, names)
    source = models.resolve(model_path, revision)
    tokenizer = models.load_tokenizer(source.folder())
    if not tokenizer.has_chat_template and any("messages" in r.value for r in splits["train"]):
        raise console.UserError(
            f"{model_path} has no chat template, so it can't be asked a question: choose an "
            "instruct model, or give rows as plain text"
        )
    report: dict[str, Any] = {}
    for split, found in splits.items():
        tokens = [chat.tokenize(row.value, tokenizer, mask_prompt) for row in found]
        kept = [row.cut(max_seq_length) for row in tokens]
        report[split] = {
            "rows": len(found),
            "tokens": sum(map(len, kept)),
            "supervised_tokens": sum(sum(row.supervised) for row in kept),
            "longest_row": max(map(len, tokens), default=0),
            "rows_cut": sum(len(row) > max_seq_length for row in tokens),
            "rows_without_an_answer_left": [
                row.where for row, cut in zip(found, kept, strict=True) if not any(cut.supervised)
            ],
            "rows_asked_otherwise_than_trained": sum(
                not chat.asks_as_trained(row.value, tokenizer) for row in found
            ),
        }
        files.write_jsonl(out / f"{split}.jsonl", [row.value for row in found])
    files.write_json(out / "report.json", report)
    source.write(out / "model.json")
    return report


def main() -> None:
    cfg = config.load(sys.argv[1:])
    report = prepare(
        DATA,
        PREPARED,
        model_path=cfg.model.path,
        revision=cfg.model.revision,
        names=cfg.data,
        max_seq_length=cfg.train.max_seq_length,
        mask_prompt=cfg.train.mask_prompt,
    )
    source = models.Source.read(PREPARED / "model.json")
    misfits = list(models.training_misfits(models.read_config(source.folder()), cfg.train))
    if misfits:
        raise config.ConfigError([f"{key}: {text}" for key, text in misfits])
    for split, found in report.items():
        _warn(split, found, cfg.train.max_seq_length)
    console.side_by_side(
        "prepare",
        ["split", "rows", "tokens", "to be learned", "longest row"],
        [
            [s, *(str(f[k]) for k in ("rows", "tokens", "supervised_tokens", "longest_row"))]
            for s, f in report.items()
        ],
    )
    console.done(
        "",
        {
            "model": f"{source.path} {source.commit or ''}".strip(),
            "weights": source.digest[:12],
            "wrote": f"{PREPARED}/: train.jsonl, valid.jsonl, test.jsonl, report.json, model.json",
        },
    )


def _warn(split: str, found: dict[str, Any], max_seq_length: int) -> None:
    if found["rows_cut"]:
        console.warn(
            f"{found['rows_cut']} rows of {split} are longer than {max_seq_length} tokens and "
            "will be cut; train.max_seq_length raises the limit"
        )
    if empty := found["rows_without_an_answer_left"]:
        console.warn(
            f"{len(empty)} rows of {split} have no token left to learn and are left out: "
            + ", ".join(empty[:5])
        )
    if found["rows_asked_otherwise_than_trained"]:
        console.warn(
            f"{found['rows_asked_otherwise_than_trained']} rows of {split}: the model's template "
            "asks in another way than it writes a finished conversation, so what is trained is "
            "not quite what is asked"
        )


if __name__ == "__main__":
    console.run(main)
