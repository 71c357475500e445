"""Tools and their calls, in the notations of OpenAI, ShareGPT, Anthropic, Gemini and Hermes."""

import json
import re
from typing import Any

from athanor.chat.conversation import Call, Function, Tool, Turn
from athanor.prepare.checks import Fault
from athanor.prepare.columns import is_about, is_empty
from athanor.prepare.json_values import parse

ARGUMENTS = ("arguments", "parameters", "args", "input")
KEYS_OF_A_CALL = frozenset(["function", "id", "type", "index", "name", *ARGUMENTS])
KEYS_OF_A_FUNCTION = frozenset(["name", *ARGUMENTS])
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
TAGGED_ANSWER = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
DECLARATIONS = ("functionDeclarations", "function_declarations")


def read_tools(value: Any) -> list[Tool]:
    """Return the tools that a conversation offers, each with a function that has a name.

    Raises:
        Fault: malformed_tool_call.
    """
    tools = parse_cell(value)
    tools = [tools] if isinstance(tools, dict) else tools
    tools = [parse_cell(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        text = f"tools: expected a list of objects, found {value!r:.60}"
        raise Fault("malformed_tool_call", text)
    tools = [each for tool in tools for each in _declared(tool)]
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault("malformed_tool_call", f"tool {number}: expected a function with a name")
    return tools


def _declared(tool: Tool) -> list[Tool]:
    """Return a tool as OpenAI writes it: Gemini's are lists, Anthropic's have an input_schema."""
    for key in DECLARATIONS:
        if isinstance(functions := tool.get(key), list):
            return [{"type": "function", "function": function} for function in functions]
    if "input_schema" in tool and "name" in tool:
        function = {
            ("parameters" if key == "input_schema" else key): value
            for key, value in tool.items()
            if key not in ("type", "cache_control")
        }
        return [{"type": "function", "function": function}]
    return [tool]


def read_calls(value: Any, where: str, tools: list[Tool], unread: dict[str, None]) -> list[Call]:
    """Return the calls of a message; keys that no call has are added to `unread`.

    Raises:
        Fault: malformed_tool_call; `where` says of which message.
    """
    tagged = TAGGED.findall(value) if isinstance(value, str) else []
    calls = [parse_cell(text) for text in tagged] if tagged else parse_cell(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        text = f"{where}: expected a list of calls, found {value!r:.60}"
        raise Fault("malformed_tool_call", text)
    names = {tool.get("function", tool)["name"] for tool in tools}
    return [_call(call, where, names, unread) for call in calls]


def take_tagged_calls(turn: Turn, where: str, unread: dict[str, None]) -> None:
    """Make calls of what a turn's text has in tags of calls.

    Raises:
        Fault: malformed_tool_call.
    """
    if TAGGED.search(turn.content):
        turn.calls = read_calls(turn.content, where, [], unread)
        turn.content = TAGGED.sub("", turn.content).strip()


def _call(call: dict[str, Any], where: str, names: set[str], unread: dict[str, None]) -> Call:
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise Fault("malformed_tool_call", f"{where}: a call without a function's name")
    if names and name not in names:
        offered = ", ".join(sorted(names))
        text = f"{where}: calls {name!r}, but tools offers only {offered}"
        raise Fault("malformed_tool_call", text)
    key = next((key for key in ARGUMENTS if key in function), None)
    written = function[key] if key else None
    arguments = parse_cell(written)
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}
    if not isinstance(arguments, dict):
        text = f"{where}: expected an object as arguments of {name!r}, found {arguments!r:.60}"
        raise Fault("malformed_tool_call", text)
    for part, known in ((call, KEYS_OF_A_CALL), (function, KEYS_OF_A_FUNCTION | KEYS_OF_A_CALL)):
        for other in part.keys() - known:
            if not is_about(other) and not is_empty(part[other]):
                unread[f"{other!r} of a call"] = None
    return Call(Function(name, arguments), call["id"] if isinstance(call.get("id"), str) else None)


def parse_cell(value: Any) -> Any:
    """Return the list or object that a table's cell holds as JSON; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            parsed, end = parse(value.strip())
        except (json.JSONDecodeError, Fault):
            return value
        return parsed if end == len(value.strip()) else value
    return value
