"""What can be wrong with rows, under a name each, and what is done about it.

`stop` ends the stage with every fault named, `skip` puts the row into rejected.jsonl and goes on,
`fix` mends it, `warn` says it and keeps the row, `ignore` does not look. conf/data/default.yaml
chooses one for each name.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from athanor.config.data_check import CHECKS, FIX, SKIP, STOP, WARN
from athanor.errors import UserError

# Of each check this many rows are named; rejected.jsonl has every one.
NAMED = 20


class Fault(Exception):
    """One thing that is wrong with one row: a name of CHECKS, and what was found."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        self.text = text


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
