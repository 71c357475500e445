"""Cleaning of texts, and synonyms for augmentation: both off unless conf/data turns them on."""

import html
import random
import re
from collections.abc import Callable

from athanor.chat.conversation import Conversation
from athanor.errors import UserError

# Letters, digits, the space and signs of arithmetic; Chinese punctuation is full-width by right.
FULL_WIDTH = {0x3000: " "} | {
    code: chr(code - 0xFEE0)
    for code in range(0xFF01, 0xFF5F)
    if chr(code - 0xFEE0).isalnum() or chr(code - 0xFEE0) in "+-=<>%&@#*/$"
}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\u00ad]")
TAGS = (
    "a abbr article aside b big blockquote body br button center cite code col colgroup dd del div "
    "dl dt em figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe "
    "img input ins kbd label li link main mark meta nav ol option p pre q s samp section select "
    "small span strong style sub sup table tbody td textarea tfoot th thead title tr tt u ul var"
)
UNSEEN = re.compile(r"<(script|style)\b[^>]*>.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|/h[1-6])\b[^<>]*>\n?", re.IGNORECASE)
TAG = re.compile(rf"</?(?:{'|'.join(TAGS.split())})(?:\s[^<>]*)?/?>", re.IGNORECASE)


def _whitespace(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.replace("\r\n", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _html(text: str) -> str:
    if "<" in text:
        text = TAG.sub("", BREAK.sub("\n", UNSEEN.sub("", text)))
    return html.unescape(text) if "&" in text else text


# In this order: later steps work on what earlier ones leave.
STEPS: dict[str, Callable[[str], str]] = {
    "html": _html,
    "control": lambda text: CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")),
    "full_width": lambda text: text.translate(FULL_WIDTH),
    "whitespace": _whitespace,
}


def clean(row: Conversation, steps: list[str]) -> tuple[Conversation, list[str]]:
    """Return a row after the chosen steps, and the steps that changed it."""
    changed = []
    for step in steps:
        after = row.map_texts(STEPS[step])
        if after != row:
            changed.append(step)
        row = after
    return row, changed


def synonym_changer(synonyms: dict[str, list[str]], share: float) -> Callable[[str, str], str]:
    """Return a function of a seed and a text that replaces some of its words by synonyms.

    Each word in `synonyms` is replaced with the probability `share`; the seed and the text alone
    decide which words, and by which synonyms.

    Raises:
        UserError: where the library that segments Chinese words is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise UserError("prepare.jieba_missing") from error
    jieba.setLogLevel("WARNING")
    cutter = jieba.Tokenizer()
    for word in synonyms:
        cutter.add_word(word)

    def replace(seed: str, text: str) -> str:
        chance = random.Random(f"{seed} {text}")
        return "".join(
            chance.choice(synonyms[word]) if word in synonyms and chance.random() < share else word
            for word in cutter.lcut(text)
        )

    return replace
