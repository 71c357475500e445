"""How a model's chat template writes rows: what the model is asked with, and what it answers.

What is trained has to be what is asked: the text of every answer begins with the prompt that asks
for it. Most templates write a conversation so that all its answers do. Where one writes an earlier
turn in another way than when it was the last (Qwen3, R1), such a turn gets a text of its own; where
one asks with a thought that no finished answer has (R1), the text has it too, and closed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# Words that no template has, to find what was said in what is written.
ASKED, ANSWERED, TOLD, TOOL, CALL = "qAsked1", "qAnswered2", "qTold3", "q_tool_4", "qCalled05"
# What opens a thought, and what closes it: <think> and </think>, [THINK] and [/THINK].
OPENER = re.compile(r"[<\[]\w*think\w*[>\]]", re.IGNORECASE)
CLOSER = re.compile(r"[<\[]/\w*think\w*[>\]]", re.IGNORECASE)
PROMPTED = re.compile(rf"{OPENER.pattern}(\s*{CLOSER.pattern})?", re.IGNORECASE)


class NoTemplate(Exception):
    """A conversation for a model without a chat template."""

    def __init__(self) -> None:
        super().__init__(
            "the model has no chat template: choose its instruct model, put a chat_template.jinja "
            "into its folder, or train on plain text"
        )


@dataclass(frozen=True)
class RenderedText:
    """One text that a row is trained as.

    `starts` are the places in `text`, in characters, where answers to be learned start, None for
    plain text. `asked` is whether what comes before each is what asks for it.
    """

    text: str
    answer_starts: list[int] | None
    prompts_match: bool = True


def render_row(row: Message, tokenizer: "TokenizerWrapper") -> list[RenderedText]:
    """Writes a row in the one form of data/formats.py as the model's template does.

    One text as a rule, the last the whole conversation; before it one for each turn that the whole
    conversation has otherwise than when it was the last, or that may share a token with its prompt:
    a text can be parted there, but then it is not what asks for later answers.

    Raises:
        NoTemplate: where there is none.
        Exception: whatever a chat template raises that refuses the row.
    """
    if "text" in row:
        return [RenderedText(row["text"], None)]
    messages = row["messages"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _finished(row, len(messages) - 1, tokenizer)
    if len(turns) == 1:
        return [whole]
    earlier, apart = [], []
    for turn in turns[:-1]:
        if not rewrites_earlier_turns(tokenizer):
            prompt = _text(messages[:turn], row, tokenizer, add_generation_prompt=True)
            if whole.text.startswith(prompt) and not _may_share(whole.text, len(prompt)):
                earlier.append(len(prompt))
                continue
        own = _finished(row, turn, tokenizer)
        alike = (
            own.prompts_match
            and whole.text.startswith(own.text.rstrip())
            and find_turn_end(tokenizer)
        )
        if alike and not any(_may_share(own.text, start) for start in own.answer_starts or ()):
            earlier += own.answer_starts or []
        elif own.answer_starts:
            apart.append(own)
    return [
        *apart,
        RenderedText(whole.text, earlier + (whole.answer_starts or []), whole.prompts_match),
    ]


def render_rows(
    rows: list[Message], tokenizer: "TokenizerWrapper"
) -> list[list[RenderedText] | Exception]:
    """Writes rows as the model's template does; for those that it refuses, what it raised.

    Questions with one answer, which most rows are, are given to the template together.
    """
    found: dict[int, list[RenderedText] | Exception] = {}
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
            found[i] = [_asked(text, prompt, chat[-1], tokenizer)]
    except Exception:  # one of them is refused: which, is found below
        found.clear()
    for i, row in enumerate(rows):
        if i not in found:
            try:
                found[i] = render_row(row, tokenizer)
            except Exception as error:  # chat templates raise what they like
                found[i] = error
    return [found[i] for i in range(len(rows))]


def find_dropped_content(
    row: Message, rendered: list[RenderedText], tokenizer: "TokenizerWrapper"
) -> str | None:
    """What a row says and its texts do not have, in words; None where nothing is left out.

    A short text is soon found somewhere, and some templates write as JSON what tools say: so the
    template is asked first what it does with messages like these.
    """
    text, messages = rendered[-1].text, row.get("messages", ())
    shape = tuple((m["role"], bool(m["content"]), len(m.get("tool_calls", ()))) for m in messages)
    if shape and (lost := _left_out(shape, "tools" in row, tokenizer)) is not None:
        return lost
    for number, message in enumerate(messages, 1):
        said, role = str(message.get("content") or "").strip(), message["role"]
        if role in ("system", "user") and said not in text:
            return f"message {number}, of the {role}"
        thought = _thought(message) if role == "assistant" else ""
        if thought and not any(thought in answer for answer in _answers(rendered)):
            return f"the thought of message {number}"
    for tool in row.get("tools", ()):
        name = tool.get("function", tool).get("name")
        if name is not None and str(name) not in text:
            return f"the tool {name}"
    return None


def _answers(rendered: list[RenderedText]) -> Iterator[str]:
    for one in rendered:
        starts = one.answer_starts or []
        for start, following in zip_longest(starts, starts[1:]):
            yield one.text[start:following]


@lru_cache(maxsize=1024)
def _left_out(
    shape: tuple[tuple[str, bool, int], ...], tools: bool, tokenizer: "TokenizerWrapper"
) -> str | None:
    """What the template leaves out of conversations like this; None if nothing, or not known.

    Of each message: its role, whether it has a text, and the number of its calls of tools.
    """
    row: Message = {"tools": [_tool()]} if tools else {}
    messages: list[Message] = []
    marks = []
    for number, (role, says, calls) in enumerate(shape, 1):
        message: Message = {"role": role, "content": f"{TOLD}n{number}n" if says else ""}
        named = [f"{ASKED}n{number}n{call}n" for call in range(calls)]
        if calls:
            message["tool_calls"] = [
                {"type": "function", "id": CALL, "function": {"name": TOOL, "arguments": {"a": of}}}
                for of in named
            ]
        if role == "tool":
            message |= {"name": TOOL, "tool_call_id": CALL}
        messages.append(message)
        marks += [(number, message["content"], f"message {number}, of the {role}")]
        marks += [(number, mark, f"the call of a tool in message {number}") for mark in named]
    try:
        text = _text(messages, row, tokenizer)
        for number, mark, said in marks:
            # An earlier answer may be whole only in the text where it is the last.
            answer = shape[number - 1][0] == "assistant"
            if mark not in text and not (
                answer and mark in _text(messages[:number], row, tokenizer)
            ):
                return said
    except Exception:  # chat templates raise what they like: the row itself may be another case
        return None
    return None


def encode_prompt(row: Message, tokenizer: "TokenizerWrapper") -> list[int]:
    """The tokens that ask for a row's last answer."""
    prompt = _text(row["messages"][:-1], row, tokenizer, add_generation_prompt=True)
    return encode_text(prompt, tokenizer)


def find_expected_answer(row: Message, tokenizer: "TokenizerWrapper") -> str:
    """The text that a model was trained to say last, without its thought."""
    whole = _finished(row, len(row["messages"]) - 1, tokenizer)
    if not whole.prompts_match or not whole.answer_starts:
        return str(row["messages"][-1]["content"])
    said = encode_text(whole.text[whole.answer_starts[-1] :], tokenizer)
    ends = [i for i, id in enumerate(said) if id in tokenizer.eos_token_ids]
    return strip_thought(decode_answer(said[: ends[0]] if ends else said, tokenizer))


def decode_answer(ids: list[int], tokenizer: "TokenizerWrapper") -> str:
    """The text of generated tokens, special tokens included, so that a stray one is seen."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def strip_thought(text: str) -> str:
    """What an answer says after its thought; all of it where it has none."""
    closed = list(CLOSER.finditer(text))
    return text[closed[-1].end() :].lstrip() if closed else text


@lru_cache(maxsize=8)
def find_turn_end(tokenizer: "TokenizerWrapper") -> int | None:
    """The token that the chat template writes after an answer; None if it writes none.

    It need not be the tokenizer's end token: Qwen2.5's base models end texts with `<|endoftext|>`
    and turns with `<|im_end|>`, and a model that learned the second has to be stopped at it.
    """
    if not tokenizer.has_chat_template:
        return None
    text = _text(_question_and_answer(), {}, tokenizer)
    _, written, behind = text.rpartition(ANSWERED)
    after = encode_text(behind, tokenizer) if written else []
    return next((id for id in after if id in tokenizer.added_tokens_decoder), None)


@lru_cache(maxsize=8)
def find_open_thought(tokenizer: "TokenizerWrapper") -> str | None:
    """What the generation prompt ends with that no finished answer has, if it is a thought.

    Most open one, some close it at once.
    """
    asked, answered = _question_and_answer()
    prompt = _text([asked], {}, tokenizer, add_generation_prompt=True)
    text = _text([asked, answered], {}, tokenizer)
    opened = prompt[_where_they_part(prompt, text) :]
    return opened if PROMPTED.fullmatch(opened.strip()) else None


def encode_text(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    """The tokens of a text in which the template has written all special ones already."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def probe_support(tokenizer: "TokenizerWrapper") -> dict[str, str]:
    """What the template does with a system message, earlier turns and tools.

    Each is "kept", "dropped", or what the template says in refusing it.
    """
    asked, answered = _question_and_answer()
    last = {"role": "user", "content": "?"}
    found = {}
    for name, messages, row, marks in (
        ("system", [{"role": "system", "content": TOLD}, last], {}, [TOLD]),
        ("earlier turns", [asked, answered, last], {}, [ASKED, ANSWERED]),
        ("tools", [last], {"tools": [_tool()]}, [TOOL]),
    ):
        try:
            text = _text(messages, row, tokenizer, add_generation_prompt=True)
            found[name] = "kept" if all(mark in text for mark in marks) else "dropped"
        except Exception as error:  # chat templates raise what they like
            found[name] = f"refused: {error}"
    return found


def _tool() -> Message:
    function = {"name": TOOL, "description": "", "parameters": {}}
    return {"type": "function", "function": function}


def _question_and_answer() -> tuple[Message, Message]:
    return {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}


@lru_cache(maxsize=8)
def rewrites_earlier_turns(tokenizer: "TokenizerWrapper") -> bool:
    """Whether the template writes an earlier answer otherwise than when it was the last."""
    asked, answered = _question_and_answer()
    for said in (
        answered,
        answered | {"content": f"<think>\n{TOLD}\n</think>\n\n{ANSWERED}"},
        answered | {"reasoning_content": TOLD},
    ):
        alone = _text([asked, said], {}, tokenizer).rstrip()
        try:
            twice = _text([asked, said, asked, said], {}, tokenizer)
        except Exception:  # chat templates raise what they like: this one has no second question
            return False
        if not twice.startswith(alone):
            return True
    return find_turn_end(tokenizer) is None


def _finished(row: Message, turn: int, tokenizer: "TokenizerWrapper") -> RenderedText:
    """The conversation up to a turn of the assistant's, which is to be learned."""
    messages = row["messages"]
    text = _text(messages[: turn + 1], row, tokenizer)
    prompt = _text(messages[:turn], row, tokenizer, add_generation_prompt=True)
    return _asked(text, prompt, messages[turn], tokenizer)


def _asked(text: str, prompt: str, message: Message, tokenizer: "TokenizerWrapper") -> RenderedText:
    """A finished conversation that begins with what asks for its last answer, if it can.

    A thought that the prompt opens and the text does not have becomes the message's own, or an
    empty one. It is closed right behind the line break that opened it: another line break would
    become one token with that one, and the prompt no prefix.
    """
    if text.startswith(prompt):
        return RenderedText(text, [len(prompt)])
    answer = strip_thought(str(message.get("content") or "")).strip()
    opened = find_open_thought(tokenizer)
    before = prompt.removesuffix(opened or "")
    if opened is None or before == prompt or not text.startswith(before):
        start = text.find(answer, _where_they_part(prompt, text)) if answer else -1
        return RenderedText(text, [] if start < 0 else [start], prompts_match=start < 0)
    said = text[len(before) :].lstrip()
    said = strip_thought(said) if OPENER.match(said) else said
    if not answer or answer not in said:
        return RenderedText(text, [])
    closed = prompt
    if CLOSER.search(opened) is None:
        opener, thought = opened.strip(), _thought(message)
        closed += (f"{thought}\n" if thought else "") + f"{opener[0]}/{opener[1:]}\n\n"
    return RenderedText(closed + said, [len(prompt)])


def _thought(message: Message) -> str:
    """What a message has as its thought, beside its content or in it, whatever its marks."""
    said = str(message.get("content") or "")
    closed = list(CLOSER.finditer(said))
    own = said[: closed[-1].start()].strip() if closed else ""
    opener = OPENER.match(own)
    own = own[opener.end() :].strip() if opener else own
    return str(message.get("reasoning_content") or "").strip() or own


def _may_share(text: str, start: int) -> bool:
    """Whether white space before an answer may become one token with how the answer starts."""
    before = text[start - 1 : start]
    return before == " " or (before.isspace() and text[start : start + 1].isspace())


def _where_they_part(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _texts(
    chats: list[list[Message]], tokenizer: "TokenizerWrapper", add_generation_prompt: bool
) -> list[str]:
    if not chats:
        return []
    if not tokenizer.has_chat_template:
        raise NoTemplate
    return list(
        tokenizer.apply_chat_template(
            chats, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )


def _text(
    messages: list[Message] | tuple[Message, ...],
    row: Message,
    tokenizer: "TokenizerWrapper",
    add_generation_prompt: bool = False,
) -> str:
    if not tokenizer.has_chat_template:
        raise NoTemplate
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tools=row.get("tools"),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )
