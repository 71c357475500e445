"""Stage `prepare`: the rows in data/, checked and brought into one form, and the base model, found.

    uv run python -m athanor.prepare

Reads params.yaml and data/; writes to artifacts/prepare/: train.jsonl, valid.jsonl and test.jsonl,
which mlx_lm.lora --data reads unchanged; rejected.jsonl (the rows that were left out, whole, with
why); report.json, report.html, metrics.json and lengths.csv (what the data looks like); model.json
(which model, at which commit, with which digest); chat.json (what ends an answer, and where
generation stops).
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from athanor import console, files, switches
from athanor.chat.contract import FAULT, NOTE, resolve_contract
from athanor.chat.load import load_tokenizer
from athanor.config.schema import DataConfig
from athanor.errors import UserError
from athanor.model.source import resolve_source
from athanor.paths import SPLITS
from athanor.prepare import read_rows
from athanor.prepare.check_rows import FirstPass
from athanor.prepare.checks import Findings
from athanor.prepare.compare_rows import second_pass
from athanor.prepare.report import lengths_csv, metrics, report, samples
from athanor.prepare.report_page import page


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
    switches.parallel_tokenizers()
    source = resolve_source(model_path, revision)
    tokenizer = load_tokenizer(source.folder())
    contract = resolve_contract(source.folder(), tokenizer, end_token)
    for finding in contract.findings(NOTE, FAULT):
        console.warn(f"{finding.about}: {finding.text}")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    if config.dataset is not None:
        origins = read_rows.dataset(config.dataset, config.dataset_config, config.dataset_revision)
        passed_over: list[tuple[str, str]] = []
    else:
        origins, passed_over = read_rows.origins(
            data, count, config.article_tokens, list(config.formats)
        )
    if not origins:
        raise UserError(
            f"data: {data} holds no rows: put {', '.join(read_rows.SUFFIXES)} files there "
            "(`uv run dvc pull data.dvc` brings the rows that data.dvc names)"
        )
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".rows.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    for left in out.glob(".rejected.jsonl.*"):
        left.unlink()
    rejected = out / "rejected.jsonl"
    with (
        switches.rare_collections(),
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
