"""Every error has a message, and every message is some error's."""

import ast
import re
from collections import defaultdict
from pathlib import Path
from string import Formatter

from athanor import errors

CODE = re.compile(r"[a-z_]+\.[a-z0-9_]+")
# Rooms that still write their sentences where they raise them.
SENTENCES = {
    "chat", "compute", "config", "device", "diff", "files", "fuse", "generate", "model",
    "prepare", "reproduce", "runs", "synthesize", "test", "ui",
}  # fmt: skip


def test_messages_name_the_facts_of_their_errors(repo: Path) -> None:
    package = repo / "src/athanor"
    raised: dict[str, list[set[str]]] = defaultdict(list)
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("UserError"):
                continue
            code = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ""
            if CODE.fullmatch(code):
                raised[code].append({str(keyword.arg) for keyword in node.keywords})
            else:
                assert room in SENTENCES, f"{path}:{node.lineno}: expected a code and its facts"
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
