"""What the data looks like, as one dict, which the report, its tables and its plots are made of."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from athanor import files
from athanor.chat.tokens import mark_supervised
from athanor.config.data_check import CHECKS
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


def report(
    tally: Tally,
    findings: Findings,
    spelling: characters.Spelling,
    *,
    model: str,
    max_seq_length: int,
    samples: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Everything that is known of the rows, in values that JSON can hold; lengths in tokens."""
    rows = tally.rows
    kept = np.bincount(rows["origin"][~rows["made"]], minlength=len(tally.origins))
    edges = _edges(rows["tokens"])
    return {
        "model": model,
        "max_seq_length": max_seq_length,
        "rows": {
            "read": sum(tally.read),
            "kept": int(kept.sum()),
            "rejected": findings.rejected,
            "augmented": int(rows["made"].sum()),
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
            split: _split(rows[rows["split"] == i], tally, max_seq_length, edges)
            for i, split in enumerate(SPLITS)
        },
        "checks": _checks(findings),
        "spelled": [
            {"character": character, "tokens": spelling.tokens[character], "rows": count}
            for character, count in spelling.rows.most_common(SPELLED)
        ],
        "cleaning": dict(tally.cleaned),
        "samples": samples,
    }


def samples(
    folder: Path, tally: Tally, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int
) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each split as the model's template writes them, in pieces."""
    found = {}
    for i, split in enumerate(SPLITS):
        places = tally.rows[tally.rows["split"] == i][:SAMPLES]
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            found[split] = [
                {
                    "where": tally.where(place),
                    "pieces": mark_supervised(json.loads(line), tokenizer, mask_prompt, end),
                }
                for place, line in zip(places, islice(file, SAMPLES), strict=True)
            ]
    return found


def metrics(found: dict[str, Any]) -> dict[str, Any]:
    """The counts that `dvc metrics` compares: of rows, tokens, and of what the checks found."""
    counts = ("rows", "tokens", "supervised_tokens", "longest_row", "rows_cut")
    return {
        "rows": found["rows"],
        **{name: {key: split[key] for key in counts} for name, split in found["splits"].items()},
        "checks": {check["name"]: check["rows"] for check in found["checks"]},
    }


def lengths_csv(found: dict[str, Any]) -> str:
    """Return the histogram of lengths as CSV, for `dvc plots`: a line a bin of a split."""
    rows = []
    for name, split in found["splits"].items():
        width = max((len(str(bar["to"])) for bar in split["lengths"]), default=1)
        rows += [
            (name, f"{bar['from']:0{width}}-{bar['to'] - 1:0{width}}", bar["rows"])
            for bar in split["lengths"]
        ]
    return files.csv_text(("split", "tokens", "rows"), rows)


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Bins of equal width, a multiple of 4 tokens, that hold all lengths."""
    longest = int(lengths.max()) if len(lengths) else 0
    width = 4 * max(1, -(-(longest + 1) // (4 * BINS)))
    return np.arange(0, longest + width + 1, width)


def _split(
    rows: np.ndarray, tally: Tally, max_seq_length: int, edges: np.ndarray
) -> dict[str, Any]:
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


def _counts(numbers: np.ndarray, names: list[str], without: str | None) -> dict[str, int]:
    """How often each name is there, most often first; {} where no row has one."""
    found = Counter(
        {names[i]: int(n) for i, n in enumerate(np.bincount(numbers[numbers >= 0])) if n}
    )
    if rest := sum(count for _, count in found.most_common()[MOST_NAMED:]):
        found = Counter(dict(found.most_common(MOST_NAMED)))
        found["(others)"] += rest
    if found and without and (rest := int((numbers < 0).sum())):
        found[without] = rest
    return dict(found.most_common())


def _checks(findings: Findings) -> list[dict[str, Any]]:
    found = [
        {
            "name": name,
            "action": findings.actions[name],
            "rows": count,
            "says": CHECKS[name][0],
            "examples": [
                {"where": example.where, "text": example.text}
                for example in findings.examples[name]
            ],
        }
        for name, count in findings.counts.items()
    ]
    return sorted(found, key=lambda check: (SEVERITY.index(check["action"]), -check["rows"]))
