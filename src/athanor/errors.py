"""Errors that a user can fix; messages.toml has their sentences."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error that the user can fix; its text tells how.

    Args:
        code: the name of the message in messages.toml, `<room>.<name>`.
        facts: the values that the message names: numbers, paths, texts, or lists of them.
    """

    def __init__(self, code: str, **facts: Any) -> None:
        self.code, self.facts = code, facts
        super().__init__(message(code, facts))

    def rename(self, old: Path, new: Path) -> None:
        """Replace a path in the text, such as a temporary one by its final one."""
        self.args = (str(self).replace(str(old), str(new)),)


@dataclass(init=False)
class Problem:
    """One of several things that are wrong and are reported together.

    `key` is a key of the configuration or the text of an override; `place` tells where its value
    comes from, as "file:line" or as the text of an override.
    """

    code: str
    key: str
    place: str | None
    facts: dict[str, Any]

    def __init__(self, code: str, key: str, *, place: str | None = None, **facts: Any) -> None:
        self.code, self.key, self.place, self.facts = code, key, place, facts

    def __str__(self) -> str:
        key = (
            shorten(self.key)
            if self.place is None
            else f"{shorten(self.key)} ({shorten(self.place)})"
        )
        return f"{key}: {message(self.code, self.facts)}"


class Shortened(str):
    """A text that is shown as it is, without quotes around it."""

    __repr__ = str.__str__


def shorten(value: Any, limit: int = 200) -> Any:
    """Return a value, or the beginning of its text where that is longer than `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= limit:
        return value
    return Shortened(f"{text[:limit]}… ({len(text):,} characters)")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that is most like `name`, or else all."""
    return get_close_matches(name, known := list(known), n=1, cutoff=0.6) or known


def message(code: str, facts: dict[str, Any]) -> str:
    """Return the sentence of a code with its facts filled in; lists are joined by commas."""
    room, _, name = code.partition(".")
    text = messages().get(room, {}).get(name)
    if text is None:
        return code  # the sentence of an error that comes from another process
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else value
        for key, value in facts.items()
    }
    if "value" in shown:
        shown["value"] = shorten(shown["value"])
    return str(text).strip().format(**shown)


@lru_cache(1)
def messages() -> dict[str, dict[str, str]]:
    """Return the messages by room and name."""
    return tomllib.loads(files("athanor").joinpath("messages.toml").read_text(encoding="utf-8"))


def one_line(error: BaseException) -> str:
    """Return an error's text in a line, with its kind where the text alone says little."""
    text = " ".join(str(error).split())[:400]
    return text if " " in text else f"{type(error).__name__} {text}".strip()
