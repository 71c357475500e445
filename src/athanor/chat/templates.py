"""Rows as a model's chat template writes them: training texts, prompts and answers.

The training text of every answer has to begin with the prompt that asks for it. Most templates
write conversations so that it does. Where a template writes an earlier turn differently from the
last one (Qwen3, R1), that turn gets a text of its own; where the prompt opens a thought that no
finished answer has (R1), the training text has the thought as well, and closes it.
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

# Words that no template has, to find the contents of messages in its output.
QUESTION, ANSWER, OTHER, TOOL, CALL = "qAsked1", "qAnswered2", "qTold3", "q_tool_4", "qCalled05"
# Marks around a thought: <think> and </think>, [THINK] and [/THINK].
OPENER = re.compile(r"[<\[]\w*think\w*[>\]]", re.IGNORECASE)
CLOSER = re.compile(r"[<\[]/\w*think\w*[>\]]", re.IGNORECASE)
PROMPTED = re.compile(rf"{OPENER.pattern}(\s*{CLOSER.pattern})?", re.IGNORECASE)


class NoTemplate(Exception):
    """A conversation for a model without a chat template."""

    def __init__(self) -> None:
        super().__init__(
            "the model has no chat template; choose its instruct version, put a "
            "chat_template.jinja into its folder, or train on plain text"
        )


@dataclass(frozen=True)
class RenderedText:
    """One text that a row is trained as.

    Args:
        answer_starts: where the answers to be learned start, in characters; None for plain text.
        prompts_match: whether the text before each answer is the prompt that asks for it.
    """

    text: str
    answer_starts: list[int] | None
    prompts_match: bool = True


def render_row(row: Message, tokenizer: "TokenizerWrapper") -> list[RenderedText]:
    """Write a row in the one form of prepare.formats as the model's template does.

    The last text is the whole conversation. Before it comes one for each earlier turn that the
    template writes differently when it is not the last, or that may share a token with its prompt:
    a text can be split there, but then it is no prompt of later answers.

    Raises:
        NoTemplate: where there is none.
        Exception: any that a chat template raises to refuse the row.
    """
    if "text" in row:
        return [RenderedText(row["text"], None)]
    messages = row["messages"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _finished(row, len(messages) - 1, tokenizer)
    if len(turns) == 1:
        return [whole]
    earlier, separate = [], []
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
            separate.append(own)
    return [
        *separate,
        RenderedText(whole.text, earlier + (whole.answer_starts or []), whole.prompts_match),
    ]


def render_rows(
    rows: list[Message], tokenizer: "TokenizerWrapper"
) -> list[list[RenderedText] | Exception]:
    """Write rows as the model's template does; a row that it refuses gives the exception.

    Questions with one answer, which most rows are, go to the template together.
    """
    texts_of: dict[int, list[RenderedText] | Exception] = {}
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
            texts_of[i] = [_match_prompt(text, prompt, chat[-1], tokenizer)]
    except Exception:  # it refuses one of them, which is determined below
        texts_of.clear()
    for i, row in enumerate(rows):
        if i not in texts_of:
            try:
                texts_of[i] = render_row(row, tokenizer)
            except Exception as error:  # a chat template may raise any
                texts_of[i] = error
    return [texts_of[i] for i in range(len(rows))]


def find_dropped_content(
    row: Message, rendered: list[RenderedText], tokenizer: "TokenizerWrapper"
) -> str | None:
    """Name the first content of a row that its texts lack; None if they have all.

    First the template is probed with messages like these: a short content may occur elsewhere in
    the text, and some templates write the results of tools as JSON.
    """
    text, messages = rendered[-1].text, row.get("messages", ())
    shape = tuple((m["role"], bool(m["content"]), len(m.get("tool_calls", ()))) for m in messages)
    if shape and (lost := _find_dropped_kind(shape, "tools" in row, tokenizer)) is not None:
        return lost
    for number, message in enumerate(messages, 1):
        content, role = str(message.get("content") or "").strip(), message["role"]
        if role in ("system", "user") and content not in text:
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
    for part in rendered:
        starts = part.answer_starts or []
        for start, following in zip_longest(starts, starts[1:]):
            yield part.text[start:following]


@lru_cache(maxsize=1024)
def _find_dropped_kind(
    shape: tuple[tuple[str, bool, int], ...], tools: bool, tokenizer: "TokenizerWrapper"
) -> str | None:
    """Name what the template drops of conversations of a shape; None if nothing, or if unknown.

    Args:
        shape: each message's role, whether it has a content, and its number of tool calls.
        tools: whether the row has definitions of tools.
    """
    row: Message = {"tools": [_tool()]} if tools else {}
    messages: list[Message] = []
    marks = []
    for number, (role, has_content, calls) in enumerate(shape, 1):
        message: Message = {"role": role, "content": f"{OTHER}n{number}n" if has_content else ""}
        named = [f"{QUESTION}n{number}n{call}n" for call in range(calls)]
        if calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": CALL,
                    "function": {"name": TOOL, "arguments": {"a": mark}},
                }
                for mark in named
            ]
        if role == "tool":
            message |= {"name": TOOL, "tool_call_id": CALL}
        messages.append(message)
        marks += [(number, message["content"], f"message {number}, of the {role}")]
        marks += [(number, mark, f"the call of a tool in message {number}") for mark in named]
    try:
        text = _text(messages, row, tokenizer)
        for number, mark, description in marks:
            # An earlier answer may be whole only in the text where it is the last.
            answer = shape[number - 1][0] == "assistant"
            if mark not in text and not (
                answer and mark in _text(messages[:number], row, tokenizer)
            ):
                return description
    except Exception:  # a chat template may raise any, and perhaps not for the row itself
        return None
    return None


def encode_prompt(row: Message, tokenizer: "TokenizerWrapper") -> list[int]:
    """Return the tokens that ask for a row's last answer."""
    prompt = _text(row["messages"][:-1], row, tokenizer, add_generation_prompt=True)
    return encode_text(prompt, tokenizer)


def find_expected_answer(row: Message, tokenizer: "TokenizerWrapper") -> str:
    """Return the last answer as the model was trained to say it, without its thought."""
    whole = _finished(row, len(row["messages"]) - 1, tokenizer)
    if not whole.prompts_match or not whole.answer_starts:
        return str(row["messages"][-1]["content"])
    ids = encode_text(whole.text[whole.answer_starts[-1] :], tokenizer)
    ends = [i for i, id in enumerate(ids) if id in tokenizer.eos_token_ids]
    return strip_thought(decode_answer(ids[: ends[0]] if ends else ids, tokenizer))


def decode_answer(ids: list[int], tokenizer: "TokenizerWrapper") -> str:
    """Return the text of generated tokens, special tokens included, so that stray ones show."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def strip_thought(text: str) -> str:
    """Return an answer without its thought, if it has one."""
    closed = list(CLOSER.finditer(text))
    return text[closed[-1].end() :].lstrip() if closed else text


@lru_cache(maxsize=8)
def find_turn_end(tokenizer: "TokenizerWrapper") -> int | None:
    """Return the token that the chat template writes after an answer; None if it writes none.

    It may differ from the tokenizer's end token: Qwen2.5's base models end texts with
    `<|endoftext|>` and turns with `<|im_end|>`, and a model that learned the latter has to stop
    there.
    """
    if not tokenizer.has_chat_template:
        return None
    text = _text(_question_and_answer(), {}, tokenizer)
    _, written, behind = text.rpartition(ANSWER)
    after = encode_text(behind, tokenizer) if written else []
    return next((id for id in after if id in tokenizer.added_tokens_decoder), None)


@lru_cache(maxsize=8)
def find_open_thought(tokenizer: "TokenizerWrapper") -> str | None:
    """Return the opening of a thought at the end of the prompt that finished answers lack.

    Some prompts also close it.
    """
    question, answered = _question_and_answer()
    prompt = _text([question], {}, tokenizer, add_generation_prompt=True)
    text = _text([question, answered], {}, tokenizer)
    opened = prompt[_common_length(prompt, text) :]
    return opened if PROMPTED.fullmatch(opened.strip()) else None


def encode_text(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    """Return the tokens of a text that already has all special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def probe_support(tokenizer: "TokenizerWrapper") -> dict[str, str]:
    """Return how the template treats a system message, earlier turns and tools.

    Each is "kept", "dropped", or "refused: " with the template's reason.
    """
    question, answered = _question_and_answer()
    last = {"role": "user", "content": "?"}
    support = {}
    for name, messages, row, marks in (
        ("system", [{"role": "system", "content": OTHER}, last], {}, [OTHER]),
        ("earlier turns", [question, answered, last], {}, [QUESTION, ANSWER]),
        ("tools", [last], {"tools": [_tool()]}, [TOOL]),
    ):
        try:
            text = _text(messages, row, tokenizer, add_generation_prompt=True)
            support[name] = "kept" if all(mark in text for mark in marks) else "dropped"
        except Exception as error:  # a chat template may raise any
            support[name] = f"refused: {error}"
    return support


def _tool() -> Message:
    function = {"name": TOOL, "description": "", "parameters": {}}
    return {"type": "function", "function": function}


def _question_and_answer() -> tuple[Message, Message]:
    return {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


@lru_cache(maxsize=8)
def rewrites_earlier_turns(tokenizer: "TokenizerWrapper") -> bool:
    """Return whether the template writes an earlier answer differently from the last one."""
    question, answered = _question_and_answer()
    for answer in (
        answered,
        answered | {"content": f"<think>\n{OTHER}\n</think>\n\n{ANSWER}"},
        answered | {"reasoning_content": OTHER},
    ):
        alone = _text([question, answer], {}, tokenizer).rstrip()
        try:
            twice = _text([question, answer, question, answer], {}, tokenizer)
        except Exception:  # the template allows no second question
            return False
        if not twice.startswith(alone):
            return True
    return find_turn_end(tokenizer) is None


def _finished(row: Message, turn: int, tokenizer: "TokenizerWrapper") -> RenderedText:
    """Return the text of a conversation up to an answer, which is to be learned."""
    messages = row["messages"]
    text = _text(messages[: turn + 1], row, tokenizer)
    prompt = _text(messages[:turn], row, tokenizer, add_generation_prompt=True)
    return _match_prompt(text, prompt, messages[turn], tokenizer)


def _match_prompt(
    text: str, prompt: str, message: Message, tokenizer: "TokenizerWrapper"
) -> RenderedText:
    """Return a finished conversation that begins with the prompt of its last answer, if possible.

    A thought that the prompt opens and the text lacks becomes the message's own, or an empty one.
    It is closed right after the line break that opened it: a second line break would form one token
    with the first, and the prompt would be no prefix.
    """
    if text.startswith(prompt):
        return RenderedText(text, [len(prompt)])
    answer = strip_thought(str(message.get("content") or "")).strip()
    opened = find_open_thought(tokenizer)
    before = prompt.removesuffix(opened or "")
    if opened is None or before == prompt or not text.startswith(before):
        start = text.find(answer, _common_length(prompt, text)) if answer else -1
        return RenderedText(text, [] if start < 0 else [start], prompts_match=start < 0)
    written = text[len(before) :].lstrip()
    written = strip_thought(written) if OPENER.match(written) else written
    if not answer or answer not in written:
        return RenderedText(text, [])
    closed = prompt
    if CLOSER.search(opened) is None:
        opener, thought = opened.strip(), _thought(message)
        closed += (f"{thought}\n" if thought else "") + f"{opener[0]}/{opener[1:]}\n\n"
    return RenderedText(closed + written, [len(prompt)])


def _thought(message: Message) -> str:
    """Return the thought of a message, from its own field or from its content."""
    content = str(message.get("content") or "")
    closed = list(CLOSER.finditer(content))
    own = content[: closed[-1].start()].strip() if closed else ""
    opener = OPENER.match(own)
    own = own[opener.end() :].strip() if opener else own
    return str(message.get("reasoning_content") or "").strip() or own


def _may_share(text: str, start: int) -> bool:
    """Return whether white space before an answer may form one token with its first characters."""
    before = text[start - 1 : start]
    return before == " " or (before.isspace() and text[start : start + 1].isspace())


def _common_length(first: str, second: str) -> int:
    """Return the length of the common beginning of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


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
