"""From rows to tokens: which tokens a model reads, and which of them it has to learn to say.

A token is supervised when it belongs to an assistant's turn, up to and including the token that
ends it. What the template writes after that token (a line break, mostly) is read, never learned.
An answer is learned whole, with its end, or not at all.
"""

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING

from athanor.chat.templates import (
    Message,
    RenderedText,
    decode_answer,
    encode_text,
    find_turn_end,
    render_row,
)
from athanor.compute.arrays import TokenizedText

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding


# Rows that the tokenizer is given at a time: enough for every core, little in memory.
BATCH = 1000


def encode_texts(rows: list[RenderedText], tokenizer: "TokenizerWrapper") -> list["Encoding"]:
    """Rendered rows as the tokenizer's own encodings, in one call that uses every core it may.

    Templates write a text's first token themselves; before plain text the tokenizer puts it.
    """
    backend = tokenizer.backend_tokenizer
    found: dict[int, Encoding] = {}
    for plain in (True, False):
        chosen = [i for i, row in enumerate(rows) if (row.answer_starts is None) == plain]
        texts = [rows[i].text for i in chosen]
        # Of plain text nobody asks which character a token is from, which costs a tenth.
        batch = backend.encode_batch_fast if plain else backend.encode_batch
        encoded = batch(texts, add_special_tokens=plain) if texts else []
        found.update(zip(chosen, encoded, strict=True))
    return [found[i] for i in range(len(rows))]


def supervise(
    row: RenderedText,
    encoding: "Encoding",
    tokenizer: "TokenizerWrapper",
    mask_prompt: bool,
    end: int | None = None,
) -> TokenizedText:
    """The tokens of a text, and which of them are to be learned.

    With `mask_prompt` the answers are supervised and nothing else; without it, and for plain text,
    every token is. Answers end with `end`, or else with the token that the template writes there;
    the model reads what the template writes in both cases, as it will when it is asked. Where that
    is nothing, an end is put behind the last answer.
    """
    ids = encoding.ids
    ends = tokenizer.eos_token_ids
    if row.answer_starts is None:
        if not ids or ids[-1] not in ends:
            # Some tokenizers name no end: their model's config does.
            own = tokenizer.eos_token_id
            ids.append(own if own is not None else min(ends) if end is None else end)
        return TokenizedText(ids, [True] * len(ids))
    firsts = [_token_at(encoding, ids, start, tokenizer) for start in row.answer_starts]
    asked = row.prompts_match
    if asked and not _asks(row, encoding, ids, firsts, tokenizer):
        ids, firsts, asked = _in_pieces(row, ids, firsts, tokenizer)
    # The template's own end is left to it: it may end a call of a tool with another than an answer.
    instead = None if end == find_turn_end(tokenizer) else end
    answers: list[tuple[int, int]] = []
    said = {}
    for first, following in zip_longest(firsts, firsts[1:]):
        place = next((i for i in range(first, following or len(ids)) if ids[i] in ends), None)
        if place is None and following is None:
            place = len(ids)
            ids = [*ids, tokenizer.eos_token_id if end is None else end]
        if place is None:  # it must not go on into the next question
            continue
        answers.append((first, place + 1))
        if instead is not None and ids[place] != instead:
            said[place] = instead
    supervised = [not mask_prompt] * len(ids)
    for first, behind in answers:
        supervised[first:behind] = [True] * (behind - first)
    return TokenizedText(
        ids, supervised, answer_spans=answers, replaced_targets=said, prompts_match=asked
    )


def appends_end_token(tokenizer: "TokenizerWrapper") -> bool:
    """Whether the tokenizer itself puts an end token behind a plain text."""
    [encoding] = encode_texts([RenderedText("x", None)], tokenizer)
    return bool(encoding.ids) and encoding.ids[-1] in tokenizer.eos_token_ids


def tokenize_row(
    row: Message, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int | None = None
) -> list[TokenizedText]:
    """The tokens of one row in the one form of data/formats.py, a text after the other."""
    texts = select_trained_texts(render_row(row, tokenizer), mask_prompt)
    encoded = encode_texts(texts, tokenizer)
    return [
        supervise(text, encoding, tokenizer, mask_prompt, end)
        for text, encoding in zip(texts, encoded, strict=True)
    ]


def tokenize_rows(
    rows: list[Message],
    tokenizer: "TokenizerWrapper",
    mask_prompt: bool,
    max_seq_length: int,
    end: int | None = None,
) -> list[TokenizedText]:
    """Rows as tokens, cut to a length; what has no supervised token left is left out.

    The first token of a text is never predicted, so it does not count.
    """
    found = []
    for start in range(0, len(rows), BATCH):
        texts = [
            (line, text)
            for line, row in enumerate(rows[start : start + BATCH], start + 1)
            for text in select_trained_texts(render_row(row, tokenizer), mask_prompt)
        ]
        encoded = encode_texts([text for _, text in texts], tokenizer)
        for (line, text), encoding in zip(texts, encoded, strict=True):
            tokens = supervise(text, encoding, tokenizer, mask_prompt, end).truncate(max_seq_length)
            if any(tokens.supervised[1:]):
                found.append(replace(tokens, line=line))
    return found


def select_validation_texts(
    rows: list[TokenizedText], batches: int, batch_size: int
) -> list[TokenizedText]:
    """Those that a validation loss is measured on: the first `batches` of them, or all with -1."""
    return rows if batches == -1 else rows[: batches * batch_size]


def select_trained_texts(texts: list[RenderedText], mask_prompt: bool) -> list[RenderedText]:
    """The texts of a row that are trained on.

    Those that share a beginning all are only where just the answers are learned: else every prompt
    would count again.
    """
    return texts if mask_prompt else texts[-1:]


def mark_supervised(
    row: Message, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int | None = None
) -> list[tuple[str, bool]]:
    """A row as the model reads it, in pieces: each a text, and whether it is supervised."""
    pairs = [
        pair
        for tokens in tokenize_row(row, tokenizer, mask_prompt, end)
        for pair in zip(tokens.targets(), tokens.supervised, strict=True)
    ]
    return [
        (decode_answer([id for id, _ in run], tokenizer), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _asks(
    row: RenderedText,
    encoding: "Encoding",
    ids: list[int],
    firsts: list[int],
    tokenizer: "TokenizerWrapper",
) -> bool:
    """Whether what asks for each answer is, as tokens, what the model is trained on before it.

    Special tokens part a text before anything else does, so a prompt is read as the text is up to
    its last special token; only what comes after that is encoded again.
    """
    special = _special_ids(tokenizer)
    for start, first in zip(row.answer_starts or (), firsts, strict=True):
        known = next((i for i in reversed(range(first)) if ids[i] in special), None)
        if known is not None and (place := encoding.token_to_chars(known)) is not None:
            rest = _ids_of_short(row.text[place[1] : start], tokenizer)
            if ids[known + 1 : first] == rest:
                continue
        if encode_text(row.text[:start], tokenizer) != ids[:first]:
            return False
    return True


def _in_pieces(
    row: RenderedText, whole: list[int], firsts: list[int], tokenizer: "TokenizerWrapper"
) -> tuple[list[int], list[int], bool]:
    """A text encoded piece by piece, parted where answers start, and where they start in it.

    That makes a prompt a prefix whose last characters would share a token with the answer's first.
    The whole stays as it is, and False is said, where its pieces do not read alike.
    """
    starts = row.answer_starts or []
    ids: list[int] = []
    places = []
    for start, following in zip([0, *starts], [*starts, len(row.text)], strict=True):
        places.append(len(ids))
        ids += encode_text(row.text[start:following], tokenizer)
    asks = all(
        encode_text(row.text[:start], tokenizer) == ids[:place]
        for start, place in zip(starts, places[1:], strict=True)
    )
    if asks and decode_answer(ids, tokenizer) == decode_answer(whole, tokenizer):
        return ids, places[1:], True
    return whole, firsts, False


def _token_at(
    encoding: "Encoding", ids: list[int], place: int, tokenizer: "TokenizerWrapper"
) -> int:
    """The first token that ends behind a place in the text, where it is no special token's end.

    Some special tokens take the white space behind them, and so that of an answer's start.
    """
    found = encoding.char_to_token(place)
    if found is None:  # white space that the tokenizer drops, or the end of the text
        return bisect_right(encoding.offsets, place, key=lambda offset: offset[1])
    if place > 0 and ids[found] in _special_ids(tokenizer):
        return int(found) + (encoding.char_to_token(place - 1) == found)
    return int(found)


@lru_cache(maxsize=1)
def _special_ids(tokenizer: "TokenizerWrapper") -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(maxsize=256)
def _ids_of_short(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return encode_text(text, tokenizer)  # what prompts end with is mostly the same for all rows
