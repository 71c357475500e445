"""Rows of sentence patterns, as people make them for SQL: one value differs and decides them."""

import random
from collections.abc import Callable
from typing import Any

TABLES = {
    "ships": ("name", ("port", "owner"), ("length", "year", "price")),
    "songs": ("title", ("singer", "language"), ("minutes", "year", "plays")),
    "chairs": ("maker", ("wood", "colour"), ("height", "year", "weight")),
    "wines": ("name", ("village", "grape"), ("price", "year", "litres")),
}
VALUES = (
    *("Aarhus", "Basel", "Busan", "Cusco", "Dakar", "Essen", "Fukuoka", "Genoa", "Haifa", "Izmir"),
    *("Jena", "Kobe", "Lyon", "Mumbai", "Nagoya", "Odense", "Parma", "Quebec", "Rouen", "Seville"),
)
PATTERNS = (
    ("How many {table} have the {text} {value}?", "COUNT(*) FROM {table} WHERE {text} = '{value}'"),
    ("Which {table} have a {count} above {limit}?", "{key} FROM {table} WHERE {count} > {limit}"),
    ("Which {table} have a {count} below {limit}?", "{key} FROM {table} WHERE {count} < {limit}"),
    (
        "What is the largest {count} of {table} whose {text} is {value}?",
        "MAX({count}) FROM {table} WHERE {text} = '{value}'",
    ),
    (
        "List the {table} of {text} {value} by {count}.",
        "{key} FROM {table} WHERE {text} = '{value}' ORDER BY {count}",
    ),
)


def rows(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return questions and answers, no two questions alike."""
    chance = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < number:
        table, (key, texts, counts) = chance.choice(list(TABLES.items()))
        facts: dict[str, Any] = {
            "table": table,
            "key": key,
            "text": chance.choice(texts),
            "count": chance.choice(counts),
            "value": chance.choice(VALUES),
            "limit": chance.randrange(10, 990),
        }
        question, answer = chance.choice(PATTERNS)
        made[question.format(**facts)] = "SELECT " + answer.format(**facts)
    return list(made.items())


def change_word(text: str, chance: random.Random) -> str:
    """Replace one word."""
    words = text.split()
    words[chance.randrange(len(words))] = chance.choice(("several", "kindly", "numerous", "total"))
    return " ".join(words)


def change_punctuation(text: str, chance: random.Random) -> str:
    """Put a comma somewhere, and another mark at the end."""
    return text.rstrip("?.").replace(" ", ", ", 1) + chance.choice(("!", "…", " ?", "?!"))


def swap_clauses(text: str, chance: random.Random) -> str:
    """Say the second half first."""
    words = text.rstrip("?.").split()
    half = len(words) // 2
    return " ".join([*words[half:], *words[:half]]) + "?"


def widen(text: str, chance: random.Random) -> str:
    """Write full-width characters."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    change_word,
    change_punctuation,
    swap_clauses,
    widen,
)
