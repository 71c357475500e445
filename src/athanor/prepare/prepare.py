"""The stage `prepare` as a function: from a folder of data and a model's name to its outputs."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from athanor import console, files, switches
from athanor.chat.contract import FAULT, NOTE, resolve_contract
from athanor.chat.load import load_configured_tokenizer
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.model.source import resolve_source
from athanor.paths import SPLITS
from athanor.prepare.check_rows import FirstPass
from athanor.prepare.checks import NAMED, Findings
from athanor.prepare.compare_rows import compare_rows
from athanor.prepare.demo import demo_note
from athanor.prepare.origins import SUFFIXES, Origin, find_dataset, find_files
from athanor.prepare.report import build_report, lengths_csv, mark_samples, metrics_of
from athanor.prepare.report_page import page
from athanor.prepare.streams import Limits


def prepare(data: Path, out: Path, cfg: Config) -> dict[str, Any]:
    """Check the rows of `data`, find the model, write both to `out`, and return the report.

    `cfg` has plain values, as from `to_dataclass`: OmegaConf's look-ups are too slow for each row.

    Raises:
        UserError: for faults that stop, and a model that can't be found or opened.
    """
    switches.parallel_tokenizers()
    config = cfg.data
    source = resolve_source(cfg.model.path, cfg.model.revision)
    tokenizer = load_configured_tokenizer(source.folder(), config.date, config.system)
    contract = resolve_contract(source.folder(), tokenizer, cfg.train.end_token)
    for finding in contract.findings(NOTE, FAULT):
        console.warn(f"{finding.about}: {finding.text}")

    def count(text: str) -> int:
        return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    skipped: list[tuple[str, str]] = []
    if config.dataset is not None:
        origins = find_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    else:
        limits = Limits(config.max_row_bytes, config.max_file_bytes)
        origins, skipped = find_files(
            data, count, config.article_tokens, list(config.formats), limits
        )
    if not origins and skipped:
        listing = "\n  ".join(f"{path}: {reason}" for path, reason in skipped[:NAMED])
        raise UserError("prepare.no_file_read", folder=data, listing=listing)
    if not origins:
        raise UserError("prepare.no_rows", folder=data, suffixes=SUFFIXES)
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(".rows.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    for stale in out.glob(".rejected.jsonl.*"):
        stale.unlink()
    rejected = out / "rejected.jsonl"
    with (
        switches.rare_collections(),
        tempfile.TemporaryDirectory(dir=out, prefix=".rows.") as name,
        files.writing(rejected) as reasons,
    ):
        folder = Path(name)
        findings = Findings(dict(config.checks), reasons)
        _note_files(data, origins, skipped, findings)
        first = FirstPass(origins, cfg, tokenizer, contract.end, findings)
        tally = first.run(folder)
        findings.stop(rejected)
        compare_rows(tally, config, findings, folder)
        findings.stop(rejected)
        samples = mark_samples(folder, tally, tokenizer, cfg.train.mask_prompt, contract.end)
        report = build_report(cfg, tally, findings, first.token_checks.spelling, samples)
        files.write_json(out / "report.json", report)
        files.write_text(out / "report.html", page(report))
        for split in SPLITS:
            files.take(folder / f"{split}.jsonl", out / f"{split}.jsonl")
    files.write_json(out / "metrics.json", metrics_of(report))
    files.write_text(out / "lengths.csv", lengths_csv(report))
    contract.write(out / "chat.json")
    source.write(out / "model.json")
    return report


def _note_files(
    data: Path, origins: list[Origin], skipped: list[tuple[str, str]], findings: Findings
) -> None:
    for path, text in skipped:
        findings.note("unknown_file", path, text)
    if note := demo_note(data, [origin.name for origin in origins]):
        findings.note("demo_rows", *note)
    if any(origin.split for origin in origins):
        for origin in origins:
            if origin.split is None:
                text = "its rows are distributed over the splits, but other files are splits"
                findings.note("shared_out", origin.name, text)
