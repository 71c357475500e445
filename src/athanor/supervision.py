"""From rows to tokens: which tokens a model reads, and which of them it has to learn to say.

A token is supervised when it belongs to an assistant's turn, up to and including the token that
ends it. What the template writes after that token (a line break, mostly) is read, never learned.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from athanor.chat import Message, Rendered, answer_text, render, text_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding

# Rows that the tokenizer is given at a time: enough for every core, little in memory.
BATCH = 1000


@dataclass(frozen=True)
class Tokens:
    """One row: `ids[i]` is a token, `supervised[i]` whether the loss asks for it. Equal lengths.

    `line` is the row's place in its file, from 1; `answers` is how many answers are supervised.
    """

    ids: list[int]
    supervised: list[bool]
    line: int = 0
    answers: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> "Tokens":
        """At most the first `length` tokens."""
        return replace(self, ids=self.ids[:length], supervised=self.supervised[:length])


def encode(rows: list[Rendered], tokenizer: "TokenizerWrapper") -> list["Encoding"]:
    """Rendered rows as the tokenizer's own encodings, in one call that uses every core it may.

    Templates write a text's first token themselves; before plain text the tokenizer puts it.
    """
    backend = tokenizer.backend_tokenizer
    found: dict[int, Encoding] = {}
    for plain in (True, False):
        chosen = [i for i, row in enumerate(rows) if (row.prompt is None) == plain]
        texts = [rows[i].text for i in chosen]
        # Of plain text nobody asks which character a token is from, which costs a tenth.
        batch = backend.encode_batch_fast if plain else backend.encode_batch
        encoded = batch(texts, add_special_tokens=plain) if texts else []
        found.update(zip(chosen, encoded, strict=True))
    return [found[i] for i in range(len(rows))]


def supervise(
    row: Rendered, encoding: "Encoding", tokenizer: "TokenizerWrapper", mask_prompt: bool
) -> Tokens:
    """The tokens of a row, and which of them are to be learned.

    With `mask_prompt` every assistant's turn is supervised and nothing else; without it, and for
    plain text, every token is.
    """
    ids = encoding.ids
    ends = tokenizer.eos_token_ids
    if row.prompt is None:
        if not ids or ids[-1] not in ends:
            ids.append(tokenizer.eos_token_id)
        return Tokens(ids, [True] * len(ids))
    if not mask_prompt:
        return Tokens(ids, [True] * len(ids), answers=len(row.starts))
    supervised = [False] * len(ids)
    answers = 0
    following: int | None = None
    for start in reversed(row.starts):
        if start < 0:
            continue
        first = _token_at(encoding, start)
        # A turn that its template ends with nothing must not go on into the next question.
        turn = range(first, len(ids) if following is None else following)
        end = next((i + 1 for i in turn if ids[i] in ends), None)
        if end is None and start == row.starts[-1]:
            end = len(ids)
        if end is not None:
            supervised[first:end] = [True] * (end - first)
            answers += 1
        following = first
    return Tokens(ids, supervised, answers=answers)


def closes_texts(tokenizer: "TokenizerWrapper") -> bool:
    """Whether the tokenizer itself puts an end token behind a plain text."""
    [encoding] = encode([Rendered("x", None, [])], tokenizer)
    return bool(encoding.ids) and encoding.ids[-1] in tokenizer.eos_token_ids


def tokenize(row: Message, tokenizer: "TokenizerWrapper", mask_prompt: bool) -> Tokens:
    """The tokens of one row in the one form of data/formats.py."""
    rendered = render(row, tokenizer)
    return supervise(rendered, encode([rendered], tokenizer)[0], tokenizer, mask_prompt)


def tokenize_all(
    rows: list[Message], tokenizer: "TokenizerWrapper", mask_prompt: bool, max_seq_length: int
) -> list[Tokens]:
    """Rows as tokens, cut to a length; rows with no supervised token left are left out.

    The first token of a row is never predicted, so it does not count.
    """
    found = []
    for start in range(0, len(rows), BATCH):
        rendered = [render(row, tokenizer) for row in rows[start : start + BATCH]]
        encoded = encode(rendered, tokenizer)
        for line, (row, encoding) in enumerate(zip(rendered, encoded, strict=True), start + 1):
            tokens = supervise(row, encoding, tokenizer, mask_prompt).cut(max_seq_length)
            if any(tokens.supervised[1:]):
                found.append(replace(tokens, line=line))
    return found


def asks_as_trained(
    row: Rendered, encoding: "Encoding", ids: list[int], tokenizer: "TokenizerWrapper"
) -> bool:
    """Whether what the model is asked with is, as tokens, a prefix of the `ids` it is trained on.

    Special tokens part a text before anything else does, so the prompt is read as the text is up
    to its last special token; only what comes after that is encoded again.
    """
    prompt = row.prompt
    if prompt is None:
        return True
    if not row.text.startswith(prompt):
        return False
    end = _token_at(encoding, len(prompt))
    special = _special_ids(tokenizer)
    known = next((i for i in reversed(range(end)) if ids[i] in special), None)
    if known is not None and (place := encoding.token_to_chars(known)) is not None:
        rest = _ids_of_short(prompt[place[1] :], tokenizer)
        if ids[known + 1 : end] == rest:
            return True
    return text_ids(prompt, tokenizer) == ids[:end]


def marked(
    row: Message, tokenizer: "TokenizerWrapper", mask_prompt: bool
) -> list[tuple[str, bool]]:
    """A row as the model reads it, in pieces: each a text, and whether it is supervised."""
    tokens = tokenize(row, tokenizer, mask_prompt)
    pairs = zip(tokens.ids, tokens.supervised, strict=True)
    return [
        (answer_text([id for id, _ in run], tokenizer), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _token_at(encoding: "Encoding", place: int) -> int:
    """The first token that ends behind a place in the text."""
    found = encoding.char_to_token(place)
    if found is None:  # white space that the tokenizer drops, or the end of the text
        return bisect_right(encoding.offsets, place, key=lambda offset: offset[1])
    return int(found)


@lru_cache(maxsize=1)
def _special_ids(tokenizer: "TokenizerWrapper") -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(maxsize=256)
def _ids_of_short(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return text_ids(text, tokenizer)  # what prompts end with is mostly the same for all rows
