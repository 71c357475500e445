"""The second pass over all rows: the splits compared with themselves and with each other.

Duplicates, leaks and shares are found in the numbers that the first pass left; only to find what is
nearly the same the rows are read again. What may not go on is taken out of its split.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from athanor import console
from athanor.config.data_check import CHECKS, IGNORE, SKIP, WARN
from athanor.config.schema import DataConfig
from athanor.paths import SPLITS
from athanor.prepare import characters, near_duplicates
from athanor.prepare.checks import Fault, Findings
from athanor.prepare.tally import Tally, chunks

# A share of fewer rows says nothing.
FEWEST_ROWS = 20


def second_pass(tally: Tally, config: DataConfig, findings: Findings, folder: Path) -> None:
    """Compares the rows, writes `folder`/<split>.jsonl, and leaves in `tally` those that are in it.

    Rows that may not go on are read once more, to be written down as they were.
    """
    rows = tally.rows
    faults: dict[int, list[Fault]] = {}

    def found(at: int, name: str, text: str) -> None:
        faults.setdefault(int(at), []).append(Fault(name, text))

    for at, other in _duplicates(rows):
        found(at, "duplicate", f"the same as {tally.where(rows[other])}")
    for at, other in _shared(rows, "folded"):
        found(at, "leak", f"the same as {_held_out(tally, other)}")
    leaked = set(faults)
    for at, other in _shared(rows, "question"):
        if at not in leaked:
            found(at, "question_leak", f"asks the same as {_held_out(tally, other)}")
    for at in _other_scripts(rows, config.other_script_share):
        name = characters.NAMES[rows[at]["script"]]
        found(at, "other_script", f"written in {name}, unlike almost all other rows")
    if findings.actions["near_leak"] != IGNORE:
        for at, other, similarity in _near(rows, config.leak_similarity, folder):
            if at not in leaked:
                found(at, "near_leak", f"{similarity:.0%} the same as {_held_out(tally, other)}")
    out = {at for at, why in faults.items() if any(f.name in findings.rejecting for f in why)}
    wrong = {at: why for at, why in faults.items() if not rows[at]["made"]}
    for at in sorted(wrong.keys() - out):
        findings.passes(tally.where(rows[at]), wrong[at], None)
    gone = {int(rows[at]["record"]): wrong[at] for at in sorted(wrong.keys() & out)}
    _write_down(gone, tally, findings)
    # What augmentation made of a row is out with it, and its faults are nobody's.
    of_those = rows["made"] & np.isin(rows["record"], list(gone))
    out.update(np.flatnonzero(of_those).tolist())
    stays = np.ones(len(rows), np.bool_)
    stays[list(out)] = False
    _write_splits(rows, stays, folder)
    tally.rows = rows[stays]
    _look_at_shares(tally, config, findings)


def _held_out(tally: Tally, at: int) -> str:
    row = tally.rows[at]
    return f"{tally.where(row)}, which is in {SPLITS[row['split']]}"


def _duplicates(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (row, the first that is the same) for rows that are twice in a split."""
    for split in range(len(SPLITS)):
        at = np.flatnonzero(rows["split"] == split)
        at = at[np.argsort(rows["made"][at], kind="stable")]  # no typed row is a made one's copy
        _, first, inverse = np.unique(rows["whole"][at], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[inverse] != np.arange(len(at)))
        yield from zip(at[again].tolist(), at[first[inverse][again]].tolist(), strict=True)


def _shared(rows: np.ndarray, column: str) -> Iterator[tuple[int, int]]:
    """Yields (row, held-out row) where both have the same in a column: test first, then valid."""
    done: set[int] = set()
    for held_out, others in (("test", ("train", "valid")), ("valid", ("train",))):
        known = np.flatnonzero((rows["split"] == SPLITS.index(held_out)) & (rows[column] != 0))
        values, first = np.unique(rows[column][known], return_index=True)
        if not len(values):
            continue
        asked = np.flatnonzero(np.isin(rows["split"], [SPLITS.index(other) for other in others]))
        place = np.minimum(np.searchsorted(values, rows[column][asked]), len(values) - 1)
        for hit in np.flatnonzero(values[place] == rows[column][asked]):
            at = int(asked[hit])
            if at not in done:
                done.add(at)
                yield at, int(known[first[place[hit]]])


def _near(rows: np.ndarray, similarity: float, folder: Path) -> Iterator[tuple[int, int, float]]:
    """Yields (row, held-out row, similarity) where one is nearly the other."""
    if not len(rows):
        return
    every = len(rows) // near_duplicates.SAMPLE + 1
    texts = (text for split in SPLITS for text in _folded(folder, split))
    common = near_duplicates.common_grams(list(islice(texts, 0, None, every)))
    at = {split: np.flatnonzero(rows["split"] == i) for i, split in enumerate(SPLITS)}
    with console.progress() as bar:
        task = bar.add_task("look for leaks", total=len(at["train"]) + len(at["valid"]))
        for asked, held_out in (("valid", ("test",)), ("train", ("test", "valid"))):
            known = [text for split in held_out for text in _folded(folder, split)]
            if not known or not len(at[asked]):
                continue
            index = near_duplicates.NearIndex(known, similarity, common)
            others = np.concatenate([at[split] for split in held_out])
            number = 0
            for chunk in chunks(_folded(folder, asked)):
                for nearest in index.nearest(chunk):
                    if nearest is not None:
                        yield int(at[asked][number]), int(others[nearest[0]]), nearest[1]
                    number += 1
                bar.advance(task, len(chunk))


def _folded(folder: Path, split: str) -> Iterator[str]:
    with (folder / f"{split}.spool").open(encoding="utf-8") as file:
        for line in file:
            yield line.partition("\t")[0]


def _other_scripts(rows: np.ndarray, least: float) -> list[int]:
    """The rows in a script that at most `least` of all rows are in."""
    counts = np.bincount(rows["script"], minlength=len(characters.NAMES))
    counts[characters.NAMES.index("none")] = 0
    if counts.sum() < FEWEST_ROWS:
        return []
    rare = (counts > 0) & (counts <= least * counts.sum())
    return [int(at) for at in np.flatnonzero(rare[rows["script"]])]


def _write_down(out: dict[int, list[Fault]], tally: Tally, findings: Findings) -> None:
    """Reads the records that may not go on once more, and writes them down as they were."""
    number = 0
    for origin in tally.origins if out else ():
        for record in origin.read(findings.fixes):
            if number in out:
                findings.passes(record.where, out[number], record.value)
            number += 1


def _write_splits(rows: np.ndarray, stays: np.ndarray, folder: Path) -> None:
    for i, split in enumerate(SPLITS):
        chosen = stays[rows["split"] == i]
        spool = folder / f"{split}.spool"
        with spool.open("rb") as read, (folder / f"{split}.jsonl").open("wb") as write:
            write.writelines(
                line.partition(b"\t")[2] for line, stay in zip(read, chosen, strict=True) if stay
            )
        spool.unlink()


def _look_at_shares(tally: Tally, config: DataConfig, findings: Findings) -> None:
    """Says which splits have no rows, and where one label or source has almost all of them."""
    rows = tally.rows
    for split in ("train", "valid"):
        if not (rows["split"] == SPLITS.index(split)).any():
            findings.note("too_few_rows", split, _why_none(split, tally, findings))
    train = rows[rows["split"] == SPLITS.index("train")]
    for column, names in (("label", tally.labels), ("source", tally.sources)):
        known = train[column][train[column] >= 0]
        if len(known) >= FEWEST_ROWS and len(names) > 1:
            counts = np.bincount(known, minlength=len(names))
            if (share := counts.max() / len(known)) > config.imbalance_share:
                name = names[counts.argmax()]
                text = f"{share:.0%} of {len(known)} rows have the {column} {name!r}"
                findings.note("imbalance", "train", text)


def _why_none(split: str, tally: Tally, findings: Findings) -> str:
    skipped = [
        f"{count:,} {name}" + (f" (data.checks.{name}=warn keeps them)" if keeps else "")
        for name, count in findings.counts.items()
        if findings.actions[name] == SKIP
        for keeps in [WARN in CHECKS[name][1].split()]
    ]
    out = f"; left out were {', '.join(skipped)}: rejected.jsonl has them" if skipped else ""
    own = [i for i, origin in enumerate(tally.origins) if origin.split == split]
    if own and not sum(tally.read[i] for i in own):
        return f"{tally.origins[own[0]].name} holds no rows"
    if own:
        return f"none of its rows is left{out}"
    if any(origin.split is None for origin in tally.origins):
        return (
            f"none of {len(tally.rows)} rows fell to it (data.valid_size and data.test_size are "
            f"the shares{out}): add rows, or put some into data/{split}.jsonl"
        )
    there = ", ".join(origin.name for origin in tally.origins)
    return (
        f"no file is named {split}, and {there} are used as they are: add data/{split}.jsonl, or "
        "give a file another name, and its rows are shared out"
    )
