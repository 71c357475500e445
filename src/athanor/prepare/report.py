"""The report of the data as one dict, from which its page, metrics and plots are made."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from athanor import files
from athanor.chat.conversation import read_line
from athanor.chat.tokens import mark_supervised
from athanor.config.data_check import CHECKS
from athanor.config.schema import Config
from athanor.paths import SPLITS
from athanor.prepare import characters
from athanor.prepare.checks import Findings
from athanor.prepare.tally import Tally

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

BINS = 24
SAMPLES = 3
SEVERITY = ("stop", "skip", "fix", "warn")
SPELLED = 30
MOST_NAMED = 100


def build_report(
    cfg: Config,
    tally: Tally,
    findings: Findings,
    spelling: characters.Spelling,
    samples: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Return the counts of rows, checks and characters as values for JSON; lengths in tokens."""
    rows = tally.rows
    kept = np.bincount(rows["origin"][~rows["augmented"]], minlength=len(tally.origins))
    edges = _edges(rows["tokens"])
    return {
        "model": cfg.model.path,
        "max_seq_length": cfg.train.max_seq_length,
        "rows": {
            "read": sum(tally.read),
            "kept": int(kept.sum()),
            "rejected": findings.rejected,
            "augmented": int(rows["augmented"].sum()),
        },
        "files": [
            {
                "path": origin.name,
                "format": " and ".join(tally.formats[i]) or "–",
                "rows": tally.read[i],
                "kept": int(kept[i]),
            }
            for i, origin in enumerate(tally.origins)
        ],
        "splits": {
            split: _split(rows[rows["split"] == i], tally, edges) for i, split in enumerate(SPLITS)
        },
        "checks": _checks(findings),
        "spelled": [
            {"character": character, "tokens": spelling.tokens[character], "rows": count}
            for character, count in spelling.rows.most_common(SPELLED)
        ],
        "cleaning": dict(tally.cleaned),
        "samples": samples,
    }


def mark_samples(
    folder: Path, tally: Tally, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of each split, rendered, in pieces that are supervised or not."""
    samples = {}
    for i, split in enumerate(SPLITS):
        places = tally.rows[tally.rows["split"] == i][:SAMPLES]
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            samples[split] = [
                {
                    "where": tally.where(place),
                    "pieces": mark_supervised(read_line(line), tokenizer, mask_prompt, end),
                }
                for place, line in zip(places, islice(file, SAMPLES), strict=True)
            ]
    return samples


def metrics_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of rows, tokens and faults, which `dvc metrics` compares."""
    counts = ("rows", "tokens", "supervised_tokens", "longest_row", "rows_cut")
    return {
        "rows": report["rows"],
        **{name: {key: split[key] for key in counts} for name, split in report["splits"].items()},
        "checks": {check["name"]: check["rows"] for check in report["checks"]},
    }


def lengths_csv(report: dict[str, Any]) -> str:
    """Return the histogram of lengths as CSV, for `dvc plots`: a line a bin of a split."""
    rows = []
    for name, split in report["splits"].items():
        width = max((len(str(bar["to"])) for bar in split["lengths"]), default=1)
        rows += [
            (name, f"{bar['from']:0{width}}-{bar['to'] - 1:0{width}}", bar["rows"])
            for bar in split["lengths"]
        ]
    return files.csv_text(("split", "tokens", "rows"), rows)


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Return the edges of equal bins, a multiple of 4 tokens wide, for all lengths."""
    longest = int(lengths.max()) if len(lengths) else 0
    width = 4 * max(1, -(-(longest + 1) // (4 * BINS)))
    return np.arange(0, longest + width + 1, width)


def _split(rows: np.ndarray, tally: Tally, edges: np.ndarray) -> dict[str, Any]:
    tokens = rows["tokens"]
    histogram, _ = np.histogram(tokens, edges)
    return {
        "rows": len(rows),
        "tokens": int((tokens - rows["cut"]).sum()),
        "supervised_tokens": int(rows["supervised"].sum()),
        "shortest_row": int(tokens.min()) if len(rows) else 0,
        "median_row": int(np.median(tokens)) if len(rows) else 0,
        "longest_row": int(tokens.max()) if len(rows) else 0,
        "rows_cut": int((rows["cut"] > 0).sum()),
        "tokens_cut": int(rows["cut"].sum()),
        "ends_cut": int(rows["end_cut"].sum()),
        "lengths": [
            {"from": int(low), "to": int(high), "rows": int(count)}
            for low, high, count in zip(edges, edges[1:], histogram, strict=False)
        ]
        if len(rows)
        else [],
        "labels": _counts(rows["label"], tally.labels, None),
        "sources": _counts(rows["source"], tally.sources, "(none)"),
        "scripts": _counts(rows["script"], list(characters.NAMES), None),
    }


def _counts(numbers: np.ndarray, names: list[str], missing: str | None) -> dict[str, int]:
    """Return the count of each name, the largest first; {} where no row has a name.

    Rows without a name are counted as `missing`, unless that is None.
    """
    counts = Counter(
        {names[i]: int(n) for i, n in enumerate(np.bincount(numbers[numbers >= 0])) if n}
    )
    if rest := sum(count for _, count in counts.most_common()[MOST_NAMED:]):
        counts = Counter(dict(counts.most_common(MOST_NAMED)))
        counts["(others)"] += rest
    if counts and missing and (rest := int((numbers < 0).sum())):
        counts[missing] = rest
    return dict(counts.most_common())


def _checks(findings: Findings) -> list[dict[str, Any]]:
    checks = [
        {
            "name": name,
            "action": findings.actions[name],
            "rows": count,
            "problems": findings.problems[name],
            "says": CHECKS[name][0],
            "examples": findings.examples(name),
        }
        for name, count in findings.counts.items()
    ]
    return sorted(checks, key=lambda check: (SEVERITY.index(check["action"]), -check["rows"]))
