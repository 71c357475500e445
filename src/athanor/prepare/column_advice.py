"""Advice on a file whose columns have no known names: the settings that name them."""

import json
import shlex
from typing import Any

from athanor.prepare.checks import Fault
from athanor.prepare.columns import Columns, is_about

SHOWN = 200
TEMPLATE = "write the prompt and the completion with data.format=template and data.template"
# Words that a command line does not take for names.
VALUES = ("null", "true", "false", "nan", "inf")


def describe_first_row(fault: Fault, value: dict[str, Any], columns: Columns) -> str:
    """Return a sentence with the fault of a file's first row, the row, and what would mend it."""
    row = json.dumps(value, ensure_ascii=False, default=str)
    shown = row if len(row) <= SHOWN else f"{row[:SHOWN]}…"
    return f"{fault.text}; its first row: {shown}; {_advice(value, columns)}"


def _advice(value: dict[str, Any], columns: Columns) -> str:
    """Return the settings that name the columns of a row, guessed from its values."""
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if len(value) == 1 and lists and not _is_chat(value[lists[0]], columns):
        return f"it has a list of rows under {lists[0]!r}; put the list itself into the file"
    for key in lists:
        if _is_chat(value[key], columns):
            return f"if {key!r} has the messages: {_settings(chat_feature=key)}"
    known = columns.parts(value, ("question", "answer", "system", "thought", "tools")).keys
    texts = [key for key, item in value.items() if isinstance(item, str) and not is_about(key)]
    texts = [key for key in texts if key not in known.values()]
    label = columns.parts(value, ("label",)).keys.get("label")
    texts_of_labels = [key for key in texts if key != label]
    if label and texts_of_labels and not {"question", "answer"} & known.keys():
        text = texts_of_labels[0]
        named = _settings(text_feature=text, label_feature=label)
        return f"if {text!r} has the text and {label!r} its label: {named}"
    question = known.get("question") or (texts.pop(0) if texts else None)
    answer = known.get("answer") or (texts.pop(0) if texts else None)
    is_nested = any(isinstance(item, dict | list) for item in value.values())
    if question is None or (answer is None and is_nested):
        return TEMPLATE
    if not all(map(_can_be_named, (question, answer or question))):
        return "rename its columns to prompt and completion, or a text's to text"
    if answer is None:
        return f"if {question!r} is a text to learn: {_settings(text_feature=question)}"
    named = _settings(prompt_feature=question, completion_feature=answer)
    return f"if {question!r} has the question and {answer!r} the answer: {named}"


def _is_chat(item: Any, columns: Columns) -> bool:
    return (
        isinstance(item, list)
        and bool(item)
        and all(isinstance(m, dict) and columns.parts(m, ("role",)).keys for m in item)
    )


def _settings(**names: str) -> str:
    """Return settings as they are written on a command line, and in conf/data."""
    words = [f"data.{key}={_quoted(name)}" for key, name in names.items()]
    lines = [f"{key}: {json.dumps(name, ensure_ascii=False)}" for key, name in names.items()]
    line = " ".join(map(_shell, words))
    return f"{line} (in conf/data/default.yaml: {', '.join(lines)})"


def _can_be_named(name: str) -> bool:
    """Return False for a name that no setting holds as it is."""
    return bool(name.strip()) and name.isprintable() and "${" not in name and "\\" not in name


def _quoted(name: str) -> str:
    """Return a name as a value of Hydra's grammar, which takes plain words as they are."""
    if name.isidentifier() and name.lower() not in VALUES:
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _shell(word: str) -> str:
    return word if word.replace("=", "").replace(".", "").isidentifier() else shlex.quote(word)
