"""Records of every format as conversations.

Keys that no format names are for the report, and are never trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from jinja2 import TemplateError
from msgspec.structs import replace

from athanor.chat.conversation import Conversation, Turn, chat
from athanor.config.data_check import AUTO, compile_template
from athanor.config.schema import DataConfig
from athanor.prepare.chats import (
    CHAT_KEYS,
    IMAGE_KEYS,
    has_image,
    image_fault,
    parse_cell,
    read_messages,
    read_tools,
    written_out,
    wrong_type,
)
from athanor.prepare.checks import Fault
from athanor.prepare.records import is_utf8


@dataclass(slots=True)
class Row:
    """A conversation, and the format of its record.

    `subject` is the text that a classification is about. Rows are compared by it, without the
    label set that the format adds, which may grow.
    """

    conversation: Conversation
    format: str
    subject: str | None = None

    def question(self) -> str:
        """Return what is asked, or the subject of a classification."""
        return self.conversation.question() if self.subject is None else self.subject

    def reworded(self, change: Callable[[str], str]) -> "Row":
        """Return the row with its question, or its plain text, changed.

        Of a classification, only the subject changes. Answers, labels and system messages stay.
        """
        row = self.conversation
        if row.text is not None:
            return Row(replace(row, text=change(row.text)), self.format)
        subject = None if self.subject is None else change(self.subject)

        def changed(content: str) -> str:
            if self.subject is None or subject is None:
                return change(content)
            return content.replace(self.subject, subject)

        turns = [
            replace(turn, content=changed(turn.content)) if turn.role == "user" else turn
            for turn in row.turns
        ]
        return Row(replace(row, turns=turns), self.format, subject)


class Formats:
    """The ways from records to rows, as data's configuration chooses them."""

    def __init__(self, config: DataConfig, labels: list[str]) -> None:
        """Prepare for rows with these labels; the configuration's check has seen the templates."""
        self.config = config
        self.labels = labels
        self._label_prompt = compile_template(config.label_prompt)
        self._templates = {
            key: compile_template(text)
            for key, text in dict(config.template).items()
            if text is not None
        }
        self._by_kind: dict[str, Callable[[Any], Row]] = {
            "chat": self._chat,
            "completions": self._pair,
            "instruction": self._instruction,
            "classification": self._classification,
            "text": self._text,
            "template": self._template,
            "article": self._article,
        }

    def of_file(self, path: str) -> str:
        """Return the format that the configuration gives a file; `auto` if none."""
        if path.lower().removesuffix(".gz").endswith((".md", ".txt")):
            return "article"
        for pattern, name in self.config.formats.items():
            if fnmatch(path.rpartition("/")[2], pattern) or fnmatch(path, pattern):
                return str(name)
        return self.config.format

    def kind(self, value: Any, configured: str) -> str:
        """Return a record's format: the configured one of its file, or the one its keys tell.

        Raises:
            Fault: not_an_object, image, missing_key.
        """
        if not isinstance(value, dict):
            kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value))
            raise Fault(
                "not_an_object", f"expected a JSON object, found {kind or f'{value!r:.30}'}"
            )
        if not IMAGE_KEYS.isdisjoint(value) and has_image(value):
            raise image_fault()
        if configured != AUTO:
            return configured
        config = self.config
        if config.chat_feature in value or any(key in value for key in CHAT_KEYS):
            return "chat"
        if "instruction" in value:
            return "instruction"
        if config.prompt_feature in value or config.completion_feature in value:
            return "completions"
        if config.text_feature in value:
            return "classification" if config.label_feature in value else "text"
        if len(value) == 1 and isinstance(next(iter(value.values())), list):
            text = f"a list of rows under {next(iter(value))!r}; put the list itself into the file"
            raise Fault("missing_key", text)
        expected = (
            f"{config.prompt_feature!r} and {config.completion_feature!r}, "
            f"{config.chat_feature!r}, 'instruction' and 'output', "
            f"{config.text_feature!r} and {config.label_feature!r}, or {config.text_feature!r}"
        )
        keys = ", ".join(map(repr, value)) or "none"
        raise Fault("missing_key", f"expected the keys {expected}; found {keys:.200}")

    def row(self, value: dict[str, Any], kind: str) -> Row:
        """Return a record in the one form.

        Raises:
            Fault: for a record that does not have its format.
        """
        return self._by_kind[kind](value)

    def _chat(self, value: dict[str, Any]) -> Row:
        config = self.config
        keys = (config.chat_feature, *CHAT_KEYS)
        key = next((key for key in keys if key in value), config.chat_feature)
        tools = read_tools(value["tools"]) if value.get("tools") else []
        turns = read_messages(parse_cell(value.get(key)), key, tools)
        system = value.get("system")
        if isinstance(system, str) and system.strip() and turns[0].role != "system":
            turns.insert(0, Turn("system", system))
        return Row(Conversation(turns, tools), "chat")

    def _pair(self, value: dict[str, Any]) -> Row:
        question = _string(value, self.config.prompt_feature, "empty_prompt")
        answer = _string(value, self.config.completion_feature, "empty_completion")
        return _exchange(value, question, answer, "completions")

    def _instruction(self, value: dict[str, Any]) -> Row:
        question = _string(value, "instruction", "empty_prompt")
        text = value.get("input")
        if text is not None and not isinstance(text, str):
            raise wrong_type("input", "a text", text)
        if text and text.strip():
            question = f"{question}\n\n{text}"
        answer = _string(value, "output", "empty_completion")
        return _exchange(value, question, answer, "instruction")

    def _classification(self, value: dict[str, Any]) -> Row:
        text = _string(value, self.config.text_feature, "empty_text")
        label = label_of(value, self.config.label_feature)
        if self.labels and label not in self.labels:
            known = ", ".join(self.labels[:20])
            raise Fault("unknown_label", f"unknown label {label!r}; expected one of {known}")
        question = self._label_prompt.render(text=text, labels=self.labels)
        row = _exchange(value, question, label, "classification")
        row.subject = text
        row.conversation.label = label
        return row

    def _text(self, value: dict[str, Any]) -> Row:
        text = _string(value, self.config.text_feature, "empty_text")
        if messages := written_out(text):
            # The model's own template writes it again, and only its answers are learned.
            turns = read_messages(messages, self.config.text_feature, [])
            return Row(Conversation(turns), "text")
        return Row(Conversation(text=text), "text")

    def _template(self, value: dict[str, Any]) -> Row:
        fields: dict[str, Any] = {}
        for key, template in self._templates.items():
            try:
                fields[key] = template.render(value)
            except TemplateError as error:
                raise Fault("missing_key", f"data.template.{key}: {error.message}") from None
            except Exception as error:  # filters raise anything for values of other types
                raise Fault("wrong_type", f"data.template.{key}: {error}") from None
        if "text" in fields:
            text = _string(fields, "text", "empty_text")
            return Row(Conversation(text=text), "template")
        question = _string(fields, "prompt", "empty_prompt")
        answer = _string(fields, "completion", "empty_completion")
        return _exchange(fields, question, answer, "template")

    def _article(self, value: dict[str, Any]) -> Row:
        title = " › ".join(value["path"])
        return Row(chat(("system", title), ("assistant", value["text"])), "article")


def without_nulls(value: Any) -> Any:
    """Return a record without the keys that are null, as in rows of tables."""
    if isinstance(value, dict) and None in value.values():
        return {key: item for key, item in value.items() if item is not None}
    return value


def label_of(value: dict[str, Any], key: str) -> str:
    """Return a record's label as a text.

    Raises:
        Fault: where it has none.
    """
    label = value.get(key)
    if isinstance(label, bool | int):
        return str(label).lower()
    if not isinstance(label, str):
        raise wrong_type(key, "a label: a text or a whole number", label)
    if not label.strip():
        raise Fault("empty_completion", f"no label under {key!r}")
    if not is_utf8(label):
        raise Fault("half_character", f"a lone surrogate in the label {label!r}")
    return label.strip()


def _exchange(value: dict[str, Any], question: str, answer: str, kind: str) -> Row:
    turns = [Turn("user", question), Turn("assistant", answer)]
    system = value.get("system")
    if isinstance(system, str) and system.strip():
        turns.insert(0, Turn("system", system))
    return Row(Conversation(turns), kind)


def _string(value: dict[str, Any], key: str, empty: str) -> str:
    text = value.get(key)
    if isinstance(text, str):
        if text and not text.isspace():
            return text
        raise Fault(empty, f"no text under {key!r}")
    if key not in value:
        raise Fault("missing_key", f"expected the key {key!r}; found {', '.join(map(repr, value))}")
    raise wrong_type(key, "a text", text)
