"""Tokens of rows, and which of them are supervised.

The tokens of an answer are supervised up to and including the one that ends it. What the template
writes after that, usually a line break, is read but not learned. An answer is learned whole, with
its end, or not at all.
"""

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING

from athanor.chat.conversation import Conversation
from athanor.chat.template_probes import encode_text, find_turn_end
from athanor.chat.templates import RenderedText, decode_answer, render_row
from athanor.compute.arrays import TokenizedText

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding


# Rows that are tokenized together: enough for all cores, and little memory.
BATCH = 1000


def encode_texts(rows: list[RenderedText], tokenizer: "TokenizerWrapper") -> list["Encoding"]:
    """Encode texts in one call, which uses all cores that the tokenizer may.

    Templates write a text's first token themselves; for plain text the tokenizer adds it.
    """
    backend = tokenizer.backend_tokenizer
    encodings: dict[int, Encoding] = {}
    for plain in (True, False):
        chosen = [i for i, row in enumerate(rows) if (row.answer_starts is None) == plain]
        texts = [rows[i].text for i in chosen]
        # Plain text needs no offsets of tokens, which take a tenth of the time.
        batch = backend.encode_batch_fast if plain else backend.encode_batch
        encoded = batch(texts, add_special_tokens=plain) if texts else []
        encodings.update(zip(chosen, encoded, strict=True))
    return [encodings[i] for i in range(len(rows))]


def supervise(
    row: RenderedText,
    encoding: "Encoding",
    tokenizer: "TokenizerWrapper",
    mask_prompt: bool,
    end: int | None = None,
) -> TokenizedText:
    """Return the tokens of a text, and which of them are supervised.

    With `mask_prompt` only answers are supervised; without it, and for plain text, every token is.
    Answers are trained to end with `end`, or else with the template's token. In both cases the
    model reads the template's, as it will in prompts. If the template writes none, an end is added
    after the last answer.
    """
    ids = encoding.ids
    ends = tokenizer.eos_token_ids
    if row.answer_starts is None:
        if not ids or ids[-1] not in ends:
            # Some tokenizers have no end token, and only their model's config names one.
            own = tokenizer.eos_token_id
            ids.append(own if own is not None else min(ends) if end is None else end)
        return TokenizedText(ids, [True] * len(ids))
    starts = sorted([*row.answer_starts, *row.context_starts])
    firsts = {start: _token_at(encoding, ids, start, tokenizer) for start in starts}
    prompts_match = row.prompts_match
    if prompts_match and not _prompts_match(row, encoding, ids, firsts, tokenizer):
        ids, firsts, prompts_match = _encode_in_pieces(row, ids, firsts, tokenizer)
    # The template's own end is not replaced: it may end tool calls with another token.
    replacement = None if end == find_turn_end(tokenizer) else end
    supervised = [not mask_prompt] * len(ids)
    answers: list[tuple[int, int]] = []
    replaced = {}
    for start, after in zip_longest(starts, starts[1:]):
        first, following = firsts[start], firsts.get(after)
        place = next((i for i in range(first, following or len(ids)) if ids[i] in ends), None)
        if start in row.context_starts:
            behind = following if place is None else place + 1
            supervised[first:behind] = [False] * len(supervised[first:behind])
            continue
        if place is None and following is None:
            place = len(ids)
            ids = [*ids, tokenizer.eos_token_id if end is None else end]
            supervised.append(True)
        if place is None:  # it must not extend into the next question
            continue
        answers.append((first, place + 1))
        if replacement is not None and ids[place] != replacement:
            replaced[place] = replacement
    for first, behind in answers:
        supervised[first:behind] = [True] * (behind - first)
    return TokenizedText(
        ids,
        supervised,
        answer_spans=answers,
        replaced_targets=replaced,
        prompts_match=prompts_match,
    )


def appends_end_token(tokenizer: "TokenizerWrapper") -> bool:
    """Return whether the tokenizer itself adds an end token to plain text."""
    [encoding] = encode_texts([RenderedText("x", None)], tokenizer)
    return bool(encoding.ids) and encoding.ids[-1] in tokenizer.eos_token_ids


def tokenize_row(
    row: Conversation, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int | None = None
) -> list[TokenizedText]:
    """Return the tokens of a row, text by text."""
    texts = select_trained_texts(render_row(row, tokenizer), mask_prompt)
    encoded = encode_texts(texts, tokenizer)
    return [
        supervise(text, encoding, tokenizer, mask_prompt, end)
        for text, encoding in zip(texts, encoded, strict=True)
    ]


def tokenize_rows(
    rows: list[Conversation],
    tokenizer: "TokenizerWrapper",
    mask_prompt: bool,
    max_seq_length: int,
    end: int | None = None,
) -> list[TokenizedText]:
    """Tokenize rows and truncate them; texts without a supervised token are left out.

    The first token of a text is never predicted, so it does not count.
    """
    tokenized = []
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
                tokenized.append(replace(tokens, line=line))
    return tokenized


def select_validation_texts(
    rows: list[TokenizedText], batches: int, batch_size: int
) -> list[TokenizedText]:
    """Return the texts of the first `batches` batches of a validation, or all with -1."""
    return rows if batches == -1 else rows[: batches * batch_size]


def select_trained_texts(texts: list[RenderedText], mask_prompt: bool) -> list[RenderedText]:
    """Return the texts of a row that are trained on.

    All if only answers are learned; else only the whole conversation, since a prompt that several
    texts share would count several times.
    """
    return texts if mask_prompt else texts[-1:]


def mark_supervised(
    row: Conversation, tokenizer: "TokenizerWrapper", mask_prompt: bool, end: int | None = None
) -> list[tuple[str, bool]]:
    """Split a row as the model reads it into pieces of text, each supervised or not."""
    pairs = [
        pair
        for tokens in tokenize_row(row, tokenizer, mask_prompt, end)
        for pair in zip(tokens.targets(), tokens.supervised, strict=True)
    ]
    return [
        (decode_answer([id for id, _ in run], tokenizer), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _prompts_match(
    row: RenderedText,
    encoding: "Encoding",
    ids: list[int],
    firsts: dict[int, int],
    tokenizer: "TokenizerWrapper",
) -> bool:
    """Return whether the tokens before each answer equal those of its prompt alone.

    Special tokens split a text before anything else does, so the two agree up to the prompt's last
    special token; only the text after that is encoded again.
    """
    special = _special_ids(tokenizer)
    for start in row.answer_starts or ():
        first = firsts[start]
        last = next((i for i in reversed(range(first)) if ids[i] in special), None)
        if last is not None and (place := encoding.token_to_chars(last)) is not None:
            rest = _encode_short(row.text[place[1] : start], tokenizer)
            if ids[last + 1 : first] == rest:
                continue
        if encode_text(row.text[:start], tokenizer) != ids[:first]:
            return False
    return True


def _encode_in_pieces(
    row: RenderedText, whole: list[int], firsts: dict[int, int], tokenizer: "TokenizerWrapper"
) -> tuple[list[int], dict[int, int], bool]:
    """Encode a text in pieces that start with its answers; return also the answers' places.

    So a prompt is a prefix even if its last characters would share a token with the answer's first.
    The third value is False where the pieces have a different text; then `whole` is returned.
    """
    starts = row.answer_starts or []
    ids: list[int] = []
    places = {}
    for start, following in zip([0, *starts], [*starts, len(row.text)], strict=True):
        places[start] = len(ids)
        for place in row.context_starts:
            if start <= place < following:
                places[place] = len(ids) + len(encode_text(row.text[start:place], tokenizer))
        ids += encode_text(row.text[start:following], tokenizer)
    match = all(
        encode_text(row.text[:start], tokenizer) == ids[: places[start]] for start in starts
    )
    if match and decode_answer(ids, tokenizer) == decode_answer(whole, tokenizer):
        return ids, places, True
    return whole, firsts, False


def _token_at(
    encoding: "Encoding", ids: list[int], place: int, tokenizer: "TokenizerWrapper"
) -> int:
    """Return the first token that ends after a place in the text, skipping a special token there.

    Some special tokens include the white space after them, and so that of an answer's start.
    """
    token = encoding.char_to_token(place)
    if token is None:  # white space that the tokenizer drops, or the end of the text
        return bisect_right(encoding.offsets, place, key=lambda offset: offset[1])
    if place > 0 and ids[token] in _special_ids(tokenizer):
        return int(token) + (encoding.char_to_token(place - 1) == token)
    return int(token)


@lru_cache(maxsize=1)
def _special_ids(tokenizer: "TokenizerWrapper") -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(maxsize=256)
def _encode_short(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return encode_text(text, tokenizer)  # the ends of prompts are mostly the same for all rows
