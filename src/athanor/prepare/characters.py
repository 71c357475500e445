"""What rows are written in: which script, and which characters a tokenizer has no token for."""

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Words where words are parted by spaces, single characters where they are not: so a Chinese
# sentence with an English name in it is Chinese.
SCRIPTS = {
    "Han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"),
    "Kana": re.compile("[\u3040-\u30ff]"),
    "Hangul": re.compile("[\uac00-\ud7af]"),
    "Latin": re.compile("[A-Za-z\u00c0-\u024f]+"),
    "Cyrillic": re.compile("[\u0400-\u052f]+"),
    "Greek": re.compile("[\u0370-\u03ff]+"),
    "Arabic": re.compile("[\u0600-\u06ff]+"),
    "Hebrew": re.compile("[\u0590-\u05ff]+"),
    "Thai": re.compile("[\u0e00-\u0e7f]+"),
    "Devanagari": re.compile("[\u0900-\u097f]+"),
}
# Characters that tell a text's script.
ENOUGH = 60
NAMES = ("none", *SCRIPTS)


def script(text: str) -> str:
    """The script that most of a text's beginning is in; `none` where it is in no known one."""
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
    """Characters that a tokenizer spells with several tokens each, most often the bytes of one."""

    def __init__(self, tokenizer: "TokenizerWrapper") -> None:
        self.rows: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self._seen: set[str] = set()
        self._tokenizer = tokenizer

    def spelled(self, text: str) -> set[str]:
        """Which of a text's characters take several tokens, taken by themselves."""
        if text.isascii():
            return set()  # tokenizers that spell have a token for each byte, and so for these
        characters = set(text)
        if new := characters - self._seen:
            self._seen |= new
            self._look_at(sorted(new))
        return characters & self.tokens.keys()

    def _look_at(self, characters: list[str]) -> None:
        backend = self._tokenizer.backend_tokenizer
        # After a letter, because some tokenizers write a space before what stands first.
        alone = len(backend.encode("x", add_special_tokens=False))
        texts = ["x" + character for character in characters]
        for character, encoding in zip(
            characters, backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            if len(encoding) - alone > 1:
                self.tokens[character] = len(encoding) - alone
