"""Rows on their way from data/ to artifacts/prepare/, in two passes over them.

The first reads every record, brings it into the one form, has the tokenizer read it, checks it and
writes it to its split. The second compares the splits, with themselves and with each other. Rows
lie on the disk in between; some 60 bytes of each stay in memory, and the held-out texts.
"""

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from athanor import chat, console
from athanor.chat import Rendered
from athanor.console import UserError
from athanor.data import characters, cleaning, formats, leaks
from athanor.data.checks import CHECKS, OFF, SKIP, WARN, Fault, Findings
from athanor.data.formats import Formats, Row, label_of
from athanor.data.records import Origin, Record
from athanor.paths import SPLITS
from athanor.schema import DataConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding

# Rows that are looked at together: enough for the tokenizer to share out among the cores.
CHUNK = 1000
CHUNKS_AHEAD = 3
# More kinds than that are texts, not labels.
MOST_LABELS = 100
# A share of fewer rows says nothing.
FEWEST_ROWS = 20

# What is known of each row that goes on; `record` numbers the records as they were read, from 0,
# and is -1 for a row that augmentation made.
COLUMNS = np.dtype(
    [
        ("record", np.int64),
        ("origin", np.int32),
        ("line", np.int32),
        ("split", np.int8),
        ("tokens", np.int32),
        ("supervised", np.int32),
        ("cut", np.int32),
        ("end_cut", np.bool_),
        ("script", np.int8),
        ("label", np.int32),
        ("source", np.int32),
        ("whole", np.uint64),
        ("folded", np.uint64),
        ("question", np.uint64),
    ]
)


CLASSES = "classification"
# Between a folded question and a folded answer: nothing that folding leaves.
BETWEEN = "\x1f"
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
UNWRITTEN = Rendered("", None, [], 0)


@dataclass(slots=True)
class Candidate:
    """A row in the first pass, with all that is known of it before it is tokens."""

    record: Record
    number: int
    origin: int
    row: Row
    line: str
    said: str
    faults: list[Fault]
    split: int
    folded: str
    folded_digest: int
    question: str
    rendered: Rendered = UNWRITTEN


@dataclass
class Tally:
    """What both passes counted. `rows` has a row of COLUMNS for each that is still in."""

    rows: np.ndarray
    origins: list[Origin]
    read: list[int]
    formats: list[Counter[str]]
    labels: list[str]
    sources: list[str]
    cleaned: Counter[str] = field(default_factory=Counter)
    augmented: int = 0

    def where(self, row: np.void) -> str:
        """A row's place."""
        return f"{self.origins[row['origin']].name}:{row['line']}"


class FirstPass:
    """Reads, forms, tokenizes and checks every record."""

    def __init__(
        self,
        origins: list[Origin],
        config: DataConfig,
        tokenizer: "TokenizerWrapper",
        findings: Findings,
        *,
        max_seq_length: int,
        mask_prompt: bool,
    ) -> None:
        self.origins = origins
        self.config = config
        self.tokenizer = tokenizer
        self.findings = findings
        self.max_seq_length = max_seq_length
        self.mask_prompt = mask_prompt
        self.formats = Formats(config, label_set(origins, config, findings.fixes))
        self.spelling = characters.Spelling(tokenizer)
        self._said = [self.formats.of(origin.name) for origin in origins]
        self._steps = [step for step in cleaning.STEPS if config.clean.get(step)]
        self._special = special_tokens(tokenizer)
        self._ends = tuple(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)))
        self._shares = shares(origins, config)
        self._labels: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._first: dict[int, tuple[str, int]] = {}
        self._tally = Tally(
            np.empty(0, COLUMNS),
            origins,
            [0] * len(origins),
            [Counter() for _ in origins],
            [],
            [],
        )

    def run(self, folder: Path) -> Tally:
        """Writes what goes on to `folder`/<split>.spool: the folded text, a tab, the row."""
        found = []
        with (
            ExitStack() as stack,
            ThreadPoolExecutor(1) as pool,
            console.progress() as bar,
        ):
            files = [
                stack.enter_context((folder / f"{split}.spool").open("w", encoding="utf-8"))
                for split in SPLITS
            ]
            task = bar.add_task("read rows", total=sum(origin.lines() for origin in self.origins))
            # The tokenizer has threads of its own: while they read some chunks, others are prepared
            # for them here, and those that they have read are finished.
            waiting: deque[tuple[list[Candidate], Future[list[Encoding]]]] = deque()
            for records in _chunks(self._records(lambda lines: bar.advance(task, lines))):
                candidates = self._rendered(
                    [made for item in records for made in self._candidates(*item)]
                )
                texts = [candidate.rendered for candidate in candidates]
                waiting.append((candidates, pool.submit(chat.encode, texts, self.tokenizer)))
                if len(waiting) > CHUNKS_AHEAD:
                    found.append(self._finished(*waiting.popleft(), files))
            while waiting:
                found.append(self._finished(*waiting.popleft(), files))
        self._tally.rows = np.concatenate(found or [self._tally.rows])
        self._tally.labels, self._tally.sources = list(self._labels), list(self._sources)
        return self._tally

    def _records(self, on_lines: Callable[[int], None]) -> Iterator[tuple[int, int, Record]]:
        number = 0
        for index, origin in enumerate(self.origins):
            line = 0
            for record in origin.read(self.findings.fixes):
                if record.line - line >= CHUNK:
                    on_lines(record.line - line)
                    line = record.line
                yield number, index, record
                number += 1
            self._tally.read[index] = number - sum(self._tally.read[:index])
            on_lines(max(origin.lines() - line, 0))

    def _candidates(self, number: int, origin: int, record: Record) -> Iterator[Candidate]:
        """The row of a record, and what augmentation makes of it; nothing if it may not go on."""
        faults = list(record.faults)
        candidate = None
        try:
            if not faults:
                candidate = self._candidate(number, origin, record, faults)
        except Fault as found:
            faults.append(found)
        for fault in record.fixed:
            self.findings.note(fault.name, record.where, fault.text)
        if candidate is None:
            self.findings.passes(record.where, faults, record.value, lost=True)
            return
        yield candidate
        if SPLITS[candidate.split] == "train":
            yield from self._in_other_words(candidate)

    def _rendered(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates as the model's template writes them, without those that it refuses."""
        written = chat.render_all([made.row.value for made in candidates], self.tokenizer)
        taken = []
        for candidate, rendered in zip(candidates, written, strict=True):
            if isinstance(rendered, Rendered):
                candidate.rendered = rendered
                taken.append(candidate)
            else:
                fault = Fault("template_refuses", f"the chat template refuses it: {rendered}")
                self._passes(candidate, [*candidate.faults, fault])
        return taken

    def _passes(self, candidate: Candidate, faults: list[Fault]) -> bool:
        record = candidate.record
        if candidate.number < 0:  # what augmentation made is not anybody's fault
            return all(fault.name not in self.findings.rejecting for fault in faults)
        return self.findings.passes(record.where, faults, record.value)

    def _candidate(
        self, number: int, origin: int, record: Record, faults: list[Fault]
    ) -> Candidate:
        kind = self.formats.kind(record.value, self._said[origin])
        self._check_quality(record.value)
        row = self._row(record, kind)
        first, line = self._first.setdefault(origin, (kind, record.line))
        if kind != first:
            text = f"{kind}, and line {line} is {first}: expected one format in a file"
            faults.append(Fault("mixed_formats", text))
        if self._steps:
            row.value, changed = cleaning.clean(row.value, self._steps)
            self._tally.cleaned.update(changed)
            if changed:
                _check_what_is_left(row)
        self._tally.formats[origin][row.format] += 1
        return self._placed(number, origin, record, row, faults)

    def _row(self, record: Record, kind: str) -> Row:
        value = record.value
        try:
            return self.formats.row(value, kind)
        except Fault as fault:
            if fault.name not in self.findings.fixes or fault.name != "no_answer":
                raise
            row = self.formats.row(formats.without_end(value, kind, self.config), kind)
            record.fixed.append(fault)
            return row

    def _placed(
        self, number: int, origin: int, record: Record, row: Row, faults: list[Fault]
    ) -> Candidate:
        """What is known of a row whose text is settled."""
        line = self._line(row, record)
        if self._special is not None and self._special.search(line) is not None:
            line = self._without_special(row, line, faults, record)
        question = leaks.fold(row.question())
        subject = question if row.subject is None else leaks.fold(row.subject)
        folded = f"{subject}{BETWEEN}{leaks.fold(row.answer())}"
        digest = leaks.digest(folded)
        split = self.origins[origin].split or leaks.split_of(digest, self._shares)
        return Candidate(
            record,
            number,
            origin,
            row,
            line,
            "\n".join(_texts(row.value)),
            faults,
            SPLITS.index(split),
            folded,
            digest,
            question,
        )

    def _line(self, row: Row, record: Record) -> str:
        try:
            line = ENCODER.encode(row.value)
            line.encode()
            return line
        except UnicodeEncodeError:
            fault = Fault(
                "half_character", "half a character (a lone surrogate, as of a cut emoji)"
            )
            if fault.name not in self.findings.fixes:
                raise fault from None
            record.fixed.append(fault)
            row.value = _every_string(row.value, _whole_characters)
            row.subject = None if row.subject is None else _whole_characters(row.subject)
            return ENCODER.encode(row.value)
        except (TypeError, ValueError) as error:
            raise Fault("wrong_type", f"a value that JSON does not have: {error}") from None

    def _check_quality(self, value: dict[str, Any]) -> None:
        least = self.config.min_quality
        if least is None or value.get("quality_score") is None:
            return
        try:
            score = float(value["quality_score"])
        except (TypeError, ValueError, OverflowError):
            text = f"expected a number as quality_score, found {value['quality_score']!r:.60}"
            raise Fault("wrong_type", text) from None
        if not score >= least:
            raise Fault("low_quality", f"quality_score {score:g} is below {least:g}")

    def _without_special(self, row: Row, line: str, faults: list[Fault], record: Record) -> str:
        """The line of a row without the model's special tokens, if that is how they are fixed."""
        assert self._special is not None
        written = line
        if "text" in row.value:
            written = row.value["text"]
            for end in self._ends:  # what a text ends with is no smuggler's
                written = written.removesuffix(end)
        if (hit := self._special.search(written)) is None:
            return line
        fault = Fault("special_token", f"the model's own {hit[0]} stands inside a text")
        if fault.name not in self.findings.fixes:
            faults.append(fault)
            return line
        row.value = _every_string(row.value, self._without_tokens)
        if row.subject is not None:
            row.subject = self._without_tokens(row.subject)
        _check_what_is_left(row)
        record.fixed.append(fault)
        return self._line(row, record)

    def _without_tokens(self, text: str) -> str:
        assert self._special is not None
        while (shorter := self._special.sub("", text)) != text:
            text = shorter  # what is left may have become one
        return text

    def _in_other_words(self, candidate: Candidate) -> Iterator[Candidate]:
        config = self.config
        lines = {candidate.line}
        for copy in range(config.augment_copies if config.synonyms else 0):
            value = cleaning.in_other_words(
                candidate.row.value,
                {word: list(others) for word, others in config.synonyms.items()},
                config.augment_share,
                f"{config.augment_seed} {copy} {candidate.line}",
            )
            row = Row(value, candidate.row.format)
            made = self._placed(-1, candidate.origin, candidate.record, row, [])
            if made.line not in lines:
                lines.add(made.line)
                made.split = candidate.split
                yield made

    def _finished(
        self,
        candidates: list[Candidate],
        encoded: "Future[list[Encoding]]",
        files: Sequence[IO[str]],
    ) -> np.ndarray:
        rows = []
        lines: list[list[str]] = [[] for _ in files]
        for candidate, encoding in zip(candidates, encoded.result(), strict=True):
            numbers = self._tokens(candidate, encoding)
            if candidate.faults and not self._passes(candidate, candidate.faults):
                continue
            self._tally.augmented += candidate.number < 0
            lines[candidate.split].append(f"{candidate.folded}\t{candidate.line}\n")
            value = candidate.record.value
            rows.append(
                (
                    candidate.number,
                    candidate.origin,
                    candidate.record.line,
                    candidate.split,
                    *numbers,
                    characters.NAMES.index(characters.script(candidate.said)),
                    _known(self._labels, candidate.row.value.get("label")),
                    _known(self._sources, source_of(value)),
                    leaks.digest(candidate.line),
                    candidate.folded_digest,
                    leaks.digest(candidate.question) if candidate.question else 0,
                )
            )
        for file, found in zip(files, lines, strict=True):
            file.write("".join(found))
        return np.array(rows, COLUMNS)

    def _tokens(self, candidate: Candidate, encoding: "Encoding") -> tuple[int, int, int, bool]:
        """Tokens, supervised ones, tokens cut, whether the end is; adds what is wrong in them."""
        rendered, faults, limit = candidate.rendered, candidate.faults, self.max_seq_length
        tokens = chat.supervise(rendered, encoding, self.tokenizer, self.mask_prompt)
        length, cut = len(tokens), max(len(tokens) - limit, 0)
        end_cut = cut > 0 and any(tokens.supervised[limit:])
        kept = sum(tokens.supervised[1:limit])
        if not kept:
            faults.append(
                Fault(
                    "nothing_to_learn",
                    f"none of its first {limit} tokens is to be learned; it has {length}"
                    if cut
                    else "none of its tokens is to be learned",
                )
            )
        elif end_cut:
            faults.append(
                Fault("end_cut", f"{cut} of {length} tokens are cut, with the end of the answer")
            )
        elif cut:
            faults.append(Fault("too_long", f"{cut} of {length} tokens are cut"))
        if self.mask_prompt and rendered.answers_missed:
            text = f"the chat template writes {rendered.answers_missed} answers otherwise"
            faults.append(Fault("answer_not_found", f"{text}: they are not learned"))
        if not chat.asks_as_trained(rendered, encoding, tokens.ids, self.tokenizer):
            text = "the template asks in another way than it writes the finished conversation"
            faults.append(Fault("asked_otherwise", text))
        said = candidate.said
        if spelled := self.spelling.spelled(said):
            self.spelling.rows.update(spelled)
            share = sum(map(said.count, spelled)) / len(said)
            if share > self.config.spelled_share:
                shown = "".join(sorted(spelled)[:10])
                text = f"{share:.0%} of its characters take several tokens each: {shown}"
                faults.append(Fault("spelled_characters", text))
        return length, kept, cut, end_cut


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
    if findings.actions["near_leak"] != OFF:
        for at, other, similarity in _near(rows, config.leak_similarity, folder):
            if at not in leaked:
                found(at, "near_leak", f"{similarity:.0%} the same as {_held_out(tally, other)}")
    out = {at for at, why in faults.items() if any(f.name in findings.rejecting for f in why)}
    for at in sorted(faults.keys() - out):
        if rows[at]["record"] >= 0:  # what augmentation made is not anybody's fault
            findings.passes(tally.where(rows[at]), faults[at], None)
    _write_down({int(rows[at]["record"]): faults[at] for at in sorted(out)}, tally, findings)
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
    at = {split: np.flatnonzero(rows["split"] == i) for i, split in enumerate(SPLITS)}
    with console.progress() as bar:
        task = bar.add_task("look for leaks", total=len(at["train"]) + len(at["valid"]))
        for asked, held_out in (("valid", ("test",)), ("train", ("test", "valid"))):
            texts = [text for split in held_out for text in _folded(folder, split)]
            if not texts or not len(at[asked]):
                continue
            index = leaks.NearIndex(texts, similarity)
            others = np.concatenate([at[split] for split in held_out])
            number = 0
            for chunk in _chunks(_folded(folder, asked)):
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
    out.pop(-1, None)
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
    if any(origin.split == split for origin in tally.origins):
        why = [
            f"{count:,} {name}" + (f" (data.checks.{name}=warn keeps them)" if keeps else "")
            for name, count in findings.counts.items()
            if findings.actions[name] == SKIP
            for keeps in [WARN in CHECKS[name][1].split()]
        ]
        return f"no row is left of it: {', '.join(why)}; rejected.jsonl has them, whole"
    if any(origin.split is None for origin in tally.origins):
        return (
            f"none of {len(tally.rows)} rows fell to it (data.valid_size and data.test_size are "
            f"the shares): add rows, or put some into data/{split}.jsonl"
        )
    there = ", ".join(origin.name for origin in tally.origins)
    return (
        f"no file is named {split}, and {there} are used as they are: add data/{split}.jsonl, or "
        "give a file another name, and its rows are shared out"
    )


def label_set(origins: list[Origin], config: DataConfig, fixes: frozenset[str]) -> list[str]:
    """The labels of all rows of a classification, in their order; those of the config, if it has.

    Raises:
        UserError: where there are so many that they must be something else.
    """
    if config.labels is not None:
        return [str(label) for label in config.labels]
    labels: set[str] = set()
    formats = Formats(config, [])
    for origin in origins:
        said = formats.of(origin.name)
        first = None
        for record in origin.read(fixes):
            try:
                kind = formats.kind(record.value, said)
                label = label_of(record.value, config.label_feature) if kind == CLASSES else ""
            except Fault:
                continue
            first = first or kind
            if first != CLASSES:
                break  # one format a file, and its first row says which
            if kind == CLASSES:
                labels.add(label)
            if len(labels) > MOST_LABELS:
                raise UserError(
                    f"{origin.name}: more than {MOST_LABELS} different labels under "
                    f"{config.label_feature!r}: name them in data.labels, or read the file as "
                    "plain text: data.format=text"
                )
    return sorted(labels)


def shares(origins: list[Origin], config: DataConfig) -> dict[str, float]:
    """The share that each split gets of the rows that have none: nothing where it has a file."""
    given = {origin.split for origin in origins}
    valid = 0.0 if "valid" in given else config.valid_size
    test = 0.0 if "test" in given else config.test_size
    return {"valid": valid, "test": test, "train": 1 - valid - test}


def special_tokens(tokenizer: "TokenizerWrapper") -> re.Pattern[str] | None:
    """Finds any of a tokenizer's special tokens in a text."""
    added = tokenizer.added_tokens_decoder.values()
    texts = sorted((str(token) for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def source_of(value: Any) -> str | None:
    """Where a record says that it is from."""
    if not isinstance(value, dict):
        return None
    metadata = value.get("metadata")
    source = value.get("source", metadata.get("source") if isinstance(metadata, dict) else None)
    return _whole_characters(source) if isinstance(source, str) and source else None


def _check_what_is_left(row: Row) -> None:
    """Raises a Fault where mending left a question or an answer without a text."""
    if "text" in row.value:
        if not row.value["text"].strip():
            raise Fault("empty_text", "nothing is left of it")
        return
    for message in row.value["messages"]:
        said = message["content"].strip() or "tool_calls" in message
        if not said and message["role"] in ("user", "assistant"):
            answer = message["role"] == "assistant"
            name = "empty_completion" if answer else "empty_prompt"
            raise Fault(name, f"nothing is left of what the {message['role']} says")


def _texts(value: dict[str, Any]) -> list[str]:
    if "text" in value:
        return [value["text"]]
    return [message["content"] for message in value["messages"]]


def _whole_characters(text: str) -> str:
    """A text with the replacement character where it has half a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _every_string(value: Any, change: Callable[[str], str]) -> Any:
    """A value with each text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_every_string(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _every_string(item, change) for key, item in value.items()}
    return value


def _known(names: dict[str, int], name: str | None) -> int:
    return -1 if name is None else names.setdefault(name, len(names))


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
