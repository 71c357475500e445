"""From rows to tokens: which tokens a model reads, and which of them it has to learn to say.

A token is supervised when it belongs to an assistant's turn, up to and including the token that
ends it. What the template writes after that token (a line break, mostly) is read, never learned.
Turns are found in the rendered text of the whole conversation: some templates (Qwen3, R1) write an
earlier turn in another way than they wrote it when it was the last.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """One row: `ids[i]` is a token, `supervised[i]` whether the loss asks for it. Equal lengths.

    `line` is the row's place in its file, from 1.
    """

    ids: list[int]
    supervised: list[bool]
    line: int = 0

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


def tokenize(row: Message, tokenizer: "TokenizerWrapper", mask_prompt: bool) -> Tokens:
    """The tokens of a row in the one form of rows.py.

    With `mask_prompt` every assistant's turn is supervised and nothing else; without it, and for
    plain text, every token is.
    """
    if "text" in row:
        ids = list(tokenizer.encode(row["text"]))
        if not ids or ids[-1] not in tokenizer.eos_token_ids:
            ids.append(tokenizer.eos_token_id)
        return Tokens(ids, [True] * len(ids))
    text = _text(row["messages"], row, tokenizer)
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids, offsets = list(encoded.ids), encoded.offsets
    if not mask_prompt:
        return Tokens(ids, [True] * len(ids))
    supervised = [False] * len(ids)
    starts = _starts(row, text, tokenizer)
    for start in starts:
        turn = [i for i, (_, end) in enumerate(offsets) if end > start]
        ends = [n for n, i in enumerate(turn) if ids[i] in tokenizer.eos_token_ids]
        if ends or start == starts[-1]:
            for i in turn[: ends[0] + 1] if ends else turn:
                supervised[i] = True
    return Tokens(ids, supervised)


def tokenize_all(
    rows: list[Message], tokenizer: "TokenizerWrapper", mask_prompt: bool, max_seq_length: int
) -> list[Tokens]:
    """Rows as tokens, cut to a length; rows with no supervised token left are left out.

    The first token of a row is never predicted, so it does not count.
    """
    cut = (tokenize(row, tokenizer, mask_prompt).cut(max_seq_length) for row in rows)
    return [replace(row, line=line) for line, row in enumerate(cut, 1) if any(row.supervised[1:])]


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


def asks_as_trained(row: Message, tokenizer: "TokenizerWrapper") -> bool:
    """Whether what the model is asked with is a prefix of what it is trained on."""
    if "text" in row:
        return True
    asked = prompt_ids(row, tokenizer)
    return _ids(_text(row["messages"], row, tokenizer), tokenizer)[: len(asked)] == asked


def unsupervised_turns(row: Message, tokenizer: "TokenizerWrapper") -> int:
    """How many of a row's answers can't be found in what its template makes of it."""
    if "text" in row:
        return 0
    answers = sum(message["role"] == "assistant" for message in row["messages"])
    return answers - len(_starts(row, _text(row["messages"], row, tokenizer), tokenizer))


def answer_text(ids: list[int], tokenizer: "TokenizerWrapper") -> str:
    """The text of generated tokens, special tokens included, so that a stray one is seen."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _starts(row: Message, text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    """Where each assistant's turn starts in the rendered text.

    That is the end of the prompt that asks for it, where the text has this prompt; where it has
    another (R1 asks with an open `<think>`), it is the place of the answer itself.
    """
    messages = row["messages"]
    starts = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _text(messages[:turn], row, tokenizer, add_generation_prompt=True)
        pairs = enumerate(zip(prompt, text, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(text)))
        if start < len(prompt):
            answer = str(message.get("content") or "").rpartition("</think>")[2].strip()
            start = text.find(answer, start) if answer else -1
        if start >= 0:
            starts.append(start)
    return starts


def _prompt(row: Message, tokenizer: "TokenizerWrapper") -> str:
    return _text(row["messages"][:-1], row, tokenizer, add_generation_prompt=True)


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


def _ids(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
