"""The report of the data as one web page.

The page loads nothing: no script, no font and no picture from elsewhere. Rows are untrusted, so
everything is escaped, and the page's own policy forbids scripts as well.
"""

import re
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from athanor import console
from athanor.pages.render import render_page

LARGEST = 12  # labels, sources and scripts shown by name
# Two texts are compared by words, or by characters in scripts without spaces: up to so many
# characters of each, with so many of an equal piece kept at both of its ends.
WORDS = re.compile(r"[^\W\u3040-\u9fff]+|\s+|.", re.DOTALL)
COMPARED, KEPT = 4000, 60
ACTIONS = {
    "stop": "nothing is prepared until it is fixed",
    "skip": "the row is left out",
    "fix": "the row is changed",
    "warn": "the row is kept as it is",
}


def page(report: dict[str, Any]) -> str:
    """Return the report as HTML."""
    splits = report["splits"]
    return render_page(
        Path(__file__).with_name("report_page.html"),
        FILTERS,
        report=report,
        share=console.share,
        actions=ACTIONS,
        all=_total(list(splits.values())),
        plot=_plot(splits, report["max_seq_length"]),
        groups={
            name: group
            for name in ("labels", "sources", "scripts")
            if (group := _group({split: of[name] for split, of in splits.items()}))
        },
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{float(value):,.1f}".removesuffix(".0")


def _codepoints(text: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in text)


def _control(text: str) -> str:
    """Replace control characters, which a browser would hide, by their pictures."""
    return text.translate({code: 0x2400 + code for code in range(32) if code not in (9, 10)})


def _difference(pair: list[str]) -> list[list[tuple[str, bool]]]:
    """Return two texts in pieces, each with whether it differs; long equal pieces are shortened."""
    sides = [WORDS.findall(text[:COMPARED]) for text in pair]
    pieces: list[list[tuple[str, bool]]] = [[], []]
    for kind, *ends in SequenceMatcher(None, sides[0], sides[1], autojunk=False).get_opcodes():
        for side, start, end, own in zip(sides, ends[::2], ends[1::2], pieces, strict=True):
            text = "".join(side[start:end])
            if kind == "equal" and len(text) > 2 * KEPT:
                text = f"{text[:KEPT]} … {text[-KEPT:]}"
            if text:
                own.append((text, kind != "equal"))
    return pieces


FILTERS: dict[str, Callable[..., Any]] = {
    "number": _number,
    "counted": console.counted,
    "codepoints": _codepoints,
    "control": _control,
    "difference": _difference,
}


def _total(splits: list[dict[str, Any]]) -> dict[str, Any]:
    sums = ("rows", "tokens", "supervised_tokens", "rows_cut", "tokens_cut", "ends_cut")
    return {name: sum(split[name] for split in splits) for name in sums} | {
        "shortest_row": min(
            (split["shortest_row"] for split in splits if split["rows"]), default=0
        ),
        "median_row": None,
        "longest_row": max((split["longest_row"] for split in splits), default=0),
    }


def _group(counts: dict[str, dict[str, int]]) -> dict[str, Any] | None:
    """Return counts by split, with the same names in the same order, the largest first."""
    totals: Counter[str] = Counter()
    for by_name in counts.values():
        totals.update(by_name)
    if not totals:
        return None
    names = sorted(totals, key=lambda name: (-totals[name], name))
    named, others = names[:LARGEST], names[LARGEST:]
    splits = {}
    shares = [0.0]
    for split, by_name in counts.items():
        bars = [(name, by_name.get(name, 0), False) for name in named]
        if others:
            rest = sum(by_name.get(name, 0) for name in others)
            bars.append((f"others ({len(others):,})", rest, True))
        whole = sum(by_name.values())
        splits[split] = {"bars": bars, "rows": whole}
        shares += [rows / whole for _, rows, _ in bars if whole]
    return {"splits": splits, "longest": max(shares)}


def _plot(splits: dict[str, Any], limit: int) -> dict[str, Any] | None:
    """Return the axes of lengths, shared by all splits, and bars as fractions of the plot.

    Bins are drawn equally wide, so that bins of growing width stay readable.
    """
    bins: list[dict[str, int]] = next((s["lengths"] for s in splits.values() if s["lengths"]), [])
    if not bins:
        return None
    edges = [bin["from"] for bin in bins] + [bins[-1]["to"]]
    shares = {
        name: [bin["rows"] / max(split["rows"], 1) for bin in split["lengths"]]
        for name, split in splits.items()
        if split["lengths"]
    }
    highest = max(map(max, shares.values()))
    steps = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    top = next((step for step in steps if highest <= step), 1.0)
    step = ceil(len(bins) / 5)
    return {
        "splits": {name: [share / top for share in bars] for name, bars in shares.items()},
        "bins": bins,
        "top": top,
        "ticks": [(i / len(bins), edges[i]) for i in range(0, len(edges), step)],
        "limit": np.interp(limit, edges, range(len(edges))) / len(bins)
        if limit <= edges[-1]
        else None,
    }
