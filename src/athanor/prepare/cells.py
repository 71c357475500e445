"""Texts in the columns of a record: questions, contexts, answers.

A prompt or a completion may also be a list of messages, an answer the one text of a list.
"""

from typing import Any

from athanor.prepare.chats import wrong_type
from athanor.prepare.checks import Fault

ROLE_KEYS = frozenset(["role", "from", "speaker"])


def messages_of(item: Any) -> list[Any] | None:
    """Return the messages of a prompt or completion that is a conversation; None for others."""
    if isinstance(item, dict) and isinstance(item.get("messages"), list):
        item = item["messages"]
    messages = [item] if isinstance(item, dict) else item
    if not isinstance(messages, list) or not messages:
        return None
    is_chat = all(isinstance(each, dict) and ROLE_KEYS & each.keys() for each in messages)
    return messages if is_chat else None


def read_context(value: dict[str, Any], keys: dict[str, str]) -> str:
    """Return the context of a question: a text, or texts one below the other."""
    if "context" not in keys:
        return ""
    context = value[keys["context"]]
    texts = context if isinstance(context, list) else [context]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise wrong_type(keys["context"], "a text", context)
    return "\n\n".join(text for text in texts if text.strip())


def read_answer(item: Any, key: str) -> str:
    """Return the answer of a row; one that stands in a list alone, as in SQuAD, counts."""
    answers = item.get("text") if isinstance(item, dict) else item
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        different = list(dict.fromkeys(answers))
        if len(different) > 1:
            text = f"expected one answer under {key!r}, found {len(different)}"
            raise Fault("wrong_type", text)
        answers = different[0] if different else ""
    if not isinstance(answers, str):
        raise wrong_type(key, "a text", item)
    return not_blank(answers, key, "empty_completion")


def read_string(value: dict[str, Any], key: str, empty: str) -> str:
    """Return the text under a key.

    Raises:
        Fault: wrong_type, or `empty` for a text without characters.
    """
    text = value.get(key)
    if not isinstance(text, str):
        raise wrong_type(key, "a text", text)
    return not_blank(text, key, empty)


def not_blank(text: str, key: str, empty: str) -> str:
    """Return a text; raise the fault `empty` for one without characters."""
    if not text or text.isspace():
        raise Fault(empty, f"no text under {key!r}")
    return text
