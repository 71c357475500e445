"""Conversations in the notations that people have them in, as turns."""

import json
import re
from typing import Any

from athanor.chat.conversation import Call, Function, Message, Role, Tool, Turn
from athanor.config.schema import DataConfig
from athanor.prepare.checks import Fault
from athanor.prepare.read_json import parse

# The four roles of a chat template by the names that other notations give them.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
CHAT_KEYS = ("messages", "conversations", "conversation")
IMAGE_KEYS = frozenset(["image", "images", "image_path", "image_url", "image_file"])
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


def read_messages(value: Any, key: str, tools: list[Tool]) -> list[Turn]:
    """Return the turns of a conversation, which stands under `key` of its record.

    Raises:
        Fault: for a conversation that is not one, or teaches no answer.
    """
    if not isinstance(value, list) or not value:
        raise wrong_type(key, "a list of messages", value)
    turns = [_turn(message, number, tools) for number, message in enumerate(value, 1)]
    called = False
    for number, turn in enumerate(turns, 1):
        called = called or bool(turn.calls)
        if turn.role == "tool" and not called:
            text = f"message {number}: a tool's result without a call before it"
            raise Fault("malformed_tool_call", text)
    if turns[-1].role != "assistant":
        raise Fault("no_answer", "the conversation does not end with an assistant's answer")
    if all(turn.role == "assistant" for turn in turns):
        raise Fault("no_question", "the conversation has an answer but no question")
    return turns


def written_out(text: str) -> list[Message]:
    """Return the messages of a text that is a conversation in ChatML from end to end, else []."""
    turns = list(TURN.finditer(text)) if text.startswith("<|im_start|>") else []
    if sum(len(turn[0]) for turn in turns) != len(text):
        return []
    return [{"role": turn[1], "content": turn[2]} for turn in turns]


def without_end(value: dict[str, Any], kind: str, config: DataConfig) -> dict[str, Any]:
    """Return the record of a chat without the messages after its last answer."""
    keys = (config.text_feature,) if kind == "text" else (config.chat_feature, *CHAT_KEYS)
    key = next(key for key in keys if key in value)
    messages = parse_cell(value[key])
    if isinstance(messages, str):
        turns = [turn[0] for turn in TURN.finditer(messages)]
        while turns and not turns[-1].startswith("<|im_start|>assistant"):
            turns.pop()
        return value | {key: "".join(turns)}
    kept = list(messages)
    while kept and ROLES.get(str(kept[-1].get("role", kept[-1].get("from")))) != "assistant":
        kept.pop()
    return value | {key: kept}


def _turn(value: Any, number: int, tools: list[Tool]) -> Turn:
    if not isinstance(value, dict):
        raise Fault("wrong_type", f"message {number}: expected an object, found {value!r:.60}")
    name = value.get("role", value.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        text = f"expected system, user, assistant or tool as role, found {name!r:.60}"
        raise Fault("unknown_role", f"message {number}: {text}")
    content = value.get("content", value.get("value"))
    if isinstance(content, list):
        content = _join_parts(content, number)
    if content is not None and not isinstance(content, str):
        raise Fault("wrong_type", f"message {number}: expected a text, found {content!r:.60}")
    turn = Turn(role, content or "")
    if value.get("weight") == 0:
        turn.weight = 0
    calls = value.get("tool_calls")
    if calls is None and isinstance(value.get("function_call"), dict):
        calls = [value["function_call"]]
    if calls:
        turn.calls = _calls(calls, number, tools)
    elif role not in ("tool", "system") and not (content or "").strip():
        check = "empty_completion" if role == "assistant" else "empty_prompt"
        raise Fault(check, f"message {number}: no text under 'content'")
    turn.name = _text_of(value, "name")
    turn.tool_call_id = _text_of(value, "tool_call_id")
    turn.thought = _text_of(value, "reasoning_content") or ""
    return turn


def _text_of(value: dict[str, Any], key: str) -> str | None:
    text = value.get(key)
    return text if isinstance(text, str) else None


def _join_parts(parts: list[Any], number: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, dict) and ("image" in str(part.get("type")) or has_image(part)):
            raise image_fault()
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Fault("wrong_type", f"message {number}: expected a text, found {part!r:.60}")
        texts.append(part["text"])
    return "\n".join(texts)


def read_tools(value: Any) -> list[Tool]:
    """Return the tools that a conversation offers, each with a function that has a name.

    Raises:
        Fault: malformed_tool_call.
    """
    tools = parse_cell(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        text = f"tools: expected a list of objects, found {value!r:.60}"
        raise Fault("malformed_tool_call", text)
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault("malformed_tool_call", f"tool {number}: expected a function with a name")
    return tools


def _calls(value: Any, number: int, tools: list[Tool]) -> list[Call]:
    where = f"message {number}"
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        text = f"{where}: expected a list of calls, found {value!r:.60}"
        raise Fault("malformed_tool_call", text)
    names = {tool.get("function", tool)["name"] for tool in tools}
    calls = []
    for call in value:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise Fault("malformed_tool_call", f"{where}: a call without a function's name")
        if names and name not in names:
            offered = ", ".join(sorted(names))
            text = f"{where}: calls {name!r}, but tools offers only {offered}"
            raise Fault("malformed_tool_call", text)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_cell(arguments)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            text = f"{where}: expected an object as arguments of {name!r}, found {arguments!r:.60}"
            raise Fault("malformed_tool_call", text)
        calls.append(Call(Function(name, arguments), _text_of(call, "id")))
    return calls


def parse_cell(value: Any) -> Any:
    """Return the list or object that a table's cell holds as JSON; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            parsed, end = parse(value.strip())
        except (json.JSONDecodeError, Fault):
            return value
        return parsed if end == len(value.strip()) else value
    return value


def has_image(value: dict[str, Any]) -> bool:
    """Return True where a record, or a part of a message, has an image."""
    return any(value.get(key) for key in IMAGE_KEYS)


def image_fault() -> Fault:
    """Return the fault of a record with an image."""
    return Fault(
        "image",
        "the row has an image, and mlx-lm trains on text alone; use mlx-vlm for images, or "
        "describe the picture in words",
    )


def wrong_type(key: str, expected: str, value: Any) -> Fault:
    """Return the fault of a value that has another type than its key needs."""
    return Fault("wrong_type", f"expected {expected} under {key!r}, found {value!r:.60}")
