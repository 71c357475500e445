"""The part of Go's text/template that fuse/go_template.py writes, for tests without Go.

After https://pkg.go.dev/text/template: text, fields, variables, `range` over a list or a number,
`if` with `else if`, `break`, `define` and `template`, strings, numbers, and seven functions.
test_export_ollama.py has the same templates read by Go itself where `go` is on the PATH.
"""

import ast
import re
from typing import Any

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|:=|[()=,]|[^\s()=,"]+')
Node = tuple[Any, ...]


class Break(Exception):
    """`{{ break }}`."""


def execute(template: str, data: dict[str, Any]) -> str:
    """Return the text that a template writes; strings are cut by bytes, as Go's are."""
    pieces = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    nodes = iter([(i % 2 == 1, piece) for i, piece in enumerate(pieces)])
    defined: dict[str, list[Node]] = {}
    body, end = _block(nodes, defined)
    assert end == [], f"unexpected {end}"
    return _run(body, data, {"$": data}, defined).decode()


def _block(nodes: Any, defined: dict[str, list[Node]]) -> tuple[list[Node], list[str]]:
    """Nodes up to an `end` or `else`, and the words of that action."""
    found: list[Node] = []
    for is_action, piece in nodes:
        if not is_action:
            found.append(("text", piece))
            continue
        words = TOKEN.findall(piece)
        match words[0]:
            case "end" | "else":
                return found, words
            case "if":
                found.append(_if(words[1:], nodes, defined))
            case "range":
                body, _ = _block(nodes, defined)
                found.append(("range", words[1:], body))
            case "define":
                defined[ast.literal_eval(words[1])], _ = _block(nodes, defined)
            case _:
                found.append(("action", words))
    return found, []


def _if(condition: list[str], nodes: Any, defined: dict[str, list[Node]]) -> Node:
    body, end = _block(nodes, defined)
    otherwise: list[Node] = []
    if end[:2] == ["else", "if"]:
        otherwise = [_if(end[2:], nodes, defined)]
    elif end[0] == "else":
        otherwise, _ = _block(nodes, defined)
    return ("if", condition, body, otherwise)


def _run(body: list[Node], dot: Any, scope: dict[str, Any], defined: dict[str, Any]) -> bytes:
    out = b""
    for node in body:
        match node:
            case ("text", text):
                out += text.encode()
            case ("action", ["break"]):
                raise Break
            case ("action", ["template", name, *argument]):
                value = _value(argument, dot, scope)
                out += _run(defined[ast.literal_eval(name)], value, {"$": value}, defined)
            case ("action", [variable, ":=" | "=", *expression]):
                scope[variable] = _value(expression, dot, scope)
            case ("action", expression):
                value = _value(expression, dot, scope)
                out += value if isinstance(value, bytes) else str(value).encode()
            case ("if", condition, then, otherwise):
                out += _run(
                    then if _value(condition, dot, scope) else otherwise, dot, scope, defined
                )
            case ("range", words, inside):
                names, _, over = _partition(words)
                values = _value(over, dot, scope)
                pairs = enumerate(range(values) if isinstance(values, int) else values)
                for index, item in pairs:
                    scope.update(zip(names, (index, item), strict=False))
                    try:
                        out += _run(inside, item, scope, defined)
                    except Break:
                        break
    return out


def _partition(words: list[str]) -> tuple[list[str], str, list[str]]:
    if ":=" not in words:
        return [], "", words
    at = words.index(":=")
    return [word for word in words[:at] if word != ","], ":=", words[at + 1 :]


def _value(words: list[str], dot: Any, scope: dict[str, Any]) -> Any:
    value, rest = _call(words, dot, scope)
    assert rest == [], f"not understood: {words}"
    return value


def _call(words: list[str], dot: Any, scope: dict[str, Any]) -> tuple[Any, list[str]]:
    """A function with its arguments, or one operand."""
    functions: dict[str, Any] = {
        "eq": lambda first, *others: first in others,
        "len": len,
        "not": lambda value: not value,
        "index": lambda values, at: values[at],
        "slice": lambda values, start, end=None: values[start:end],
        "and": lambda *values: next((v for v in values if not v), values[-1]),
    }
    if words[0] not in functions:
        return _operand(words, dot, scope)
    arguments, rest = [], words[1:]
    while rest and rest[0] != ")":
        argument, rest = _operand(rest, dot, scope)
        arguments.append(argument)
    return functions[words[0]](*arguments), rest


def _operand(words: list[str], dot: Any, scope: dict[str, Any]) -> tuple[Any, list[str]]:
    first, rest = words[0], words[1:]
    if first == "(":
        value, [closing, *rest] = _call(rest, dot, scope)
        assert closing == ")"
        if rest and rest[0].startswith("."):  # a field of what is in brackets
            value, rest = value[rest[0][1:]], rest[1:]
    elif first[0] in '".$':
        value = _named(first, dot, scope)
    else:
        value = {"true": True, "false": False}.get(first)
        value = int(first) if value is None else value
    return value.encode() if isinstance(value, str) else value, rest


def _named(word: str, dot: Any, scope: dict[str, Any]) -> Any:
    if word[0] == '"':
        return ast.literal_eval(word)
    if word == ".":
        return dot
    start, _, name = word.partition(".")
    value = scope[start] if start else dot
    return value.get(name) if name else value
