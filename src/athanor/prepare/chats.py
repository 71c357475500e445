"""Conversations in the notations that people have them in, as turns.

OpenAI's messages and parts, ShareGPT's `from` and `value`, Anthropic's blocks, Gemini's contents.
What a message holds that a turn has no place for is named in `Reading.unread`.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from athanor.chat.conversation import Call, Tool, Turn
from athanor.prepare.checks import Fault
from athanor.prepare.columns import Columns, Layout, fold, is_about, is_empty
from athanor.prepare.tool_calls import (
    TAGGED_ANSWER,
    parse_cell,
    read_calls,
    take_tagged_calls,
)

SPEAKERS = ("user", "assistant")
EMPTY = ("empty_prompt", "empty_completion")
IMAGE_KEYS = frozenset(["image", "images", "image_path", "image_url", "image_file"])
MESSAGE = ("role", "content", "thought")
CALLS = frozenset(["toolcalls", "functioncall"])
# The keys of parts of messages: OpenAI's, Anthropic's, Gemini's.
PART_KEYS_TEXT = """
type text thinking reasoning thought signature thoughtSignature thought_signature
id name input tool_use_id content is_error functionCall function_call functionResponse
function_response image image_url inlineData inline_data fileData file_data
"""
PART_KEYS = frozenset(PART_KEYS_TEXT.split())
# Whether a message is learned: under these names by 1 or true, under MASKS by 0 or false.
LEARNED = frozenset(
    [
        *("weight", "train", "trainable", "training", "trainonturn", "learn"),
        *("loss", "lossmask", "lossweight", "lossscale"),
    ]
)
MASKS = frozenset(["mask", "masked", "ismasked"])
SWITCHES = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
SWITCHES |= {"1.0": True, "0.0": False}


@dataclass(slots=True)
class Reading:
    """The findings of reading a record.

    Args:
        columns: the names of columns and roles.
        fixes: the names of the faults that are mended.
        unread: the keys that no conversation carries, as a person reads them.
        faults: the faults that leave the record a row.
        fixed: the faults that were mended.
        mask: the key and the value of the row's mask, which tells what is learned of it.
    """

    columns: Columns
    fixes: frozenset[str] = frozenset()
    unread: dict[str, None] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    fixed: list[Fault] = field(default_factory=list)
    mask: tuple[str, Any] | None = None

    def is_empty(self) -> bool:
        """Return whether nothing was found yet."""
        return not (self.unread or self.faults or self.fixed or self.mask)

    def fix(self, fault: Fault) -> None:
        """Count a fault as mended.

        Raises:
            Fault: the fault, where data.checks does not have it mended.
        """
        if fault.name not in self.fixes:
            raise fault
        self.fixed.append(fault)


def read_turns(value: Any, key: str, tools: list[Tool], reading: Reading) -> list[Turn]:
    """Return the turns of a list of messages, which stands under `key` of its record.

    Raises:
        Fault: for a message that is not one.
    """
    messages = parse_cell(value)
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not messages:
        raise wrong_type(key, "a list of messages", value)
    turns: list[Turn] = []
    numbers: list[int] = []
    for number, message in enumerate(messages, 1):
        for turn in _turns(message, number, tools, reading):
            is_call = bool(turn.calls) and not turn.content
            last = turns[-1] if turns else None
            if is_call and last and last.calls and not turn.thought and turn.weight == last.weight:
                last.calls = [*last.calls, *turn.calls]  # calls side by side are one turn's
            else:
                turns.append(turn)
                numbers.append(number)
    if reading.mask is not None:
        apply_mask(turns, numbers, len(messages), reading)
    return turns


def check_order(turns: list[Turn], reading: Reading) -> None:
    """Check that turns are a conversation; turns behind its last answer are a fault to mend.

    An answer that a tool's result follows may have its calls in its text, as Hermes writes them.

    Raises:
        Fault: no_answer, no_question, malformed_tool_call.
    """
    called = False
    for number, turn in enumerate(turns, 1):
        last = turns[number - 2] if number > 1 else turn
        if turn.role == "tool" and last.role == "assistant" and not last.calls:
            take_tagged_calls(last, f"message {number - 1}", reading.unread)
            called = called or bool(last.calls)
        if turn.role == "tool" and (answer := TAGGED_ANSWER.fullmatch(turn.content)):
            turn.content = answer[1]
        called = called or bool(turn.calls)
        if turn.role == "tool" and not called:
            text = (
                f"message {number}: a tool's result without a call before it; calls are read from "
                "tool_calls, or a message of the role function_call"
            )
            raise Fault("malformed_tool_call", text)
    if not turns or turns[-1].role != "assistant":
        fault = Fault("no_answer", "the conversation does not end with an assistant's answer")
        if all(turn.role != "assistant" for turn in turns):
            raise fault
        reading.fix(fault)
        while turns[-1].role != "assistant":
            turns.pop()
    if all(turn.role == "assistant" for turn in turns):
        raise Fault("no_question", "the conversation has an answer but no question")


def is_history(value: Any, columns: Columns) -> bool:
    """Return True for a list of exchanges: pairs, or objects with a question and an answer."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return isinstance(first, list)
    return len(columns.parts(first, ("question", "answer")).keys) == 2


def read_history(value: Any, key: str, tools: list[Tool], reading: Reading) -> list[Turn]:
    """Return the earlier turns of a row: pairs of question and answer, or messages.

    Raises:
        Fault: for a history that is neither.
    """
    history = parse_cell(value)
    if not isinstance(history, list):
        raise wrong_type(key, "a list of pairs", value)
    if history and all(isinstance(each, dict) for each in history):
        pairs = [reading.columns.parts(each, ("question", "answer")).keys for each in history]
        if not all(len(keys) == 2 for keys in pairs):
            return read_turns(history, key, tools, reading)
        history = [
            [each[k["question"]], each[k["answer"]]] for each, k in zip(history, pairs, strict=True)
        ]
    turns = []
    for number, pair in enumerate(history, 1):
        if not (isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]):
            text = f"exchange {number}: expected a question and an answer, found {pair!r:.60}"
            raise Fault("wrong_type", f"{key!r}, {text}")
        for role, text, check in zip(SPEAKERS, pair, EMPTY, strict=True):
            if not text.strip():
                raise Fault(check, f"{key!r}, exchange {number}: no text of the {role}")
            turns.append(Turn(role, text))  # type: ignore[arg-type]
    return turns


def read_system(value: Any, reading: Reading) -> Turn:
    """Return the system message of a row: a text, or a message.

    Raises:
        Fault: wrong_type.
    """
    message = value if isinstance(value, dict) else {"content": value}
    return _turns({**message, "role": "system"}, 0, [], reading)[-1]


def apply_mask(turns: list[Turn], numbers: list[int], count: int, reading: Reading) -> None:
    """Apply a row's mask to its turns: a value for the row, for each message, or each answer.

    `numbers` are those of the turns' messages, of which there were `count`.
    """
    key, mask = reading.mask or ("", None)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    values = parse_cell(mask)
    values = values if isinstance(values, list) else [values] * count
    if len(values) == count:
        values = [values[numbers[i] - 1] for i in answers]
    if len(values) != len(answers):
        text = f"{len(values)} values under {key!r}; {count} messages, {len(answers)} answers"
        raise Fault("wrong_type", text)
    for i, value in zip(answers, values, strict=True):
        if read_switch(value, key, f"message {numbers[i]}") == (fold(key) in MASKS):
            turns[i].weight = 0


@dataclass
class _Parts:
    """The content of a message by kind, and the tools' answers inside it."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    answers: list[Turn] = field(default_factory=list)


def _turns(value: Any, number: int, tools: list[Tool], reading: Reading) -> list[Turn]:
    """Return the turn of a message; before it those of tools whose answers are in its parts."""
    where = f"message {number}" if number else "the system message"
    if not isinstance(value, dict):
        raise Fault("wrong_type", f"{where}: expected an object, found {value!r:.60}")
    layout = reading.columns.parts(value, MESSAGE)
    name = value.get(layout.keys.get("role", "role"))
    role = reading.columns.role(name)
    if role is None:
        text = f"expected system, user, assistant or tool as role, found {name!r:.60}"
        raise Fault("unknown_role", f"{where}: {text}")
    written = value.get(layout.keys.get("content", "content"))
    is_plain = role != "call" and not layout.rest and "thought" not in layout.keys
    if is_plain and isinstance(written, str) and (written.strip() or role not in SPEAKERS):
        return [Turn(role, written)]  # type: ignore[arg-type]
    parts = _Parts()
    calls: list[Call] = []
    if role == "call":
        role, calls = "assistant", read_calls(written, where, tools, reading.unread)
    else:
        _read_content(written, role, where, parts, reading)
    content = "\n".join(parts.texts)
    turn = Turn(role, content, calls)  # type: ignore[arg-type]
    if layout.rest or "thought" in layout.keys:
        _read_more(value, layout, turn, parts, tools, where, reading)
    if parts.thoughts:
        turn.thought = "\n".join(parts.thoughts)
    if parts.calls:
        turn.calls = [*turn.calls, *read_calls(parts.calls, where, tools, reading.unread)]
    elif parts.answers and not content.strip():
        return parts.answers
    elif not turn.calls and role in SPEAKERS and not content.strip():
        check = "empty_completion" if role == "assistant" else "empty_prompt"
        raise Fault(check, f"{where}: no text under {layout.keys.get('content', 'content')!r}")
    return [*parts.answers, turn]


def _read_content(written: Any, role: str, where: str, parts: _Parts, reading: Reading) -> None:
    """Sort the content of a message into `parts`."""
    if isinstance(written, str):
        parts.texts.append(written)
        return
    if isinstance(written, dict) and isinstance(written.get("parts"), list):
        written = written["parts"]
    if isinstance(written, dict) and ("text" in written or "type" in written):
        written = [written]
    is_content = isinstance(written, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and not PART_KEYS.isdisjoint(part))
        for part in written
    )
    if role == "tool" and isinstance(written, dict | list) and not is_content:
        parts.texts.append(json.dumps(written, ensure_ascii=False))
    elif isinstance(written, list):
        for part in written:
            _read_part(part, where, parts, reading)
    elif written is not None:
        raise Fault("wrong_type", f"{where}: expected a text, found {written!r:.60}")


def _read_part(part: Any, where: str, parts: _Parts, reading: Reading) -> None:
    """Add one part of a message: a text, a thought, a call, or a tool's answer."""
    if isinstance(part, str):
        parts.texts.append(part)
        return
    if isinstance(part, dict) and _shows_something(part):
        raise image_fault()
    unreadable = Fault("wrong_type", f"{where}: expected a text, found {part!r:.60}")
    if not isinstance(part, dict):
        raise unreadable
    kind = part.get("type")
    call = part.get("functionCall", part.get("function_call"))
    answer = part.get("functionResponse", part.get("function_response"))
    if isinstance(call, dict) or kind == "tool_use":
        parts.calls.append(call if isinstance(call, dict) else part)
        return
    if isinstance(answer, dict):
        text = json.dumps(answer.get("response"), ensure_ascii=False)
        parts.answers.append(Turn("tool", text, name=_text_of(answer, "name")))
    elif kind == "tool_result":
        inside = _Parts()
        _read_content(part.get("content"), "tool", where, inside, reading)
        text = "\n".join(inside.texts)
        link = _text_of(part, "tool_use_id")
        parts.answers.append(Turn("tool", text, tool_call_id=link))
    elif kind in ("thinking", "reasoning") or part.get("thought") is True:
        thoughts = (part.get(key) for key in ("thinking", "reasoning", "text"))
        parts.thoughts.append(next((text for text in thoughts if isinstance(text, str)), ""))
    elif isinstance(part.get("text"), str):
        parts.texts.append(part["text"])
    else:
        raise unreadable
    for key in part.keys() - PART_KEYS:
        if not is_about(key) and not is_empty(part[key]):
            reading.unread[f"{key!r} of a part of a message"] = None


def _read_more(
    value: dict[str, Any],
    layout: Layout,
    turn: Turn,
    parts: _Parts,
    tools: list[Tool],
    where: str,
    reading: Reading,
) -> None:
    """Read what a message has beside its role and content."""
    is_answer = turn.role == "assistant"
    for key in (*layout.rest, *([layout.keys["thought"]] if "thought" in layout.keys else ())):
        item, name = value[key], fold(key)
        if is_empty(item):
            continue
        if is_answer and name in CALLS and not turn.calls:
            turn.calls = read_calls(item, where, tools, reading.unread)
        elif name == "name" and isinstance(item, str):
            turn.name = item
        elif name == "toolcallid" and isinstance(item, str):
            turn.tool_call_id = item
        elif name in LEARNED or name in MASKS:
            if read_switch(item, key, where) == (name in MASKS) and is_answer:
                turn.weight = 0
        elif is_answer and key == layout.keys.get("thought") and isinstance(item, str):
            parts.thoughts.append(item)
        else:
            reading.unread[f"{key!r} of a message"] = None


def read_switch(value: Any, key: str, where: str) -> bool:
    """Return whether a value says that a turn is learned.

    Raises:
        Fault: wrong_type.
    """
    switch = SWITCHES.get(value.strip().lower()) if isinstance(value, str) else value
    if switch is None or switch not in (0, 1):
        text = f"{where}: expected 0 or 1 under {key!r}, found {value!r:.60}"
        raise Fault("wrong_type", f"{text}; a turn is learned or it is not")
    return bool(switch)


def _text_of(value: dict[str, Any], key: str) -> str | None:
    text = value.get(key)
    return text if isinstance(text, str) else None


def has_image(value: dict[str, Any]) -> bool:
    """Return True where a record, or a part of a message, has an image."""
    return any(value.get(key) for key in IMAGE_KEYS)


def _shows_something(part: dict[str, Any]) -> bool:
    is_file = any(key in part for key in ("inlineData", "inline_data", "fileData", "file_data"))
    return is_file or "image" in str(part.get("type")) or has_image(part)


def image_fault() -> Fault:
    """Return the fault of a record with an image."""
    return Fault(
        "image",
        "the row has an image, and mlx-lm trains on text alone; use mlx-vlm for images, or "
        "describe the picture in words",
    )


def wrong_type(key: str, expected: str, value: Any) -> Fault:
    """Return the fault of a value that has another type than its key needs."""
    text = f"expected {expected} under {key!r}, found {value!r:.60}"
    if expected == "a text" and type(value) in (int, float):
        text += f'; write it as a text: "{value}"'
    return Fault("wrong_type", text)
