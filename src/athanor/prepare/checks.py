"""Faults of rows, and the findings of a run: faults counted, named, and acted upon."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import IO, Any

from athanor import console
from athanor.config.data_check import CHECKS, FIX, IGNORE, SKIP, STOP, WARN
from athanor.errors import UserError

# Rows that are named for each check; rejected.jsonl has all of them.
NAMED = 20
# Groups of faults that are counted each by itself.
MOST_GROUPS = 10_000
# Checks that would skip a whole file, which is never advised.
OF_FILES = ("unknown_columns",)


class Fault(Exception):
    """A fault of a row: the name of its check in CHECKS, and the facts in a sentence.

    Faults with the same `group` are one problem, which is reported once with the number of its
    rows.

    Args:
        pair: the texts of the row and of the one that it is compared with.
        group: what the fault shares with those of other rows; "" for a fault of its own.
        file: the place of a fault that is its file's and not its row's.
    """

    def __init__(
        self,
        name: str,
        text: str,
        pair: list[str] | None = None,
        *,
        group: str = "",
        file: str = "",
    ) -> None:
        super().__init__(text)
        self.name = name
        self.text = text
        self.pair = pair
        self.group = group
        self.file = file


class Findings:
    """The faults of a run, counted; rows that are left out are written to `rejected`."""

    def __init__(self, actions: dict[str, str], rejected: IO[str]) -> None:
        self.actions = actions
        self.fixes = frozenset(name for name, action in actions.items() if action == FIX)
        self.rejecting = frozenset(n for n, action in actions.items() if action in (STOP, SKIP))
        self.counts: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.rejected = 0
        self._examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._groups: Counter[tuple[str, str]] = Counter()
        self._file = rejected

    def note(self, name: str, where: str, text: str) -> None:
        """Count a fault that is not a single row's."""
        self.note_fault(Fault(name, text), where)

    def note_fault(self, fault: Fault, where: str) -> None:
        """Count a fault of the row at `where`, or of its file."""
        name, group = fault.name, (fault.name, fault.group)
        self.counts[name] += 1
        if fault.group and (group in self._groups or len(self._groups) < MOST_GROUPS):
            self._groups[group] += 1
            if self._groups[group] > 1:
                return
        self.problems[name] += 1
        if len(self._examples[name]) < NAMED:
            shown = fault.text.encode(errors="backslashreplace").decode()
            example = {"where": fault.file or where, "text": shown, "group": fault.group}
            self._examples[name].append(example | ({"pair": fault.pair} if fault.pair else {}))

    def examples(self, name: str) -> list[dict[str, Any]]:
        """Return the place and the text of a check's first faults, those of a group as one."""
        shown = []
        for example in self._examples[name]:
            group = example["group"]
            count = self._groups[name, group] or 1
            rows = f" ({console.counted(count, 'row')})" if group else ""
            rest = {key: value for key, value in example.items() if key != "group"}
            shown.append(rest | {"text": example["text"] + rows})
        return shown

    def passes(self, where: str, faults: list[Fault], row: Any, *, lost: bool = False) -> bool:
        """Count a row's faults; return False, and write the row to rejected.jsonl, if it is out.

        A row that is `lost` could not be mended: faults that would be fixed put it out as well.
        """
        faults = [fault for fault in faults if self.actions[fault.name] != IGNORE]
        for fault in faults:
            self.note_fault(fault, where)
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
            shown = self.examples(name)
            lines += [f"{example['where']}: {name}: {example['text']}" for example in shown]
            if more := self.problems[name] - len(shown):
                lines.append(f"… and {more:,} more of {name}")
        problems = console.counted(sum(self.problems[name] for name in checks), "problem")
        listing = "\n  ".join(lines)
        of_rows = [n for n in checks if SKIP in CHECKS[n][1].split() and n not in OF_FILES]
        skips = " ".join(f"data.checks.{name}=skip" for name in of_rows)
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
