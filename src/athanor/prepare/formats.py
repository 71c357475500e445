"""Records of every format as conversations.

Columns have the names that data's configuration gives them. A key that the conversation does not
carry is named in `Reading.unread`, once for all formats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from jinja2 import TemplateError
from msgspec.structs import replace

from athanor.chat.conversation import Conversation, Tool, Turn, chat
from athanor.config.data_check import AUTO, compile_template, variables
from athanor.config.schema import DataConfig
from athanor.prepare import text_forms
from athanor.prepare.cells import messages_of, not_blank, read_answer, read_context, read_string
from athanor.prepare.chats import (
    IMAGE_KEYS,
    LEARNED,
    MASKS,
    SWITCHES,
    Reading,
    apply_mask,
    check_order,
    has_image,
    image_fault,
    is_history,
    read_history,
    read_system,
    read_turns,
    wrong_type,
)
from athanor.prepare.checks import Fault
from athanor.prepare.columns import Columns, Layout, fold, is_empty
from athanor.prepare.preference import find_preference, is_mark, without_rejected
from athanor.prepare.records import is_utf8
from athanor.prepare.tool_calls import read_tools

# Rows of these kinds are never preference data.
NO_ANSWERS = ("text", "classification", "template", "article")
ROW_MASKS = ("lossmask", "trainmask")
# Names of the column in which pandas numbers the rows of a table.
INDEXES = ("", "unnamed:0")


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
        self.columns = Columns(config)
        self._label_prompt = compile_template(config.label_prompt)
        texts = {key: text for key, text in dict(config.template).items() if text is not None}
        self._templates = {key: compile_template(text) for key, text in texts.items()}
        self._variables = frozenset(name for text in texts.values() for name in variables(text))
        self._by_kind: dict[str, Callable[[dict[str, Any], Layout, Reading], Row]] = {
            "chat": self._chat,
            "completions": self._exchange,
            "instruction": self._exchange,
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

    def layout(self, value: Any, configured: str) -> Layout:
        """Return a record's layout: of the configured format, or of the one its columns tell.

        Raises:
            Fault: not_an_object, image.
        """
        if not isinstance(value, dict):
            kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value))
            text = f"expected a JSON object, found {kind or f'{value!r:.30}'}"
            if isinstance(value, list) and any(isinstance(item, dict) for item in value):
                text += "; name a file that is one list of rows .json"
            raise Fault("not_an_object", text)
        if not IMAGE_KEYS.isdisjoint(value) and has_image(value):
            raise image_fault()
        return self.columns.layout(value, configured)

    def row(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        """Return a record as a row.

        Raises:
            Fault: for a record that does not have its format.
        """
        if not layout.rest and layout.kind is not None:  # as most rows are
            return self._by_kind[layout.kind](value, layout, reading)
        if layout.kind not in NO_ANSWERS and (fault := find_preference(value)):
            reading.fix(fault)
            kept = without_rejected(value, self.columns)
            if kept is None:
                raise fault
            value, layout = kept, self.columns.layout(kept, AUTO)
        if layout.kind is None:
            expected = "a question and an answer, a conversation, or a text"
            raise missing(value, expected, "the names in data.columns")
        mask = next((key for key in layout.rest if _is_mask(key, value[key])), None)
        reading.mask = None if mask is None or is_empty(value[mask]) else (mask, value[mask])
        row = self._by_kind[layout.kind](value, layout, reading)
        for key in layout.rest:
            item = value[key]
            if key != mask and not is_empty(item) and not self._is_read(key, item, layout.kind):
                reading.unread[repr(key)] = None
        return row

    def _is_read(self, key: str, item: Any, kind: str | None) -> bool:
        """Return whether a format reads a key that stands for none of its columns."""
        if kind == "template":
            return key in self._variables
        if fold(key) in INDEXES and str(item).isdecimal():
            return True
        return kind == "article" or (kind not in NO_ANSWERS and is_mark(key, item))

    def _chat(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        keys = layout.keys
        if "chat" not in keys:
            raise missing(value, "a conversation", repr(self.config.chat_feature))
        tools = _tools(value, keys)
        read = read_history if is_history(value[keys["chat"]], self.columns) else read_turns
        turns = read(value[keys["chat"]], keys["chat"], tools, reading)
        check_order(turns, reading)
        system = self._system(value, keys, reading)
        if not turns or turns[0].role != "system":
            turns = system + turns
        elif system and system[0].content != turns[0].content:
            reading.unread[repr(keys["system"])] = None
        _add_thought(value, keys, turns, reading)
        return Row(Conversation(turns, tools), "chat")

    def _exchange(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        keys = layout.keys
        for meaning, name in (("question", "prompt"), ("answer", "completion")):
            if meaning not in keys:
                raise missing(value, f"a {name}", repr(self.columns.settings[meaning]))
        question, answer = value[keys["question"]], value[keys["answer"]]
        if len(keys) == 2 and isinstance(question, str) and isinstance(answer, str):
            is_marked = text_forms.may_be_chat(question) and bool(answer.strip())
            if is_marked and (turns := _written_out(question + answer, keys["question"], reading)):
                return Row(Conversation(turns), str(layout.kind))
            turns = [  # as most rows are: without the searches below
                Turn("user", not_blank(question, keys["question"], "empty_prompt")),
                Turn("assistant", not_blank(answer, keys["answer"], "empty_completion")),
            ]
            if reading.mask is not None:
                apply_mask(turns, [1, 2], 2, reading)
            return Row(Conversation(turns), str(layout.kind))
        mask, reading.mask = reading.mask, None
        tools = _tools(value, keys)
        if messages := messages_of(answer):
            turns = read_turns(messages, keys["answer"], tools, reading)
        else:
            turns = [Turn("assistant", read_answer(answer, keys["answer"]))]
        if turns[0].role == "assistant":
            turns = self._asked(value, keys, tools, reading) + turns
        elif question != next((t.content for t in turns if t.role == "user"), None):
            reading.unread[repr(keys["question"])] = None
        if "history" in keys and not is_empty(value[keys["history"]]):
            turns = read_history(value[keys["history"]], keys["history"], tools, reading) + turns
        check_order(turns, reading)
        system = self._system(value, keys, reading)
        turns = turns if turns[0].role == "system" else system + turns
        _add_thought(value, keys, turns, reading)
        if mask is not None:
            reading.mask = mask
            apply_mask(turns, list(range(1, len(turns) + 1)), len(turns), reading)
        return Row(Conversation(turns, tools), str(layout.kind))

    def _asked(
        self, value: dict[str, Any], keys: dict[str, str], tools: list[Tool], reading: Reading
    ) -> list[Turn]:
        """Return the question of a row with its context, or the turns before its answer."""
        key = keys["question"]
        if messages := messages_of(value[key]):
            return read_turns(messages, key, tools, reading)
        question = value[key]
        if not isinstance(question, str):
            raise wrong_type(key, "a text", question)
        context = read_context(value, keys)
        if context and question.strip():
            question = f"{question}\n\n{context}"
        return [
            Turn("user", not_blank(question if question.strip() else context, key, "empty_prompt"))
        ]

    def _system(self, value: dict[str, Any], keys: dict[str, str], reading: Reading) -> list[Turn]:
        """Return the system message that has a column of its own; one without a text is a fault."""
        system = value.get(keys.get("system", ""))
        if isinstance(system, str) and not system.strip():
            reading.fix(Fault("empty_system", f"no text under {keys['system']!r}"))
            return []
        return [] if is_empty(system) else [read_system(system, reading)]

    def _classification(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        keys = layout.keys
        for meaning in ("text", "label"):
            if meaning not in keys:
                raise missing(value, f"a {meaning}", repr(self.columns.settings[meaning]))
        text = read_string(value, keys["text"], "empty_text")
        label = label_of(value, keys["label"])
        if self.labels and label not in self.labels:
            known = ", ".join(self.labels[:20])
            raise Fault("unknown_label", f"unknown label {label!r}; expected one of {known}")
        question = self._label_prompt.render(text=text, labels=self.labels)
        turns = [*self._system(value, keys, reading), Turn("user", question)]
        row = Conversation([*turns, Turn("assistant", label)], label=label)
        return Row(row, "classification", text)

    def _text(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        if "text" not in layout.keys:
            raise missing(value, "a text", repr(self.config.text_feature))
        key = layout.keys["text"]
        text = read_string(value, key, "empty_text")
        # The model's own template writes a chat again, and only its answers are learned.
        if text_forms.may_be_chat(text) and (turns := _written_out(text, key, reading)):
            return Row(Conversation(turns), "text")
        return Row(Conversation(text=text), "text")

    def _template(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        fields: dict[str, Any] = {}
        for key, template in self._templates.items():
            try:
                fields[key] = template.render(value)
            except TemplateError as error:
                text = f"data.template.{key}: {error.message}; the row has {', '.join(value)}"
                raise Fault("missing_key", text[:300]) from None
            except Exception as error:  # filters raise anything for values of other types
                raise Fault("wrong_type", f"data.template.{key}: {error}") from None
        if "text" in fields:
            text = read_string(fields, "text", "empty_text")
            return Row(Conversation(text=text), "template")
        question = read_string(fields, "prompt", "empty_prompt")
        answer = read_string(fields, "completion", "empty_completion")
        has_system = bool(fields.get("system", "").strip())
        system = self._system(fields, {"system": "system"}, reading) if has_system else []
        turns = [*system, Turn("user", question), Turn("assistant", answer)]
        return Row(Conversation(turns), "template")

    def _article(self, value: dict[str, Any], layout: Layout, reading: Reading) -> Row:
        title = " › ".join(value["path"])
        return Row(chat(("system", title), ("assistant", value["text"])), "article")


def _is_mask(key: str, item: Any) -> bool:
    """Return True for a row's key that tells what is learned of it."""
    name = fold(key)
    is_named = name in LEARNED or name in MASKS
    return name in ROW_MASKS or (is_named and str(item).strip().lower() in SWITCHES)


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


def _written_out(text: str, key: str, reading: Reading) -> list[Turn]:
    """Return the turns of a text that is a chat in one form; else [], and a part of one is a fault.

    Raises:
        Fault: for a chat that teaches no answer.
    """
    if messages := text_forms.read_text(text):
        said = [{"role": role, "content": content} for role, content in messages]
        turns = read_turns(said, key, [], reading)
        check_order(turns, reading)
        return turns
    if (form := text_forms.find_form(text)) is not None:
        reading.faults.append(Fault("mixed_text", f"turns in the form of {form}, and other text"))
    return []


def _tools(value: dict[str, Any], keys: dict[str, str]) -> list[Tool]:
    tools = value.get(keys.get("tools", ""))
    return [] if is_empty(tools) or tools == "null" else read_tools(tools)


def _add_thought(
    value: dict[str, Any], keys: dict[str, str], turns: list[Turn], reading: Reading
) -> None:
    """Give the last answer the thought that has a column of its own."""
    key = keys.get("thought", "")
    if is_empty(thought := value.get(key)):
        return
    if isinstance(thought, str) and turns and not turns[-1].thought:
        turns[-1].thought = thought
    elif thought != turns[-1].thought:
        reading.unread[repr(key)] = None


def missing(value: dict[str, Any], expected: str, names: str) -> Fault:
    """Return the fault of a record without a column that its format needs."""
    keys = ", ".join(map(repr, value)) or "none"
    return Fault("missing_key", f"expected {expected} under {names}; found {keys:.200}")
