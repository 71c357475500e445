"""Stage `prepare`: the rows in data/, checked and brought into one form, and the base model, found.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes to artifacts/prepare/: train.jsonl, valid.jsonl and test.jsonl,
which mlx_lm.lora --data reads unchanged; rejected.jsonl (the rows that were left out, whole, with
why); report.json, report.html, metrics.json and lengths.csv (what the data looks like); model.json
(which model, at which commit, with which digest); chat.json (what ends an answer, and where
generation stops).
"""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from athanor import chat, console, files, models, settings, sources
from athanor.data import records
from athanor.data.checks import Findings
from athanor.data.first_pass import FirstPass
from athanor.data.page import page
from athanor.data.report import lengths_csv, metrics, report, samples
from athanor.data.second_pass import second_pass
from athanor.paths import DATA, PREPARED, SPLITS
from athanor.schema import DataConfig


def prepare(
    data: Path,
    out: Path,
    *,
    model_path: str,
    revision: str | None,
    config: DataConfig,
    max_seq_length: int,
    mask_prompt: bool,
    end_token: str,
) -> dict[str, Any]:
    """Checks the rows of `data`, finds the model, writes both to `out` and returns the report.

    Raises:
        UserError: for faults that stop, a model that can't be found or opened.
    """
    # Nothing here forks, which is what the tokenizer's threads would not survive.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    source = sources.resolve(model_path, revision)
    tokenizer = models.load_tokenizer(source.folder())
    contract = chat.settle(source.folder(), tokenizer, end_token)
    for finding in contract.of(chat.NOTE, chat.FAULT):
        console.warn(f"{finding.about}: {finding.text}")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    if config.dataset is not None:
        origins = records.dataset(config.dataset, config.dataset_config, config.dataset_revision)
        passed_over: list[tuple[str, str]] = []
    else:
        origins, passed_over = records.origins(
            data, count, config.article_tokens, list(config.formats)
        )
    if not origins:
        raise console.UserError(
            f"data: {data} holds no rows: put {', '.join(records.SUFFIXES)} files there "
            "(`uv run dvc pull data.dvc` brings the rows that data.dvc names)"
        )
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".rows.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    for left in out.glob(".rejected.jsonl.*"):
        left.unlink()
    rejected = out / "rejected.jsonl"
    with (
        _rare_collections(),
        tempfile.TemporaryDirectory(dir=out, prefix=".rows.") as name,
        files.writing(rejected) as reasons,
    ):
        folder = Path(name)
        findings = Findings(dict(config.checks), reasons)
        for path, text in passed_over:
            findings.note("unknown_file", path, text)
        if any(origin.split for origin in origins):
            for origin in origins:
                if origin.split is None:
                    text = "its rows are shared out, while other files are a split by their name"
                    findings.note("shared_out", origin.name, text)
        first = FirstPass(
            origins,
            config,
            tokenizer,
            findings,
            max_seq_length=max_seq_length,
            mask_prompt=mask_prompt,
            end=contract.end,
        )
        tally = first.run(folder)
        findings.stop(rejected)
        second_pass(tally, config, findings, folder)
        findings.stop(rejected)
        found = report(
            tally,
            findings,
            first.spelling,
            model=model_path,
            max_seq_length=max_seq_length,
            samples=samples(folder, tally, tokenizer, mask_prompt, contract.end),
        )
        files.write_json(out / "report.json", found)
        files.write_text(out / "report.html", page(found))
        for split in SPLITS:
            files.take(folder / f"{split}.jsonl", out / f"{split}.jsonl")
    files.write_json(out / "metrics.json", metrics(found))
    files.write_text(out / "lengths.csv", lengths_csv(found))
    contract.write(out / "chat.json")
    source.write(out / "model.json")
    return found


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Rows are freed as they go: looking for cycles among them, in vain, is a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    settings.say_what_is_not_in_conf(cfg)
    settings.refuse_misfits(cfg, sources.find(cfg.model.path, cfg.model.revision))
    found = prepare(
        DATA,
        PREPARED,
        model_path=cfg.model.path,
        revision=cfg.model.revision,
        config=settings.plain(cfg.data),
        max_seq_length=cfg.train.max_seq_length,
        mask_prompt=cfg.train.mask_prompt,
        end_token=cfg.train.end_token,
    )
    source = sources.Source.read(PREPARED / "model.json")
    _show(found)
    rows = found["rows"]
    console.done(
        "",
        {
            "rows": f"{rows['kept']:,} of {rows['read']:,}"
            + (f", and {rows['augmented']:,} in other words" if rows["augmented"] else "")
            + (f"; {PREPARED}/rejected.jsonl has the rest" if rows["rejected"] else ""),
            "model": f"{source.path} {source.commit or ''}".strip(),
            "digest": source.digest[:12],
            "wrote": f"{PREPARED}/: the splits, report.html (open it), report.json, model.json",
        },
    )


def _show(found: dict[str, Any]) -> None:
    """Prints what is in the splits, and what the checks found."""
    columns = ("rows", "tokens", "supervised_tokens", "median_row", "longest_row", "rows_cut")
    console.side_by_side(
        "prepare",
        ["split", "rows", "tokens", "to be learned", "median row", "longest", "cut"],
        [
            [name, *(f"{split[column]:,}" for column in columns)]
            for name, split in found["splits"].items()
        ],
    )
    if found["checks"]:
        console.side_by_side(
            "",
            ["check", "", "rows", "what it found, and where first"],
            [
                [
                    check["name"],
                    check["action"],
                    f"{check['rows']:,}",
                    ": ".join(check["examples"][0].values()) if check["examples"] else "",
                ]
                for check in found["checks"]
            ],
        )


if __name__ == "__main__":
    console.run(main)
