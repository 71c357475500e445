"""Every error has a message, and every message is some error's."""

import ast
import re
from collections import defaultdict
from pathlib import Path
from string import Formatter

from athanor import errors

CODE = re.compile(r"[a-z_]+\.[a-z0-9_]+")


def test_messages_name_the_facts_of_their_errors(repo: Path) -> None:
    package = repo / "src/athanor"
    raised: dict[str, list[set[str]]] = defaultdict(list)
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if function not in ("UserError", "__init__", "Problem", "rule"):
                continue
            assert isinstance(node, ast.Call)
            first = node.args[0] if node.args else None
            code = str(first.value) if isinstance(first, ast.Constant) else ""
            if CODE.fullmatch(code):
                raised[code].append(facts_of(node))
            elif function == "UserError":
                raise AssertionError(f"{path}:{node.lineno}: expected a code and its facts")
    texts = {
        f"{room}.{name}": text
        for room, messages in errors.messages().items()
        for name, text in messages.items()
    }
    assert raised.keys() == texts.keys()
    for code, text in texts.items():
        named = {field for _, field, _, _ in Formatter().parse(text) if field}
        for facts in raised[code]:
            assert named <= facts, code


def facts_of(call: ast.Call) -> set[str]:
    """Return the names of a call's facts; a rule's check adds the value."""
    facts = {str(keyword.arg) for keyword in call.keywords} | {"value"}
    for argument in call.args:
        if isinstance(argument, ast.Dict):
            facts |= {str(key.value) for key in argument.keys if isinstance(key, ast.Constant)}
    return facts
