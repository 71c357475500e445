"""The second pass over all rows: splits are compared with themselves and with each other.

Duplicates, leaks and shares are found in the numbers of the first pass; only near duplicates need
the rows again. Rows that are rejected are taken out of their split.
"""

from collections.abc import Iterator
from itertools import compress
from pathlib import Path

import numpy as np

from athanor import console
from athanor.chat.conversation import read_line
from athanor.config.data_check import CHECKS, IGNORE, SKIP, WARN
from athanor.config.schema import DataConfig
from athanor.paths import SPLITS
from athanor.prepare import characters, near_duplicates
from athanor.prepare.checks import NAMED, Fault, Findings
from athanor.prepare.tally import Tally, chunks

# Shares of fewer rows are not checked.
FEWEST_ROWS = 20


def compare_rows(tally: Tally, config: DataConfig, findings: Findings, folder: Path) -> None:
    """Compare the rows, write those that pass to `folder`/<split>.jsonl, and keep them in `tally`.

    Rejected rows are read once more, to be written to rejected.jsonl as they were.
    """
    rows = tally.rows
    faults: dict[int, list[Fault]] = {}

    def add(at: int, name: str, text: str) -> None:
        faults.setdefault(int(at), []).append(Fault(name, text))

    for at, other in _duplicates(rows):
        add(at, "duplicate", f"same as {tally.where(rows[other])}")
    for at, other in _shared(rows, "folded"):
        add(at, "leak", f"same as {_held_out(tally, other)}")
    leaked = set(faults)
    for at, other in _shared(rows, "question"):
        if at not in leaked:
            add(at, "question_leak", f"same question as {_held_out(tally, other)}")
    for at in _other_scripts(rows, config.other_script_share):
        name = characters.NAMES[rows[at]["script"]]
        add(at, "other_script", f"written in {name}, unlike almost all rows")
    if findings.actions["near_leak"] != IGNORE:
        near = [hit for hit in _near(rows, config.leak_similarity, folder) if hit[0] not in leaked]
        texts = _texts(rows, [place for hit in sorted(near)[:NAMED] for place in hit[:2]], folder)
        for at, other, similarity in near:
            text = f"{similarity:.0%} similar to {_held_out(tally, other)}"
            pair = [texts[at], texts[other]] if at in texts and other in texts else None
            faults.setdefault(at, []).append(Fault("near_leak", text, pair))
    out = {at for at, why in faults.items() if any(f.name in findings.rejecting for f in why)}
    wrong = {at: why for at, why in faults.items() if not rows[at]["augmented"]}
    for at in sorted(wrong.keys() - out):
        findings.passes(tally.where(rows[at]), wrong[at], None)
    gone = {int(rows[at]["record"]): wrong[at] for at in sorted(wrong.keys() & out)}
    _reject(gone, tally, findings)
    # Augmented copies of a row are out with it; faults of their own are not reported.
    copies = rows["augmented"] & np.isin(rows["record"], list(gone))
    out.update(np.flatnonzero(copies).tolist())
    stays = np.ones(len(rows), np.bool_)
    stays[list(out)] = False
    _write_splits(rows, stays, folder)
    tally.rows = rows[stays]
    _check_shares(tally, config, findings)


def _held_out(tally: Tally, at: int) -> str:
    row = tally.rows[at]
    return f"{tally.where(row)}, which is in {SPLITS[row['split']]}"


def _duplicates(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (row, the first that equals it) for rows that are twice in a split."""
    for split in range(len(SPLITS)):
        at = np.flatnonzero(rows["split"] == split)
        at = at[np.argsort(rows["augmented"][at], kind="stable")]  # no original is a copy's copy
        _, first, inverse = np.unique(rows["whole"][at], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[inverse] != np.arange(len(at)))
        yield from zip(at[again].tolist(), at[first[inverse][again]].tolist(), strict=True)


def _shared(rows: np.ndarray, column: str) -> Iterator[tuple[int, int]]:
    """Yield (row, held-out row) where both have the same in a column: test first, then valid."""
    done: set[int] = set()
    for held_out, splits in (("test", ("train", "valid")), ("valid", ("train",))):
        known = np.flatnonzero((rows["split"] == SPLITS.index(held_out)) & (rows[column] != 0))
        values, first = np.unique(rows[column][known], return_index=True)
        if not len(values):
            continue
        queries = np.flatnonzero(np.isin(rows["split"], [SPLITS.index(split) for split in splits]))
        place = np.minimum(np.searchsorted(values, rows[column][queries]), len(values) - 1)
        for hit in np.flatnonzero(values[place] == rows[column][queries]):
            at = int(queries[hit])
            if at not in done:
                done.add(at)
                yield at, int(known[first[place[hit]]])


def _near(rows: np.ndarray, similarity: float, folder: Path) -> Iterator[tuple[int, int, float]]:
    """Yield (row, held-out row, similarity) for near copies."""
    if not len(rows):
        return
    every = len(rows) // near_duplicates.SAMPLE + 1
    sample: list[str] = []
    answers = []
    for split in SPLITS:
        for chunk in chunks(_folded(folder, split)):
            answers.append(near_duplicates.answer_keys(chunk))
            sample += chunk[::every]
    common = near_duplicates.common_grams(sample)
    frequent = near_duplicates.frequent_answers(np.concatenate(answers))
    at = {split: np.flatnonzero(rows["split"] == i) for i, split in enumerate(SPLITS)}
    with console.progress() as bar:
        task = bar.add_task("look for leaks", total=len(at["train"]) + len(at["valid"]))
        for queried, held_out in (("valid", ("test",)), ("train", ("test", "valid"))):
            known = [text for split in held_out for text in _folded(folder, split)]
            if not known or not len(at[queried]):
                continue
            index = near_duplicates.NearIndex(known, similarity, common, frequent)
            known_at = np.concatenate([at[split] for split in held_out])
            number = 0
            for chunk in chunks(_folded(folder, queried)):
                for nearest in index.nearest(chunk):
                    if nearest is not None:
                        yield int(at[queried][number]), int(known_at[nearest[0]]), nearest[1]
                    number += 1
                bar.advance(task, len(chunk))


def _folded(folder: Path, split: str) -> Iterator[str]:
    with (folder / f"{split}.spool").open(encoding="utf-8") as file:
        for line in file:
            yield line.partition("\t")[0]


def _texts(rows: np.ndarray, places: list[int], folder: Path) -> dict[int, str]:
    """Return the texts of some rows by their places, as a person reads them."""
    texts = {}
    for i, split in enumerate(SPLITS):
        at = np.flatnonzero(rows["split"] == i)
        wanted = np.isin(at, places)
        with (folder / f"{split}.spool").open(encoding="utf-8") as file:
            for place, line in zip(at[wanted].tolist(), compress(file, wanted), strict=True):
                texts[place] = "\n".join(read_line(line.partition("\t")[2]).texts())
    return texts


def _other_scripts(rows: np.ndarray, least: float) -> list[int]:
    """Return the rows in a script that at most the share `least` of all rows is in."""
    counts = np.bincount(rows["script"], minlength=len(characters.NAMES))
    counts[characters.NAMES.index("none")] = 0
    if counts.sum() < FEWEST_ROWS:
        return []
    rare = (counts > 0) & (counts <= least * counts.sum())
    return [int(at) for at in np.flatnonzero(rare[rows["script"]])]


def _reject(out: dict[int, list[Fault]], tally: Tally, findings: Findings) -> None:
    """Read the rejected records once more, and write them as they were."""
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


def _check_shares(tally: Tally, config: DataConfig, findings: Findings) -> None:
    """Note splits without rows, and a label or source that almost all rows have."""
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
    skipped = []
    for name, count in findings.counts.items():
        if findings.actions[name] == SKIP:
            can_warn = WARN in CHECKS[name][1].split()
            hint = f" (data.checks.{name}=warn keeps them)" if can_warn else ""
            skipped.append(f"{count:,} {name}{hint}")
    rejected = f"; rejected.jsonl has the rejected rows: {', '.join(skipped)}" if skipped else ""
    own = [i for i, origin in enumerate(tally.origins) if origin.split == split]
    if own and not sum(tally.read[i] for i in own):
        return f"{tally.origins[own[0]].name} has no rows"
    if own:
        return f"none of its rows passed{rejected}"
    if any(origin.split is None for origin in tally.origins):
        return (
            f"none of {len(tally.rows)} rows fell to it; data.valid_size and data.test_size set "
            f"the shares: add rows, or put some into data/{split}.jsonl{rejected}"
        )
    names = ", ".join(origin.name for origin in tally.origins)
    files = [f"{file['where']} ({file['text']})" for file in findings.examples("unknown_file")]
    unread = f"; not read: {', '.join(files)}" if files else ""
    return (
        f"no file that is read is named {split}, and the rows of {names} stay in their own splits: "
        f"add data/{split}.jsonl, or rename a file so that its rows are distributed{unread}"
    )
