"""What can be wrong with rows, under a name each, and what is done about it.

`stop` ends the stage with every fault named, `skip` puts the row into rejected.jsonl and goes on,
`fix` mends it, `warn` says it and keeps the row, `ignore` does not look. conf/data/default.yaml
chooses one for each name.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from athanor.console import UserError

STOP, SKIP, FIX, WARN, IGNORE = "stop", "skip", "fix", "warn", "ignore"

# Of each check this many rows are named; rejected.jsonl has every one.
NAMED = 20

# What each check means, and which actions it may have.
CHECKS: dict[str, tuple[str, str]] = {
    "unknown_file": ("a file of a kind that is not read", "stop warn"),
    "shared_out": ("a file without a split's name beside files that have one", "stop warn"),
    "unreadable_file": ("a file that is not what its name says", "stop warn"),
    "byte_order_mark": ("a byte order mark at the start of a file", "stop fix"),
    "invalid_utf8": ("bytes that are no UTF-8", "stop skip"),
    "invalid_json": ("not JSON", "stop skip"),
    "several_objects": ("several JSON objects on a line", "stop skip fix"),
    "split_object": ("one JSON object over several lines", "stop skip fix"),
    "duplicate_key": ("the same key twice in a JSON object", "stop skip"),
    "not_a_number": ("NaN or an infinite number, which JSON does not have", "stop skip"),
    "half_character": ("half a character (a lone surrogate, as of a cut emoji)", "stop skip fix"),
    "wrong_columns": ("a CSV line that does not fit the header", "stop skip"),
    "not_an_object": ("JSON, but no object", "stop skip"),
    "image": ("a row with images, which language models do not read", "stop skip"),
    "missing_key": ("a row without the keys of any format, or of its file's", "stop skip"),
    "wrong_type": ("a value of another type than its key needs", "stop skip"),
    "empty_prompt": ("a question without a text", "stop skip"),
    "empty_completion": ("an answer without a text", "stop skip"),
    "empty_text": ("a text without a character", "stop skip"),
    "mixed_formats": ("a row of another format than its file's first", "stop skip warn"),
    "unknown_role": ("a message of nobody known", "stop skip"),
    "no_question": ("an answer that nothing comes before", "stop skip"),
    "no_answer": ("a conversation that does not end with an answer", "stop skip fix"),
    "malformed_tool_call": ("a tool, or a call of one, that can't be read", "stop skip"),
    "unknown_label": ("a label that data.labels does not have", "stop skip"),
    "special_token": ("a special token of the model inside a text", "stop skip fix warn"),
    "template_refuses": ("a row that the model's chat template refuses", "stop skip"),
    "left_out_by_template": ("what the chat template leaves out", "stop skip warn"),
    "low_quality": ("a quality_score below data.min_quality", "stop skip"),
    "nothing_to_learn": ("no supervised token within train.max_seq_length", "stop skip"),
    "too_long": ("longer than train.max_seq_length: cut", "stop skip warn"),
    "end_cut": ("cut before an answer's end: that answer is not learned", "stop skip warn"),
    "answer_not_found": ("an answer that the template writes otherwise", "stop skip warn"),
    "asked_otherwise": ("asked in other tokens than it is trained on", "stop skip warn"),
    "spelled_characters": ("many characters that take several tokens each", "stop skip warn"),
    "other_script": ("in another script than almost all other rows", "stop skip warn"),
    "duplicate": ("the same row twice in a split", "stop skip warn"),
    "leak": ("a row that a held-out split has, too", "stop skip warn"),
    "near_leak": ("almost a row that a held-out split has", "stop skip warn ignore"),
    "question_leak": ("a question that a held-out split asks, too", "stop skip warn"),
    "imbalance": ("almost all rows have one label, or one source", "stop warn"),
    "too_few_rows": ("a split without rows", "stop"),
}


class Fault(Exception):
    """One thing that is wrong with one row: a name of CHECKS, and what was found."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        self.text = text


def misfits(actions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, what was expected) for what data.checks can't say."""
    for name, action in actions.items():
        if name not in CHECKS:
            yield name, "no such check; there are " + ", ".join(CHECKS)
        elif action not in CHECKS[name][1].split():
            yield name, f"expected one of {CHECKS[name][1].replace(' ', ', ')}, found {action!r}"
    for name in CHECKS:
        if name not in actions:
            yield name, "missing; conf/ gives it no action"


@dataclass(frozen=True)
class Example:
    """A row that a check found."""

    where: str
    text: str


class Findings:
    """What the checks found, counted; rows that must not go on are written to `rejected`."""

    def __init__(self, actions: dict[str, str], rejected: IO[str]) -> None:
        self.actions = actions
        self.fixes = frozenset(name for name, action in actions.items() if action == FIX)
        self.rejecting = frozenset(n for n, action in actions.items() if action in (STOP, SKIP))
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[Example]] = defaultdict(list)
        self.rejected = 0
        self._file = rejected

    def note(self, name: str, where: str, text: str) -> None:
        """Counts a fault that concerns no row of its own."""
        self.counts[name] += 1
        if len(self.examples[name]) < NAMED:
            shown = text.encode(errors="backslashreplace").decode()
            self.examples[name].append(Example(where, shown))

    def passes(self, where: str, faults: list[Fault], row: Any, *, lost: bool = False) -> bool:
        """Counts a row's faults; False where it may not go on, and then it was written down.

        A row that is `lost` may not, although its faults are fixed: there was no mending it.
        """
        for fault in faults:
            self.note(fault.name, where, fault.text)
        keeping = (WARN,) if lost else (WARN, FIX)
        against = [fault for fault in faults if self.actions[fault.name] not in keeping]
        if against:
            self.rejected += 1
            reasons = [{"check": fault.name, "text": fault.text} for fault in against]
            line = {"where": where, "reasons": reasons, "row": row}
            self._file.write(as_line(line))
        return not against

    def stop(self, where: Path) -> None:
        """Ends the stage if anything was found that stops it.

        Raises:
            UserError: with the first of what every check found, and where all of it is.
        """
        found = [name for name in self.counts if self.actions[name] == STOP]
        if not found:
            return
        lines = []
        for name in found:
            shown = self.examples[name]
            lines += [f"{example.where}: {name}: {example.text}" for example in shown]
            if more := self.counts[name] - len(shown):
                lines.append(f"… and {more:,} more of {name}")
        count = sum(self.counts[name] for name in found)
        problems = "1 problem" if count == 1 else f"{count:,} problems"
        skippable = [name for name in found if SKIP in CHECKS[name][1].split()]
        hint = (
            f"\nthe rows are whole in {where}; to go on without such rows: "
            + " ".join(f"data.checks.{name}=skip" for name in skippable)
            if skippable
            else ""
        )
        raise UserError(f"data: {problems}; nothing was prepared\n  " + "\n  ".join(lines) + hint)


def as_line(value: Any) -> str:
    """A value as a line of JSON, whatever it holds: nothing that was rejected is lost."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, default=str)  # a lone surrogate, as \\ud83d
    return text + "\n"
