"""Faults of rows, and the findings of a run: faults counted, named, and acted upon."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import IO, Any

from athanor import console
from athanor.config.data_check import CHECKS, FIX, SKIP, STOP, WARN
from athanor.errors import UserError

# Rows that are named for each check; rejected.jsonl has all of them.
NAMED = 20


class Fault(Exception):
    """A fault of a row: the name of its check in CHECKS, and the facts in a sentence.

    `pair` holds the texts of the row and of the one that it is compared with.
    """

    def __init__(self, name: str, text: str, pair: list[str] | None = None) -> None:
        super().__init__(text)
        self.name = name
        self.text = text
        self.pair = pair


class Findings:
    """The faults of a run, counted; rows that are left out are written to `rejected`."""

    def __init__(self, actions: dict[str, str], rejected: IO[str]) -> None:
        self.actions = actions
        self.fixes = frozenset(name for name, action in actions.items() if action == FIX)
        self.rejecting = frozenset(n for n, action in actions.items() if action in (STOP, SKIP))
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.rejected = 0
        self._file = rejected

    def note(self, name: str, where: str, text: str, pair: list[str] | None = None) -> None:
        """Count a fault; on its own, one that is mended, or not a single row's."""
        self.counts[name] += 1
        if len(self.examples[name]) < NAMED:
            shown = text.encode(errors="backslashreplace").decode()
            example = {"where": where, "text": shown} | ({"pair": pair} if pair else {})
            self.examples[name].append(example)

    def passes(self, where: str, faults: list[Fault], row: Any, *, lost: bool = False) -> bool:
        """Count a row's faults; return False, and write the row to rejected.jsonl, if it is out.

        A row that is `lost` could not be mended: faults that would be fixed put it out as well.
        """
        for fault in faults:
            self.note(fault.name, where, fault.text, fault.pair)
        keeping = (WARN,) if lost else (WARN, FIX)
        against = [fault for fault in faults if self.actions[fault.name] not in keeping]
        if against:
            self.rejected += 1
            reasons = [{"check": fault.name, "text": fault.text} for fault in against]
            line = {"where": where, "reasons": reasons, "row": row}
            self._file.write(as_line(line))
        return not against

    def stop(self, where: Path) -> None:
        """End the stage if a fault with the action `stop` was counted.

        Raises:
            UserError: with the first rows of each such check; `where` is the file with all of them.
        """
        checks = [name for name in self.counts if self.actions[name] == STOP]
        if not checks:
            return
        lines = []
        for name in checks:
            shown = self.examples[name]
            lines += [f"{example['where']}: {name}: {example['text']}" for example in shown]
            if more := self.counts[name] - len(shown):
                lines.append(f"… and {more:,} more of {name}")
        problems = console.counted(sum(self.counts[name] for name in checks), "problem")
        listing = "\n  ".join(lines)
        skips = " ".join(f"data.checks.{n}=skip" for n in checks if SKIP in CHECKS[n][1].split())
        if not skips:
            raise UserError("prepare.faults", problems=problems, checks=checks, listing=listing)
        raise UserError(
            "prepare.faults_of_rows",
            problems=problems,
            checks=checks,
            listing=listing,
            rejected=where,
            overrides=skips,
        )


def as_line(value: Any) -> str:
    """Return any value as a line of JSON, so that no rejected row is lost."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, default=str)  # a lone surrogate, as \\ud83d
    return text + "\n"
