"""Stage `prepare`: data/*.jsonl, checked and brought into one form, and the base model, found.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes artifacts/prepare/{train,valid,test}.jsonl, which
mlx_lm.lora --data reads unchanged, report.json (how many rows and tokens) and model.json (which
model, at which commit, with which digest).
"""

import sys
from pathlib import Path
from typing import Any

from athanor import chat, console, files, models, rows, settings, sources
from athanor.chat import Tokens
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
    source = sources.resolve(model_path, revision)
    tokenizer = models.load_tokenizer(source.folder())
    chats = [row for found in splits.values() for row in found if "messages" in row.value]
    if chats and not tokenizer.has_chat_template:
        raise console.UserError(
            f"{model_path} has no chat template, so it can't be asked a question, and "
            f"{chats[0].where} asks one: choose an instruct model, or give rows as plain text"
        )
    problems: list[str] = []
    report: dict[str, Any] = {}
    for split, found in splits.items():
        tokens: list[Tokens] = []
        otherwise = missed = 0
        for row in found:
            try:
                tokens.append(chat.tokenize(row.value, tokenizer, mask_prompt))
                otherwise += not chat.asks_as_trained(row.value, tokenizer)
                missed += chat.unsupervised_turns(row.value, tokenizer) if mask_prompt else 0
            except Exception as error:  # chat templates raise what they like
                problems.append(f"{row.where}: {model_path}'s chat template refuses it: {error}")
                tokens.append(Tokens([], []))
        kept = [row.cut(max_seq_length) for row in tokens]
        empty = [
            row.where for row, cut in zip(found, kept, strict=True) if not any(cut.supervised[1:])
        ]
        report[split] = {
            "rows": len(found),
            "tokens": sum(map(len, kept)),
            "supervised_tokens": sum(sum(row.supervised) for row in kept),
            "longest_row": max(map(len, tokens), default=0),
            "rows_cut": sum(len(row) > max_seq_length for row in tokens),
            "rows_with_nothing_to_learn": empty,
            "rows_asked_otherwise_than_trained": otherwise,
            "answers_not_found": missed,
        }
        if split != "test" and len(empty) == len(found) and not problems:
            problems.append(
                f"{data}/{split}.jsonl: no row has a token left to learn in its first "
                f"{max_seq_length} tokens; train.max_seq_length sets how many are read"
            )
    if problems:
        raise console.UserError("data: nothing was prepared\n  " + "\n  ".join(problems))
    for split, found in splits.items():
        files.write_jsonl(out / f"{split}.jsonl", [row.value for row in found])
    files.write_json(out / "report.json", report)
    source.write(out / "model.json")
    return report


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    settings.say_what_is_not_in_conf(cfg)
    report = prepare(
        DATA,
        PREPARED,
        model_path=cfg.model.path,
        revision=cfg.model.revision,
        names=cfg.data,
        max_seq_length=cfg.train.max_seq_length,
        mask_prompt=cfg.train.mask_prompt,
    )
    source = sources.Source.read(PREPARED / "model.json")
    misfits = list(sources.training_misfits(sources.read_config(source.folder()), cfg.train))
    if misfits:
        raise settings.ConfigError([f"{key}: {text}" for key, text in misfits])
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
            "digest": source.digest[:12],
            "wrote": f"{PREPARED}/: train.jsonl, valid.jsonl, test.jsonl, report.json, model.json",
        },
    )


def _warn(split: str, found: dict[str, Any], max_seq_length: int) -> None:
    if found["rows_cut"]:
        console.warn(
            f"{found['rows_cut']} rows of {split} are longer than {max_seq_length} tokens and "
            "will be cut; train.max_seq_length raises the limit"
        )
    if empty := found["rows_with_nothing_to_learn"]:
        console.warn(
            f"{len(empty)} rows of {split} have no token left to learn and are left out: "
            + ", ".join(empty[:5])
        )
    if found["answers_not_found"]:
        console.warn(
            f"{found['answers_not_found']} answers of {split} can't be found in what the model's "
            "chat template makes of their conversations, and are not learned"
        )
    if found["rows_asked_otherwise_than_trained"]:
        console.warn(
            f"{found['rows_asked_otherwise_than_trained']} rows of {split}: the model's template "
            "asks in another way than it writes a finished conversation, so what is trained is "
            "not quite what is asked"
        )


if __name__ == "__main__":
    console.run(main)
