"""Preference data: rows with answers that are not to be learned.

Of pairs (DPO), the row without its rejected answer is one to learn from; of marked answers (KTO),
the rows that are marked as good.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from athanor.prepare.checks import Fault
from athanor.prepare.columns import Columns, fold, is_empty

CHOSEN_TEXT = """
chosen responsechosen answerchosen chosenresponse chosenanswer chosenoutput chosenmessages
accepted acceptedresponse
preferred preferredoutput preferredresponse preferredanswer better betterresponse winning
选择 优选 采纳 好回答
"""
CHOSEN = frozenset(CHOSEN_TEXT.split())
REJECTED_TEXT = """
rejected responserejected answerrejected rejectedresponse rejectedanswer rejectedoutput
rejectedmessages rejectedcompletion
nonpreferred nonpreferredoutput dispreferred dispreferredoutput dispreferredresponse
unpreferred worse worseresponse losing 拒绝 劣选 坏回答
"""
REJECTED = frozenset(REJECTED_TEXT.split())
# An answer's mark, true for a good one.
MARKS = frozenset(["label", "ktotag", "ktolabel", "desirable", "isdesirable", "标签"])
# Several answers to one question: response_a and response_b, answer1 and answer2.
RIVAL = re.compile(r"(?:response|answer|completion|output|conversation|回答|答案|回复)([abjk]|\d)")
RANKED = frozenset(["responses", "completions", "candidates", "generations", "rankedresponses"])


@dataclass(frozen=True)
class Signs:
    """The keys of a record that tell preference data."""

    chosen: str | None
    rejected: tuple[str, ...]
    rivals: tuple[str, ...]
    ranked: tuple[str, ...]
    marks: tuple[str, ...]

    def any(self) -> bool:
        """Return whether there is a key to look at."""
        return bool(self.rejected or len(self.rivals) > 1 or self.ranked or self.marks)


@lru_cache(maxsize=10_000)
def find_signs(keys: tuple[str, ...]) -> Signs:
    """Return the keys that tell preference data."""
    folded = {key: fold(key) for key in keys}
    return Signs(
        next((key for key, name in folded.items() if name in CHOSEN), None),
        tuple(key for key, name in folded.items() if name in REJECTED),
        tuple(key for key, name in folded.items() if RIVAL.fullmatch(name)),
        tuple(key for key, name in folded.items() if name in RANKED),
        tuple(key for key, name in folded.items() if name in MARKS),
    )


def find_preference(value: dict[str, Any]) -> Fault | None:
    """Return the fault of a row that is one of preference data; None for any other row.

    The row is a chat or has a question; a text with a label is none.
    """
    signs = find_signs(tuple(value))
    if not signs.any():
        return None
    rejected = [key for key in signs.rejected if not is_empty(value[key])]
    if rejected:
        good = f"learns {signs.chosen!r}" if signs.chosen else "learns the conversation"
        text = f"{rejected[0]!r} is an answer that is not to be learned"
        return _fault(f"{text}; data.checks.preference=fix {good} and leaves it out")
    for key in signs.marks:
        if value[key] is False or str(value[key]).strip().lower() == "false":
            text = f"{key!r} is false, so the answer is not to be learned"
            return _fault(f"{text}; data.checks.preference=fix learns the rows where it is true")
    several = signs.rivals if len(signs.rivals) > 1 else ()
    several = several or tuple(
        key for key in signs.ranked if isinstance(value[key], list) and len(value[key]) > 1
    )
    if several:
        keys = " and ".join(map(repr, several[:2]))
        return _fault(f"several answers to one question, under {keys}; keep the best as 'answer'")
    return None


def is_mark(key: str, value: Any) -> bool:
    """Return True for the mark of a good answer."""
    return fold(key) in MARKS and (value is True or str(value).strip().lower() == "true")


def without_rejected(value: dict[str, Any], columns: Columns) -> dict[str, Any] | None:
    """Return a row of pairs with its chosen answer alone, under usual names; None for others."""
    signs = find_signs(tuple(value))
    if not signs.rejected:
        return None
    kept = {key: item for key, item in value.items() if key not in signs.rejected}
    if signs.chosen is None or is_empty(value[signs.chosen]):
        return kept
    chosen = kept.pop(signs.chosen)
    keys = columns.parts(kept, ("chat", "question")).keys
    if "question" in keys:
        return kept | {columns.settings["answer"]: chosen}
    messages = kept.get(keys.get("chat", ""))
    if isinstance(messages, list):  # the conversation before the chosen answer
        answer = {"role": "assistant", "content": chosen} if isinstance(chosen, str) else chosen
        return kept | {
            keys["chat"]: [*messages, *(answer if isinstance(answer, list) else [answer])]
        }
    return kept | {columns.settings["text" if isinstance(chosen, str) else "chat"]: chosen}


def _fault(text: str) -> Fault:
    return Fault("preference", text)
