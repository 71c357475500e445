"""How a model's chat template writes rows: what it is asked with, and what it answers.

Turns are found in the rendered text of the whole conversation: some templates (Qwen3, R1) write an
earlier turn in another way than they wrote it when it was the last.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]


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
    return text_ids(_prompt(row, tokenizer), tokenizer)


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


def expected_answer(row: Message, tokenizer: "TokenizerWrapper") -> str:
    """The text that a model was trained to say last: the answer as its template writes it.

    Templates of reasoning models write an empty thought before an answer that has none.
    """
    text, prompt = _text(row["messages"], row, tokenizer), _prompt(row, tokenizer)
    if not text.startswith(prompt):
        return str(row["messages"][-1]["content"])
    said = text_ids(text[len(prompt) :], tokenizer)
    ends = [i for i, id in enumerate(said) if id in tokenizer.eos_token_ids]
    return answer_text(said[: ends[0]] if ends else said, tokenizer)


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


def text_ids(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    """The tokens of a text in which the template has written all special ones already."""
    return list(tokenizer.encode(text, add_special_tokens=False))
