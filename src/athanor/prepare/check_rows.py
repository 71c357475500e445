"""The first pass over all rows: read, brought into the one form, tokenized, checked and split.

Rows that pass are written to their split; in memory each is a line of numbers. Rows are handled
in chunks, so that the tokenizer reads many at a time, in threads of its own.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
import numpy as np

from athanor import console
from athanor.chat import templates
from athanor.chat.rendering import TemplateUnending, limit_rendering
from athanor.chat.templates import RenderedText
from athanor.chat.tokens import encode_texts, select_trained_texts
from athanor.config.data_check import IGNORE
from athanor.config.schema import Config, DataConfig
from athanor.errors import UserError
from athanor.paths import SPLITS
from athanor.prepare import characters, near_duplicates
from athanor.prepare.check_tokens import TokenChecks
from athanor.prepare.checks import Fault, Findings
from athanor.prepare.cleaning import synonym_changer
from athanor.prepare.form_rows import RowBuilder, source_of
from athanor.prepare.formats import Row
from athanor.prepare.near_duplicates import BESIDE, BETWEEN, TOOLS
from athanor.prepare.origins import Origin
from athanor.prepare.records import Record
from athanor.prepare.tally import COLUMNS, Tally, sized_chunks

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding

# Chunks that wait for the tokenizer while the next is prepared.
CHUNKS_AHEAD = 3
# Names are numbered up to this many; the others share a number.
MOST_NAMES = 1000
# Python's hash as an unsigned number. It differs between processes; a split needs a stable digest.
BITS = 2**64 - 1


@dataclass(slots=True)
class Candidate:
    """A row of the first pass, before its tokens are known.

    `folded` is what the model reads and the answer, folded, with the marks of near_duplicates
    between; `digest` is of that and of the tools, `asked` a hash of what the model reads, 0 where
    nothing is asked.
    """

    record: Record
    number: int
    augmented: bool
    origin: int
    row: Row
    line: str
    faults: list[Fault]
    split: int
    folded: str
    digest: int
    asked: int
    rendered: list[RenderedText] = field(default_factory=list)


class FirstPass:
    """Reads, forms, tokenizes and checks every record."""

    def __init__(
        self,
        origins: list[Origin],
        cfg: Config,
        tokenizer: "TokenizerWrapper",
        end: int,
        findings: Findings,
    ) -> None:
        """Read the label set; `end` is the token that ends answers."""
        self.origins = origins
        self.config = config = cfg.data
        self.tokenizer = tokenizer
        self.findings = findings
        self.mask_prompt = cfg.train.mask_prompt
        self.builder = RowBuilder(origins, config, tokenizer, findings.fixes)
        self.token_checks = TokenChecks(cfg, tokenizer, end)
        self._shares = split_shares(origins, config)
        self._compares = findings.actions["near_leak"] != IGNORE
        self._change = (
            synonym_changer(config.synonyms, config.augment_share) if config.synonyms else None
        )
        self._rejected: set[int] = set()  # numbers of records, for their augmented copies
        self._read = [0] * len(origins)
        self._labels: dict[str, int] = {}
        self._sources: dict[str, int] = {}

    def run(self, folder: Path) -> Tally:
        """Write the rows that pass to `folder`/<split>.spool: the folded text, a tab, the row."""
        rows = [np.empty(0, COLUMNS)]
        with (
            ExitStack() as stack,
            ThreadPoolExecutor(1) as pool,
            console.progress() as bar,
        ):
            files = [
                stack.enter_context((folder / f"{split}.spool").open("w", encoding="utf-8"))
                for split in SPLITS
            ]
            lines = [origin.lines() for origin in self.origins]
            task = bar.add_task("read rows", total=sum(lines))
            # The tokenizer's own threads read some chunks while the next ones are prepared here.
            waiting: deque[tuple[list[Candidate], Future[list[Encoding]]]] = deque()
            for records in sized_chunks(self._records(), lambda item: item[2].size):
                candidates = [
                    candidate for record in records for candidate in self._candidates(*record)
                ]
                with limit_rendering():
                    candidates = self._render(candidates)
                texts = [text for candidate in candidates for text in candidate.rendered]
                waiting.append((candidates, pool.submit(encode_texts, texts, self.tokenizer)))
                if len(waiting) > CHUNKS_AHEAD:
                    rows.append(self._finish(*waiting.popleft(), files))
                _, index, record = records[-1]
                bar.update(task, completed=sum(lines[:index]) + record.line)
            while waiting:
                rows.append(self._finish(*waiting.popleft(), files))
        return Tally(
            np.concatenate(rows),
            self.origins,
            self._read,
            self.builder.formats,
            list(self._labels),
            list(self._sources),
            self.builder.cleaned,
        )

    def _records(self) -> Iterator[tuple[int, int, Record]]:
        """Yield each record with its number and its origin's."""
        numbers = count()
        for index, origin in enumerate(self.origins):
            for record in origin.read(self.findings.fixes):
                self._read[index] += 1
                yield next(numbers), index, record

    def _candidates(self, number: int, origin: int, record: Record) -> Iterator[Candidate]:
        """Yield the row of a record, and its augmented copies; nothing if it is rejected."""
        faults = list(record.faults)
        candidate = None
        try:
            if not faults:
                row = self.builder.build(record, origin, faults)
                candidate = self._candidate(number, origin, record, row, faults)
        except Fault as fault:
            faults.append(fault)
        for mended in record.fixed:
            self.findings.note_fault(mended, record.where)
        if candidate is None:
            self.findings.passes(record.where, faults, record.value, lost=True)
            return
        yield candidate
        if SPLITS[candidate.split] == "train":
            yield from self._augment(candidate)

    def _candidate(
        self, number: int, origin: int, record: Record, row: Row, faults: list[Fault]
    ) -> Candidate:
        line = self.builder.encode(row, record, faults)
        question, tools = row.question(), row.conversation.tools
        exact = msgspec.json.encode(tools).decode() if tools else ""
        read = near_duplicates.fold(question)
        if context := row.conversation.system():
            read = f"{_fold_context(context)}{BESIDE}{read}"
        folded = f"{read}{BETWEEN}{near_duplicates.fold(row.conversation.answer())}"
        digest = near_duplicates.digest(folded + exact)
        if tools:
            folded += f"{TOOLS}{near_duplicates.digest(exact):x}"
        asked = hash((read, exact)) & BITS if question else 0
        split = self.origins[origin].split or near_duplicates.split_of(digest, self._shares)
        place = SPLITS.index(split)
        return Candidate(
            record, number, False, origin, row, line, faults, place, folded, digest, asked
        )

    def _augment(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield copies of a row with synonyms in its question, each different from the others."""
        if self._change is None:
            return
        lines = {candidate.line}
        for number in range(self.config.augment_copies):
            seed = f"{self.config.augment_seed} {number}"
            row = candidate.row.reworded(partial(self._change, seed))
            copy = self._candidate(candidate.number, candidate.origin, candidate.record, row, [])
            if copy.line not in lines:
                lines.add(copy.line)
                copy.augmented, copy.split = True, candidate.split
                yield copy

    def _render(self, candidates: list[Candidate]) -> list[Candidate]:
        """Return the candidates that the chat template accepts, with their texts."""
        written = templates.render_rows(
            [candidate.row.conversation for candidate in candidates], self.tokenizer
        )
        accepted = []
        for candidate, rendered in zip(candidates, written, strict=True):
            if isinstance(rendered, Exception):
                row = candidate.row.conversation
                if isinstance(rendered, TemplateUnending):
                    where = candidate.record.where
                    raise UserError("prepare.template_unending", where=where, reason=rendered)
                advice = templates.suggest_merge(row, self.tokenizer)
                text = f"refused by the chat template: {rendered}{advice}"
                fault = Fault("template_refuses", text)
                self._passes(candidate, [*candidate.faults, fault])
                continue
            candidate.rendered = select_trained_texts(rendered, self.mask_prompt)
            conversation = candidate.row.conversation
            lost = templates.find_dropped_content(conversation, candidate.rendered, self.tokenizer)
            if lost is not None:
                advice = templates.suggest_merge(candidate.row.conversation, self.tokenizer)
                text = f"the chat template leaves out {lost}{advice}"
                candidate.faults.append(Fault("left_out_by_template", text))
            if dropped := templates.find_dropped_thoughts(conversation, candidate.rendered):
                numbers = ", ".join(map(str, dropped))
                text = f"message {numbers}: the answer is learned without its thought"
                candidate.faults.append(Fault("thought_left_out", text))
            accepted.append(candidate)
        return accepted

    def _finish(
        self,
        candidates: list[Candidate],
        encoded: "Future[list[Encoding]]",
        files: Sequence[IO[str]],
    ) -> np.ndarray:
        """Check tokens, write the rows that pass, and return their numbers."""
        rows = []
        lines: list[list[str]] = [[] for _ in files]
        encodings = iter(encoded.result())
        for candidate in candidates:
            row, rendered, faults = candidate.row, candidate.rendered, candidate.faults
            lengths = self.token_checks.check(
                row.conversation, rendered, list(islice(encodings, len(rendered))), faults
            )
            self.token_checks.check_spelling("\n".join(row.conversation.texts()), faults)
            if not self._passes(candidate, faults):
                continue
            folded = candidate.folded if self._compares else ""
            lines[candidate.split].append(f"{folded}\t{candidate.line}\n")
            rows.append(
                (
                    candidate.number,
                    candidate.augmented,
                    candidate.origin,
                    candidate.record.line,
                    candidate.split,
                    *lengths,
                    characters.NAMES.index(
                        characters.script(row.question() + row.conversation.answer())
                    ),
                    _number_of(row.conversation.label, self._labels),
                    _number_of(source_of(candidate.record.value), self._sources),
                    hash(candidate.line) & BITS,
                    candidate.digest,
                    candidate.asked,
                )
            )
        for file, of_split in zip(files, lines, strict=True):
            file.write("".join(of_split))
        return np.array(rows, COLUMNS)

    def _passes(self, candidate: Candidate, faults: list[Fault]) -> bool:
        record, number = candidate.record, candidate.number
        if candidate.augmented:  # rejected with its row; faults of its own are not reported
            rejecting = self.findings.rejecting
            return number not in self._rejected and rejecting.isdisjoint(f.name for f in faults)
        passes = not faults or self.findings.passes(record.where, faults, record.value)
        if not passes and self._change is not None:
            self._rejected.add(number)
        return passes


# Most rows have the system message or the tools of others.
_fold_context = lru_cache(maxsize=256)(near_duplicates.fold)


def split_shares(origins: list[Origin], config: DataConfig) -> dict[str, float]:
    """Return the share of each split in the rows without one; 0 for splits with a file."""
    named = {origin.split for origin in origins}
    valid = 0.0 if "valid" in named else config.valid_size
    test = 0.0 if "test" in named else config.test_size
    return {"valid": valid, "test": test, "train": 1 - valid - test}


def _number_of(name: str | None, names: dict[str, int]) -> int:
    """Return the number of a name, a new one for a new name; -1 for None."""
    if name is None:
        return -1
    if len(names) > MOST_NAMES:
        return names.get(name, names.setdefault("(others)", len(names)))
    return names.setdefault(name, len(names))
