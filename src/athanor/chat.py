"""From rows to tokens: which tokens a model reads, and which of them it has to learn to say.

A token is supervised when it belongs to an assistant's turn, up to and including the token that
ends it. What the template writes after that token (a line break, mostly) is read, never learned.
Turns are found in the rendered text of the whole conversation: some templates (Qwen3, R1) write an
earlier turn in another way than they wrote it when it was the last.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Encoding

Message = dict[str, Any]

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


def end_of_turn(tokenizer: "TokenizerWrapper") -> int | None:
    """The special token that the chat template writes after an answer; None if it writes none.

    It need not be the tokenizer's end token: Qwen2.5's base models end texts with `<|endoftext|>`
    and turns with `<|im_end|>`, and a model that learned the second has to be stopped at it.
    """
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = _text(messages, {}, tokenizer)
    after = tokenizer.encode(text[text.rindex("!") + 1 :], add_special_tokens=False)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((id for id in after if id in special), None)


def prompt_ids(row: Message, tokenizer: "TokenizerWrapper") -> list[int]:
    """The tokens that ask for a row's last answer."""
    return _ids(_prompt(row, tokenizer), tokenizer)


@dataclass(frozen=True)
class Rendered:
    """A row as the model's template writes it.

    `starts` are the places in `text` where the assistant's turns start, in characters, -1 where one
    can't be found; `prompt` is what asks for the last of them. Plain text has neither.
    """

    text: str
    prompt: str | None
    starts: list[int]


def render(row: Message, tokenizer: "TokenizerWrapper") -> Rendered:
    """Writes a row in the one form of data/formats.py as the model's template does.

    Raises:
        Exception: whatever a chat template raises that refuses the row.
    """
    if "text" in row:
        return Rendered(row["text"], None, [])
    text = _text(row["messages"], row, tokenizer)
    starts, prompt = [], ""
    for turn, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            prompt = _text(row["messages"][:turn], row, tokenizer, add_generation_prompt=True)
            starts.append(_start(text, prompt, message))
    return Rendered(text, prompt, starts)


def render_all(rows: list[Message], tokenizer: "TokenizerWrapper") -> list[Rendered | Exception]:
    """Writes rows as the model's template does; for those that it refuses, what it raised.

    Questions with one answer, which most rows are, are given to the template together.
    """
    found: dict[int, Rendered | Exception] = {}
    single = [
        i
        for i, row in enumerate(rows)
        if "messages" in row
        and "tools" not in row
        and all(message["role"] != "assistant" for message in row["messages"][:-1])
    ]
    try:
        chats = [rows[i]["messages"] for i in single]
        texts = _texts(chats, tokenizer, add_generation_prompt=False)
        prompts = _texts([chat[:-1] for chat in chats], tokenizer, add_generation_prompt=True)
        for i, chat, text, prompt in zip(single, chats, texts, prompts, strict=True):
            found[i] = Rendered(text, prompt, [_start(text, prompt, chat[-1])])
    except Exception:  # one of them is refused: which, is found below
        found.clear()
    for i, row in enumerate(rows):
        if i not in found:
            try:
                found[i] = render(row, tokenizer)
            except Exception as error:  # chat templates raise what they like
                found[i] = error
    return [found[i] for i in range(len(rows))]


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


def expected_answer(row: Message, tokenizer: "TokenizerWrapper") -> str:
    """The text that a model was trained to say last: the answer as its template writes it.

    Templates of reasoning models write an empty thought before an answer that has none.
    """
    text, prompt = _text(row["messages"], row, tokenizer), _prompt(row, tokenizer)
    if not text.startswith(prompt):
        return str(row["messages"][-1]["content"])
    said = _ids(text[len(prompt) :], tokenizer)
    ends = [i for i, id in enumerate(said) if id in tokenizer.eos_token_ids]
    return answer_text(said[: ends[0]] if ends else said, tokenizer)


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
    return _ids(prompt, tokenizer) == ids[:end]


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


def answer_text(ids: list[int], tokenizer: "TokenizerWrapper") -> str:
    """The text of generated tokens, special tokens included, so that a stray one is seen."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _start(text: str, prompt: str, message: Message) -> int:
    """Where an assistant's turn starts in the rendered text; -1 where it can't be found.

    That is the end of the prompt that asks for it, where the text has this prompt; where it has
    another (R1 asks with an open `<think>`), it is the place of the answer itself.
    """
    if text.startswith(prompt):
        return len(prompt)
    pairs = enumerate(zip(prompt, text, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), len(text))
    answer = str(message.get("content") or "").rpartition("</think>")[2].strip()
    return text.find(answer, start) if answer else -1


def _token_at(encoding: "Encoding", place: int) -> int:
    """The first token that ends behind a place in the text."""
    found = encoding.char_to_token(place)
    if found is None:  # white space that the tokenizer drops, or the end of the text
        return bisect_right(encoding.offsets, place, key=lambda offset: offset[1])
    return int(found)


def _prompt(row: Message, tokenizer: "TokenizerWrapper") -> str:
    return _text(row["messages"][:-1], row, tokenizer, add_generation_prompt=True)


def _texts(
    chats: list[list[Message]], tokenizer: "TokenizerWrapper", add_generation_prompt: bool
) -> list[str]:
    if not chats:
        return []
    return list(
        tokenizer.apply_chat_template(
            chats, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )


def _text(
    messages: list[Message],
    row: Message,
    tokenizer: "TokenizerWrapper",
    add_generation_prompt: bool = False,
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools"),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )


@lru_cache(maxsize=1)
def _special_ids(tokenizer: "TokenizerWrapper") -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(maxsize=256)
def _ids_of_short(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return _ids(text, tokenizer)  # what prompts end with is mostly the same for all rows


def _ids(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
