"""The first pass over all rows: read, brought into the one form, tokenized, checked, shared out.

What goes on is written to its split, and stays in memory as a line of numbers. Rows are looked at
in chunks, so that the tokenizer reads many at a time, in threads of its own.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from athanor import console
from athanor.chat import templates
from athanor.chat.templates import RenderedText
from athanor.chat.tokens import appends_end_token, encode_texts, select_trained_texts, supervise
from athanor.compute.arrays import TokenizedText
from athanor.config.data_check import IGNORE
from athanor.config.schema import DataConfig
from athanor.errors import UserError
from athanor.paths import SPLITS
from athanor.prepare import characters, near_duplicates
from athanor.prepare.checks import Fault, Findings
from athanor.prepare.cleaning import STEPS, clean, other_words
from athanor.prepare.formats import Formats, Row, label_of, without_end, without_nulls
from athanor.prepare.read_rows import Origin, Record
from athanor.prepare.tally import CHUNK, COLUMNS, Tally, chunks

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding

# Chunks that the tokenizer has while the next is prepared for it.
CHUNKS_AHEAD = 3
# More kinds than that are texts, not labels.
MOST_LABELS = 100
# So many sources are told apart; of more, the first.
MOST_NAMES = 1000
CLASSES = "classification"
# Between a folded question and a folded answer: nothing that folding leaves.
BETWEEN = "\x1f"
# Rows are the same where these bits of their hash are; only a split needs one that stays the same.
BITS = 2**64 - 1


@dataclass(slots=True)
class Candidate:
    """A row in the first pass, with all that is known of it before it is tokens."""

    record: Record
    number: int
    made: bool
    origin: int
    row: Row
    line: str
    said: str
    script: int
    faults: list[Fault]
    split: int
    folded: str
    folded_digest: int
    question: str
    rendered: list[RenderedText] = field(default_factory=list)


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
        end: int,
    ) -> None:
        self.origins = origins
        self.config = config
        self.tokenizer = tokenizer
        self.findings = findings
        self.max_seq_length = max_seq_length
        self.mask_prompt = mask_prompt
        self.end = end
        self.formats = Formats(config, label_set(origins, config, findings.fixes))
        self.spelling = characters.Spelling(tokenizer)
        self._said = [self.formats.of(origin.name) for origin in origins]
        self._steps = [step for step in STEPS if config.clean.get(step)]
        self._special = special_tokens(tokenizer)
        self._ends = tuple(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)))
        self._shares = shares(origins, config)
        self._compares = findings.actions["near_leak"] != IGNORE
        self._closes = appends_end_token(tokenizer)
        self._say = other_words(config.synonyms, config.augment_share) if config.synonyms else None
        self._out: set[int] = set()  # records whose copies in other words are out with them
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
            for records in chunks(self._records(lambda lines: bar.advance(task, lines))):
                candidates = self._rendered(
                    [made for item in records for made in self._candidates(*item)]
                )
                texts = [text for candidate in candidates for text in candidate.rendered]
                waiting.append((candidates, pool.submit(encode_texts, texts, self.tokenizer)))
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
        written = templates.render_rows([made.row.value for made in candidates], self.tokenizer)
        taken = []
        for candidate, rendered in zip(candidates, written, strict=True):
            if isinstance(rendered, Exception):
                fault = Fault("template_refuses", f"the chat template refuses it: {rendered}")
                self._passes(candidate, [*candidate.faults, fault])
                continue
            candidate.rendered = select_trained_texts(rendered, self.mask_prompt)
            lost = templates.find_dropped_content(
                candidate.row.value, candidate.rendered, self.tokenizer
            )
            if lost is not None:
                text = f"the chat template leaves out {lost}"
                candidate.faults.append(Fault("left_out_by_template", text))
            taken.append(candidate)
        return taken

    def _passes(self, candidate: Candidate, faults: list[Fault]) -> bool:
        record, number = candidate.record, candidate.number
        if candidate.made:  # goes where its row goes, and its faults are nobody's
            rejecting = self.findings.rejecting
            return number not in self._out and rejecting.isdisjoint(f.name for f in faults)
        passes = not faults or self.findings.passes(record.where, faults, record.value)
        if not passes and self._say is not None:
            self._out.add(number)
        return passes

    def _candidate(
        self, number: int, origin: int, record: Record, faults: list[Fault]
    ) -> Candidate:
        value = without_nulls(record.value)
        kind = self.formats.kind(value, self._said[origin])
        self._check_quality(value)
        row = self._row(value, kind, record)
        first, line = self._first.setdefault(origin, (kind, record.line))
        if kind != first:
            text = f"{kind}, and line {line} is {first}: expected one format in a file"
            faults.append(Fault("mixed_formats", text))
        if self._steps:
            row.value, changed = clean(row.value, self._steps)
            if row.subject is not None:
                row.subject = clean({"text": row.subject}, self._steps)[0]["text"]
            self._tally.cleaned.update(changed)
            if changed:
                _check_what_is_left(row)
        self._tally.formats[origin][row.format] += 1
        return self._placed(number, origin, record, row, faults)

    def _row(self, value: dict[str, Any], kind: str, record: Record) -> Row:
        try:
            return self.formats.row(value, kind)
        except Fault as fault:
            if fault.name not in self.findings.fixes or fault.name != "no_answer":
                raise
            row = self.formats.row(without_end(value, kind, self.config), kind)
            record.fixed.append(fault)
            return row

    def _placed(
        self, number: int, origin: int, record: Record, row: Row, faults: list[Fault]
    ) -> Candidate:
        """What is known of a row whose text is settled."""
        line = self._line(row, record)
        if self._special is not None and self._special.search(line) is not None:
            line = self._without_special(row, line, faults, record)
        asked, answered = row.question(), row.answer()
        question = near_duplicates.fold(asked)
        folded = f"{question}{BETWEEN}{near_duplicates.fold(answered)}"
        digest = near_duplicates.digest(folded)
        split = self.origins[origin].split or near_duplicates.split_of(digest, self._shares)
        return Candidate(
            record,
            number,
            False,
            origin,
            row,
            line,
            "\n".join(_texts(row.value)),
            characters.NAMES.index(characters.script(asked + answered)),
            faults,
            SPLITS.index(split),
            folded,
            digest,
            question,
        )

    def _line(self, row: Row, record: Record) -> str:
        try:
            return msgspec.json.encode(row.value).decode()
        except UnicodeEncodeError:
            fault = Fault(
                "half_character", "half a character (a lone surrogate, as of a cut emoji)"
            )
            if fault.name not in self.findings.fixes:
                raise fault from None
            record.fixed.append(fault)
            row.value = _every_string(row.value, _whole_characters)
            row.subject = None if row.subject is None else _whole_characters(row.subject)
            return msgspec.json.encode(row.value).decode()
        except (TypeError, ValueError) as error:
            raise Fault("wrong_type", f"a value that JSON does not have: {error}") from None

    def _check_quality(self, value: dict[str, Any]) -> None:
        least = self.config.min_quality
        given = None if least is None else said_of(value, "quality_score")
        if least is None or given is None:
            return
        try:
            score = float(given)
        except (TypeError, ValueError, OverflowError):
            text = f"expected a number as quality_score, found {given!r:.60}"
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
        if self._say is None:
            return
        config = self.config
        lines = {candidate.line}
        for copy in range(config.augment_copies):
            seed = f"{config.augment_seed} {copy}"
            row = candidate.row.asked_otherwise(partial(self._say, seed))
            made = self._placed(candidate.number, candidate.origin, candidate.record, row, [])
            if made.line not in lines:
                lines.add(made.line)
                made.made, made.split = True, candidate.split
                yield made

    def _finished(
        self,
        candidates: list[Candidate],
        encoded: "Future[list[Encoding]]",
        files: Sequence[IO[str]],
    ) -> np.ndarray:
        rows = []
        lines: list[list[str]] = [[] for _ in files]
        encodings = iter(encoded.result())
        for candidate in candidates:
            numbers = self._tokens(candidate, list(islice(encodings, len(candidate.rendered))))
            if not self._passes(candidate, candidate.faults):
                continue
            folded = candidate.folded if self._compares else ""
            lines[candidate.split].append(f"{folded}\t{candidate.line}\n")
            value = candidate.record.value
            rows.append(
                (
                    candidate.number,
                    candidate.made,
                    candidate.origin,
                    candidate.record.line,
                    candidate.split,
                    *numbers,
                    candidate.script,
                    _known(self._labels, candidate.row.value.get("label")),
                    _known(self._sources, source_of(value)),
                    hash(candidate.line) & BITS,
                    candidate.folded_digest,
                    hash(candidate.question) & BITS if candidate.question else 0,
                )
            )
        for file, found in zip(files, lines, strict=True):
            file.write("".join(found))
        return np.array(rows, COLUMNS)

    def _tokens(
        self, candidate: Candidate, encodings: list["Encoding"]
    ) -> tuple[int, int, int, bool]:
        """Tokens of the longest text, supervised ones, tokens cut, whether an answer's end is.

        Adds what is wrong in them.
        """
        faults, limit = candidate.faults, self.max_seq_length
        whole = candidate.rendered[-1]
        if whole.answer_starts is None:  # as tokens.supervise has it, without a list for each text
            closed = self._closes or whole.text.endswith(self._ends)
            length = len(encodings[-1]) + (not closed)
            kept, end_cut = max(min(length, limit) - 1, 0), False
        else:
            texts = [
                supervise(text, encoding, self.tokenizer, self.mask_prompt, self.end)
                for text, encoding in zip(candidate.rendered, encodings, strict=True)
            ]
            length = max(map(len, texts))
            spans = [span for text in texts for span in text.answer_spans]
            # The first token of a text is never predicted.
            counted = (behind - max(first, 1) for first, behind in spans if behind <= limit)
            kept = sum(counted) if self.mask_prompt else min(length, limit) - 1
            end_cut = any(behind > limit for _, behind in spans)
            self._check_turns(candidate, texts)
        cut = max(length - limit, 0)
        if not kept:
            faults.append(
                Fault(
                    "nothing_to_learn",
                    f"no answer is whole in its first {limit} tokens; it has {length}"
                    if cut
                    else "none of its tokens is to be learned",
                )
            )
        elif end_cut:
            faults.append(
                Fault("end_cut", f"{cut} of {length} tokens are cut, with the end of an answer")
            )
        elif cut:
            faults.append(Fault("too_long", f"{cut} of {length} tokens are cut"))
        said = candidate.said
        if spelled := self.spelling.spelled(said):
            self.spelling.rows.update(spelled)
            share = sum(map(said.count, spelled)) / len(said)
            if share > self.config.spelled_share:
                shown = "".join(sorted(spelled)[:10])
                text = f"{share:.0%} of its characters take several tokens each: {shown}"
                faults.append(Fault("spelled_characters", text))
        return length, kept, cut, end_cut

    def _check_turns(self, candidate: Candidate, texts: list[TokenizedText]) -> None:
        if self.mask_prompt:
            messages = candidate.row.value["messages"]
            there = sum(message["role"] == "assistant" for message in messages)
            if missed := there - sum(len(text.answer_spans) for text in texts):
                said = f"{missed} answers are not learned: the chat template writes them otherwise"
                candidate.faults.append(Fault("answer_not_found", said))
        if not all(text.prompts_match for text in texts):
            said = "the template asks in another way than it writes the finished conversation"
            candidate.faults.append(Fault("asked_otherwise", said))


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
                value = without_nulls(record.value)
                kind = formats.kind(value, said)
                label = label_of(value, config.label_feature) if kind == CLASSES else ""
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
    """Finds any of a tokenizer's special tokens in a text, and whatever else ends an answer."""
    added, ends = tokenizer.added_tokens_decoder, tokenizer.eos_token_ids
    special = (str(token) for id, token in added.items() if token.special or id in ends)
    texts = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def said_of(value: Any, key: str) -> Any:
    """What a record says of itself under a key, or under that key of its metadata."""
    if not isinstance(value, dict):
        return None
    metadata = value.get("metadata")
    return value.get(key, metadata.get(key) if isinstance(metadata, dict) else None)


def source_of(value: Any) -> str | None:
    """Where a record says that it is from."""
    source = said_of(value, "source")
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
    if name is None:
        return -1
    if len(names) > MOST_NAMES:
        return names.get(name, names.setdefault("(others)", len(names)))
    return names.setdefault(name, len(names))
