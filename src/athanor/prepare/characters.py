"""Characters of rows: their script, and those that a tokenizer has no token for."""

from collections import Counter
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Scripts with spaces are counted by words, the others by characters: a Chinese sentence with an
# English name in it is Chinese.
SCRIPTS = {
    "Han": regex.compile(r"\p{Han}"),
    "Kana": regex.compile(r"[\p{Hiragana}\p{Katakana}]"),
    "Hangul": regex.compile(r"\p{Hangul}"),
} | {
    name: regex.compile(rf"\p{{{name}}}+")
    for name in ("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Thai", "Devanagari")
}
# The first characters of a text tell its script.
ENOUGH = 60
NAMES = ("none", *SCRIPTS)


def script(text: str) -> str:
    """Return the script of most of a text's beginning; `none` for a script without a name here."""
    text = text[:ENOUGH]
    if text.isascii():
        return "Latin" if SCRIPTS["Latin"].search(text) else "none"
    if 2 * len(SCRIPTS["Han"].findall(text)) > len(text) and not SCRIPTS["Kana"].search(text):
        return "Han"
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    if counts["Kana"] * 5 > counts["Han"]:
        counts["Kana"] += counts["Han"]  # Japanese
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "none"


class Spelling:
    """Characters that a tokenizer spells with several tokens each, usually one a byte."""

    def __init__(self, tokenizer: "TokenizerWrapper") -> None:
        self.rows: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self._seen: set[str] = set()
        self._tokenizer = tokenizer

    def spelled(self, text: str) -> set[str]:
        """Return the characters of a text that take several tokens each by themselves."""
        if text.isascii():
            return set()  # tokenizers that spell have a token for each byte
        characters = set(text)
        if new := characters - self._seen:
            self._seen |= new
            self._measure(sorted(new))
        return characters & self.tokens.keys()

    def _measure(self, characters: list[str]) -> None:
        backend = self._tokenizer.backend_tokenizer
        # Behind a letter, because some tokenizers put a space before the first character.
        alone = len(backend.encode("x", add_special_tokens=False))
        texts = ["x" + character for character in characters]
        for character, encoding in zip(
            characters, backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            if len(encoding) - alone > 1:
                self.tokens[character] = len(encoding) - alone
