"""The code's form: short modules, thin commands, plain names. Ruff's D401 holds the docstrings."""

import ast
import re
from pathlib import Path

# A docstring says what a thing does or is; these begin a question.
QUESTIONS = re.compile(r"(What|Whether|How|Where|Which)\b")


def sources(repo: Path) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in (repo / "src").rglob("*.py")}


def test_modules_are_short(repo: Path) -> None:
    for path, text in sources(repo).items():
        most = 80 if path.name == "__main__.py" else 400
        assert len(text.splitlines()) <= most, path


def test_names_say_what_they_hold(repo: Path) -> None:
    assert sum(len(re.findall(r"\bfound\b", text)) for text in sources(repo).values()) < 40


def test_docstrings_ask_no_question(repo: Path) -> None:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    for path, text in sources(repo).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                assert not QUESTIONS.match(ast.get_docstring(node) or ""), (path, node)
