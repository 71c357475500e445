"""Rows as a model's chat template writes them: training texts, prompts and answers.

The training text of every answer has to begin with the prompt that asks for it. Most templates
write conversations so that it does. Where a template writes an earlier turn differently from the
last one (Qwen3, R1), that turn gets a text of its own; where the prompt opens a thought that no
finished answer has (R1), the training text has the thought as well, and closes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from athanor.chat.conversation import Conversation, Message, Tool, Turn
from athanor.chat.rendering import merge_system_turns
from athanor.chat.template_probes import (
    CLOSER,
    OPENER,
    THOUGHT_KEYS,
    common_length,
    encode_text,
    find_dropped_kind,
    find_open_thought,
    find_thought_key,
    find_turn_end,
    rewrites_earlier_turns,
    write_text,
)

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class RenderedText:
    """One text that a row is trained as.

    Args:
        answer_starts: where the answers to be learned start, in characters; None for plain text.
        prompts_match: whether the text before each answer is the prompt that asks for it.
        context_starts: where the answers start that are context and not learned.
    """

    text: str
    answer_starts: list[int] | None
    prompts_match: bool = True
    context_starts: tuple[int, ...] = ()


def render_row(row: Conversation, tokenizer: "TokenizerWrapper") -> list[RenderedText]:
    """Write a row as the model's template does.

    The last text is the whole conversation. Before it comes one for each earlier turn that the
    template writes differently when it is not the last, or that may share a token with its prompt:
    a text can be split there, but then it is no prompt of later answers.

    Raises:
        NoTemplate: where there is none.
        Exception: any that a chat template raises to refuse the row.
    """
    if row.text is not None:
        return [RenderedText(row.text, None)]
    answers = [i for i, turn in enumerate(row.turns) if turn.role == "assistant"]
    whole = _finished(row, len(row.turns) - 1, tokenizer)
    if len(answers) == 1:
        return [whole]
    earlier, separate, context = [], [], []
    for answer in answers[:-1]:
        prompt, is_written = _find_prompt(row, answer, tokenizer)
        if not row.turns[answer].learned:
            context.append(common_length(prompt, whole.text))
            continue
        is_prefix = whole.text.startswith(prompt) and not _may_share(whole.text, len(prompt))
        if is_prefix and not (is_written and rewrites_earlier_turns(tokenizer)):
            earlier.append(len(prompt))
            continue
        own = _finished(row, answer, tokenizer)
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
        RenderedText(
            whole.text,
            earlier + (whole.answer_starts or []),
            whole.prompts_match,
            tuple(context),
        ),
    ]


def render_rows(
    rows: list[Conversation], tokenizer: "TokenizerWrapper"
) -> list[list[RenderedText] | Exception]:
    """Write rows as the model's template does; a row that it refuses gives the exception.

    Questions with one answer, which most rows are, go to the template together.
    """
    texts_of: dict[int, list[RenderedText] | Exception] = {}
    single = [
        i
        for i, row in enumerate(rows)
        if row.turns and not row.tools and all(turn.role != "assistant" for turn in row.turns[:-1])
    ]
    try:
        chats = [[_message(turn, tokenizer) for turn in rows[i].turns] for i in single]
        texts, prompts = (
            tokenizer.apply_chat_template(
                conversations, add_generation_prompt=asking, tokenize=False
            )
            for conversations, asking in ((chats, False), ([chat[:-1] for chat in chats], True))
        )
        for i, text, prompt in zip(single, texts, prompts, strict=True):
            texts_of[i] = [_match_prompt(text, prompt, rows[i].turns[-1], tokenizer)]
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
    row: Conversation, rendered: list[RenderedText], tokenizer: "TokenizerWrapper"
) -> str | None:
    """Name the first content of a row that its texts lack; None if they have all.

    First the template is probed with messages like these: a short content may occur elsewhere in
    the text, and some templates write the results of tools as JSON.
    """
    text = rendered[-1].text
    shape = tuple((turn.role, bool(turn.content), len(turn.calls)) for turn in row.turns)
    tools = tuple(map(_kind_of_tool, row.tools))
    if shape and (lost := find_dropped_kind(shape, tools, tokenizer)) is not None:
        return lost
    for number, turn in enumerate(row.turns, 1):
        if turn.role in ("system", "user") and turn.content.strip() not in text:
            return f"message {number}, of the {turn.role}"
    for tool in row.tools:
        name = tool.get("function", tool).get("name")
        if name is not None and str(name) not in text:
            return f"the tool {name}"
    return None


def _kind_of_tool(tool: Tool) -> tuple[bool, bool, bool]:
    function = tool.get("function", tool)
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return "function" in tool, bool(function.get("description")), bool(properties)


def find_dropped_thoughts(row: Conversation, rendered: list[RenderedText]) -> list[int]:
    """Return the numbers of the messages that are learned without their thought, from 1."""
    return [
        number
        for number, turn in enumerate(row.turns, 1)
        if turn.learned
        and (thought := _thought(turn))
        and not any(thought in answer for answer in _answers(rendered))
    ]


def suggest_merge(row: Conversation, tokenizer: "TokenizerWrapper") -> str:
    """Return the advice to merge system messages, where a row's texts then have everything."""
    if all(turn.role != "system" for turn in row.turns):
        return ""
    merged = merge_system_turns(row)
    try:
        if find_dropped_content(merged, render_row(merged, tokenizer), tokenizer) is not None:
            return ""
    except Exception:  # a chat template may raise any
        return ""
    return "; data.system=merge puts system messages into the questions after them"


def _answers(rendered: list[RenderedText]) -> Iterator[str]:
    for part in rendered:
        starts = part.answer_starts or []
        for start, following in zip_longest(starts, starts[1:]):
            yield part.text[start:following]


def encode_prompt(row: Conversation, tokenizer: "TokenizerWrapper") -> list[int]:
    """Return the tokens that ask for a row's last answer."""
    prompt, _ = _find_prompt(row, len(row.turns) - 1, tokenizer)
    return encode_text(prompt, tokenizer)


def find_expected_answer(row: Conversation, tokenizer: "TokenizerWrapper") -> str:
    """Return the last answer as the model was trained to say it, without its thought."""
    whole = _finished(row, len(row.turns) - 1, tokenizer)
    if not whole.prompts_match or not whole.answer_starts:
        return row.turns[-1].content
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


def _write(
    row: Conversation, turns: int, tokenizer: "TokenizerWrapper", asking: bool = False
) -> str:
    """Return the first turns of a row as the template writes them; `asking` for the next."""
    messages = [_message(turn, tokenizer) for turn in row.turns[:turns]]
    offered = {"tools": row.tools} if row.tools else {}
    return write_text(messages, offered, tokenizer, add_generation_prompt=asking)


def _message(turn: Turn, tokenizer: "TokenizerWrapper") -> Message:
    """Return a turn as the template is given it: its thought under the template's own key."""
    message = turn.message()
    if turn.thought and (key := find_thought_key(tokenizer)) != THOUGHT_KEYS[0]:
        message[key] = message.pop(THOUGHT_KEYS[0])
    return message


def _find_prompt(row: Conversation, answer: int, tokenizer: "TokenizerWrapper") -> tuple[str, bool]:
    """Return the text before an answer, and whether it is the prompt that the template writes.

    Some templates refuse to ask for an answer before any question, but write one: an assistant's
    greeting, or a text under a title.

    Raises:
        Exception: any that the template raises to refuse the row.
    """
    try:
        return _write(row, answer, tokenizer, asking=True), True
    except Exception:
        if any(turn.role == "user" for turn in row.turns[:answer]):
            raise
        text, place = _write(row, len(row.turns), tokenizer), 0
        for turn in row.turns[:answer]:
            place = max(place, text.find(turn.content, place) + len(turn.content))
        content = row.turns[answer].content.strip()
        start = text.find(content, place)
        if not content or start < 0:
            raise
        return text[:start], False


def _finished(row: Conversation, answer: int, tokenizer: "TokenizerWrapper") -> RenderedText:
    """Return the text of a conversation up to an answer, which is to be learned."""
    text = _write(row, answer + 1, tokenizer)
    prompt, _ = _find_prompt(row, answer, tokenizer)
    return _match_prompt(text, prompt, row.turns[answer], tokenizer)


def _match_prompt(
    text: str, prompt: str, turn: Turn, tokenizer: "TokenizerWrapper"
) -> RenderedText:
    """Return a finished conversation that begins with the prompt of its last answer, if possible.

    A thought that the prompt opens and the text lacks becomes the message's own, or an empty one.
    It is closed right after the line break that opened it: a second line break would form one token
    with the first, and the prompt would be no prefix.
    """
    if text.startswith(prompt):
        return RenderedText(text, [len(prompt)])
    answer = strip_thought(turn.content).strip()
    opened = find_open_thought(tokenizer)
    before = prompt.removesuffix(opened or "")
    if opened is None or before == prompt or not text.startswith(before):
        start = text.find(answer, common_length(prompt, text)) if answer else -1
        return RenderedText(text, [] if start < 0 else [start], prompts_match=start < 0)
    written = text[len(before) :].lstrip()
    written = strip_thought(written) if OPENER.match(written) else written
    if not answer or answer not in written:
        return RenderedText(text, [])
    closed = prompt
    if CLOSER.search(opened) is None:
        opener, thought = opened.strip(), _thought(turn)
        closed += (f"{thought}\n" if thought else "") + f"{opener[0]}/{opener[1:]}\n\n"
    return RenderedText(closed + written, [len(prompt)])


def _thought(turn: Turn) -> str:
    """Return the thought of a turn, from its own field or from its content."""
    closed = list(CLOSER.finditer(turn.content))
    own = turn.content[: closed[-1].start()].strip() if closed else ""
    opener = OPENER.match(own)
    own = own[opener.end() :].strip() if opener else own
    return turn.thought.strip() or own


def _may_share(text: str, start: int) -> bool:
    """Return whether white space before an answer may form one token with its first characters."""
    before = text[start - 1 : start]
    return before == " " or (before.isspace() and text[start : start + 1].isspace())
