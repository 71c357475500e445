"""Rows of training data: read from data/*.jsonl, checked, and brought into one form.

One form for all: {"messages": [{"role", "content"}, …]} for chats and for prompt and completion,
{"text": …} for plain text. mlx-lm's own loader reads both.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.console import UserError
from athanor.paths import SPLITS
from athanor.schema import DataConfig

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """A row in the one form, and where it was written."""

    value: dict[str, Any]
    where: str


def read(folder: Path, names: DataConfig) -> dict[str, list[Row]]:
    """Reads train.jsonl, valid.jsonl and test.jsonl; the last may be missing.

    Raises:
        UserError: with every bad row of every file.
    """
    problems: list[str] = []
    splits: dict[str, list[Row]] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        before = len(problems)
        splits[split] = _read_file(path, names, problems) if path.exists() else []
        if split != "test" and not path.exists():
            there = ", ".join(sorted(found.name for found in folder.glob("*"))) or "nothing"
            problems.append(
                f"{path}: missing; {folder} holds {there} "
                "(`uv run dvc pull data.dvc` brings the rows that data.dvc names)"
            )
        elif split != "test" and not splits[split] and len(problems) == before:
            problems.append(f"{path}: no row in it")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"data: {count}; nothing was prepared\n  " + "\n  ".join(problems))
    return splits


def _read_file(path: Path, names: DataConfig, problems: list[str]) -> list[Row]:
    rows: list[Row] = []
    kinds: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            value, kind = _one_form(json.loads(text), names)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            problems.append(
                f"{where}: not valid JSON, one object a line: {error.msg} (column {error.colno})"
            )
            continue
        except UnicodeEncodeError:
            problems.append(f"{where}: half a character (a lone surrogate, as of a cut emoji)")
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: {error}")
            continue
        kinds.setdefault(kind, number)
        rows.append(Row(value, where))
    if len(kinds) > 1:
        found = " and ".join(f"{kind} (line {number})" for kind, number in kinds.items())
        problems.append(f"{path}: expected one format in a file, found {found}")
    return rows


def _one_form(row: Any, names: DataConfig) -> tuple[dict[str, Any], str]:
    """The row in the one form, and the name of the format it had; ValueError says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    prompt, completion = names.prompt_feature, names.completion_feature
    if names.chat_feature in row:
        messages = _messages(row[names.chat_feature], names.chat_feature)
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": messages, **tools}, "chat"
    if prompt in row or completion in row:
        for key in (prompt, completion):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"expected a text that is not empty under {key!r}")
        return {
            "messages": [
                {"role": "user", "content": row[prompt]},
                {"role": "assistant", "content": row[completion]},
            ]
        }, "completions"
    if names.text_feature in row:
        text = row[names.text_feature]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected a text that is not empty under {names.text_feature!r}")
        return {"text": text}, "text"
    expected = (
        f"{prompt!r} and {completion!r}, or {names.chat_feature!r}, or {names.text_feature!r}"
    )
    found = ", ".join(map(repr, row)) or "no key"
    raise ValueError(f"expected the keys {expected}; found {found}")


def _messages(messages: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages under {key!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number}: expected a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        said = isinstance(content, str) and (content.strip() or message["role"] == "tool")
        if not said and not message.get("tool_calls"):
            raise ValueError(f"message {number}: expected a text that is not empty under 'content'")
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with an assistant's answer")
    if len(messages) == 1:
        raise ValueError("expected a question before the answer, found the answer alone")
    # Templates read `content` of every message, also where a tool is called instead.
    return [message | {"content": message.get("content") or ""} for message in messages]
