"""From a record to a row in the one form: mended, cleaned, and written as a line of JSON."""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from athanor.chat.conversation import Conversation
from athanor.chat.rendering import merge_system_turns
from athanor.config.rules import MERGE
from athanor.config.schema import DataConfig
from athanor.errors import UserError
from athanor.prepare import text_forms
from athanor.prepare.chats import Reading
from athanor.prepare.checks import Fault
from athanor.prepare.cleaning import STEPS, clean
from athanor.prepare.column_advice import describe_first_row
from athanor.prepare.formats import Formats, Row, label_of, without_nulls
from athanor.prepare.origins import Origin
from athanor.prepare.records import Record

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

CLASSES = "classification"
# A template writes the whole conversation for each of its answers.
MOST_TURNS = 1000
# More different labels are texts of another kind.
MOST_LABELS = 100
# The step under which rows are counted whose system message opens a question.
MERGED = "system message put into the question (data.system)"


class RowBuilder:
    """Brings records into the one form, and counts formats and cleaned rows."""

    def __init__(
        self,
        origins: list[Origin],
        config: DataConfig,
        tokenizer: "TokenizerWrapper",
        fixes: frozenset[str],
    ) -> None:
        """Read the label set of a classification; `fixes` names the faults that are mended."""
        self.config = config
        self.formats: list[Counter[str]] = [Counter() for _ in origins]
        self.cleaned: Counter[str] = Counter()
        self._fixes = fixes
        self._formats = Formats(config, label_set(origins, config, fixes))
        self._reading = Reading(self._formats.columns, fixes)
        self._configured = [self._formats.of_file(origin.name) for origin in origins]
        self._first: dict[int, tuple[str, int]] = {}
        self._with_known_columns: set[int] = set()
        self._steps = [step for step in STEPS if config.clean.get(step)]
        self._special = special_tokens(tokenizer)
        self._ends = tuple(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids)))

    def build(self, record: Record, origin: int, faults: list[Fault]) -> Row:
        """Return the row of a record; add faults that leave it a row to `faults`.

        Raises:
            Fault: where it can't be one.
        """
        value = without_nulls(record.value)
        layout = self._formats.layout(value, self._configured[origin])
        self._check_quality(value)
        reading = self._reading
        if not reading.is_empty():  # a new one for each row takes longer than to read most rows
            reading = self._reading = Reading(self._formats.columns, self._fixes)
        try:
            row = self._formats.row(value, layout, reading)
            self._with_known_columns.add(origin)
        except Fault as fault:
            raise self._fault_of_file(fault, record, value, origin) from None
        if not reading.is_empty():
            record.fixed += [
                _preference_of_file(fault, record) if fault.name == "preference" else fault
                for fault in reading.fixed
            ]
            faults += reading.faults
            faults += [_unknown_key(key) for key in reading.unread]
        first, line = self._first.setdefault(origin, (row.format, record.line))
        if row.format != first:
            text = f"{row.format}, but line {line} is {first}; a file must have one format"
            faults.append(Fault("mixed_formats", text))
        if self._steps:
            row.conversation, changed = clean(row.conversation, self._steps)
            for step in self._steps if row.subject is not None else ():
                row.subject = STEPS[step](str(row.subject))
            self.cleaned.update(changed)
            if changed:
                _check_texts_left(row)
        if (count := len(row.conversation.turns)) > MOST_TURNS:
            text = f"{count:,} messages; cut the conversation into parts of at most {MOST_TURNS:,}"
            raise Fault("too_large", text)
        self._check_turns(row.conversation, record)
        self._check_end(row.conversation, faults)
        if self.config.system == MERGE and any(
            turn.role == "system" for turn in row.conversation.turns
        ):
            row.conversation = merge_system_turns(row.conversation)
            self.cleaned[MERGED] += 1
        self.formats[origin][row.format] += 1
        return row

    def encode(self, row: Row, record: Record, faults: list[Fault]) -> str:
        """Return a row as a line of JSON, without special tokens and surrogates if they are fixed.

        Raises:
            Fault: where it can't be written.
        """
        line = self._line(row, record)
        if self._special is None or self._special.search(line) is None:
            return line
        written = line
        if row.conversation.text is not None:
            written = row.conversation.text
            for end in self._ends:  # a text may end with an end token
                written = written.removesuffix(end)
        if (match := self._special.search(written)) is None:
            return line
        fault = Fault("special_token", f"a text contains the model's special token {match[0]}")
        if fault.name not in self._fixes:
            faults.append(fault)
            return line
        row.conversation = row.conversation.map_strings(self._without_tokens)
        if row.subject is not None:
            row.subject = self._without_tokens(row.subject)
        _check_texts_left(row)
        record.fixed.append(fault)
        return self._line(row, record)

    def _fault_of_file(
        self, fault: Fault, record: Record, value: dict[str, Any], origin: int
    ) -> Fault:
        """Return a fault as its file's where all rows of the file are likely to have it."""
        if fault.name == "preference":
            return _preference_of_file(fault, record)
        if fault.name == "missing_key":
            nulls = {key for key, item in record.value.items() if item is None}
            layout = self._formats.layout(record.value, self._configured[origin])
            if layout.kind is not None and (empty := nulls.intersection(layout.keys.values())):
                shown = ", ".join(map(repr, sorted(empty)))
                return Fault(fault.name, f"{fault.text}, and null under {shown}")
        is_template = self._configured[origin] == "template"
        if fault.name != "missing_key" or is_template or origin in self._with_known_columns:
            self._with_known_columns.add(origin)
            return fault
        text = describe_first_row(fault, value, self._formats.columns)
        return Fault("unknown_columns", text, group=record.path, file=record.path)

    def _check_turns(self, conversation: Conversation, record: Record) -> None:
        """Take out system messages without a text, and the turns after the last learned answer."""
        turns = conversation.turns
        empty = [turn for turn in turns if turn.role == "system" and not turn.content.strip()]
        if not empty and (not turns or turns[-1].learned):
            return
        if empty:
            self._mend("empty_system", "a system message without text", record)
            turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
        learned = [place for place, turn in enumerate(turns, 1) if turn.learned]
        if turns and not learned:
            reason = "none of its answers is to be learned: each has the weight 0"
            raise Fault("nothing_to_learn", reason)
        if turns and learned[-1] < len(turns):
            count = len(turns) - learned[-1]
            self._mend("unlearned_end", f"{count} messages after the last learned answer", record)
            turns = turns[: learned[-1]]
        conversation.turns = turns

    def _check_end(self, conversation: Conversation, faults: list[Fault]) -> None:
        """Add a fault where an answer, or a plain text, ends with another model's end token."""
        turns, text = conversation.turns, conversation.text
        end = text_forms.find_end(turns[-1].content if text is None else text)
        if any(fault.name == "mixed_text" for fault in faults):
            return
        if end is not None and (self._special is None or not self._special.fullmatch(end)):
            shown = f"the text ends with {end}, the end token of another model; remove it"
            faults.append(Fault("mixed_text", shown))

    def _mend(self, name: str, text: str, record: Record) -> None:
        """Count a fault as mended; raise it where it is not to be."""
        fault = Fault(name, text)
        if name not in self._fixes:
            raise fault
        record.fixed.append(fault)

    def _line(self, row: Row, record: Record) -> str:
        try:
            return row.conversation.line()
        except UnicodeEncodeError:
            fault = Fault("half_character", "a lone surrogate: half a character, as of a cut emoji")
            if fault.name not in self._fixes:
                raise fault from None
            record.fixed.append(fault)
            row.conversation = row.conversation.map_strings(replace_surrogates)
            row.subject = None if row.subject is None else replace_surrogates(row.subject)
            return row.conversation.line()
        except (TypeError, ValueError) as error:
            raise Fault("wrong_type", f"a value that JSON does not have: {error}") from None

    def _check_quality(self, value: dict[str, Any]) -> None:
        least = self.config.min_quality
        if least is None or (quality := metadata_of(value, "quality_score")) is None:
            return
        try:
            score = float(quality)
        except (TypeError, ValueError, OverflowError):
            text = f"expected a number as quality_score, found {quality!r:.60}"
            raise Fault("wrong_type", text) from None
        if not score >= least:
            raise Fault("low_quality", f"quality_score {score:g} is below {least:g}")

    def _without_tokens(self, text: str) -> str:
        assert self._special is not None
        while (shorter := self._special.sub("", text)) != text:
            text = shorter  # the parts around a token may form another
        return text


def label_set(origins: list[Origin], config: DataConfig, fixes: frozenset[str]) -> list[str]:
    """Return the labels of all rows of a classification, sorted; data.labels, where it is set.

    Raises:
        UserError: where there are too many for labels.
    """
    if config.labels is not None:
        return [str(label) for label in config.labels]
    labels: set[str] = set()
    formats = Formats(config, [])
    for origin in origins:
        configured = formats.of_file(origin.name)
        first = None
        for record in origin.read(fixes):
            try:
                value = without_nulls(record.value)
                layout = formats.layout(value, configured)
                kind = layout.kind
                key = layout.keys.get("label", config.label_feature)
                label = label_of(value, key) if kind == CLASSES else ""
            except Fault:
                continue
            first = first or kind
            if first != CLASSES:
                break  # a file has one format, which its first row tells
            if kind == CLASSES:
                labels.add(label)
            if len(labels) > MOST_LABELS:
                raise UserError(
                    "prepare.too_many_labels",
                    file=origin.name,
                    most=MOST_LABELS,
                    key=key,
                )
    return sorted(labels)


def special_tokens(tokenizer: "TokenizerWrapper") -> re.Pattern[str] | None:
    """Return a pattern of a tokenizer's special tokens and end tokens; None if it has none."""
    added, ends = tokenizer.added_tokens_decoder, tokenizer.eos_token_ids
    special = (str(token) for id, token in added.items() if token.special or id in ends)
    texts = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def metadata_of(value: dict[str, Any], key: str) -> Any:
    """Return a record's value under a key, else the one under that key of its metadata."""
    metadata = value.get("metadata")
    return value.get(key, metadata.get(key) if isinstance(metadata, dict) else None)


def source_of(value: dict[str, Any]) -> str | None:
    """Return the source that a record names; None where it names none."""
    source = metadata_of(value, "source")
    return replace_surrogates(source) if isinstance(source, str) and source else None


def replace_surrogates(text: str) -> str:
    """Return a text with the replacement character instead of lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _preference_of_file(fault: Fault, record: Record) -> Fault:
    group = f"{record.path} {fault.text}"
    return Fault(fault.name, fault.text, group=group, file=record.path)


def _unknown_key(key: str) -> Fault:
    return Fault("unknown_key", f"{key} is not read", group=key)


def _check_texts_left(row: Row) -> None:
    """Raise a Fault where mending left a question or an answer without a text."""
    text = row.conversation.text
    if text is not None and not text.strip():
        raise Fault("empty_text", "cleaning left nothing of the text")
    for turn in row.conversation.turns:
        is_empty = not turn.content.strip() and not turn.calls
        if is_empty and turn.role in ("user", "assistant"):
            check = "empty_completion" if turn.role == "assistant" else "empty_prompt"
            raise Fault(check, f"cleaning left nothing of the {turn.role}'s message")
