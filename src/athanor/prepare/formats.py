"""Records of every format in one form: {"messages": [{"role", "content"}, …]} or {"text": …}.

Chats may have "tools", rows of a classification keep their "label"; mlx-lm's own loader reads all
of it. Keys that no format names are for the report, and are never trained on.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from jinja2 import TemplateError

from athanor.config.data_check import AUTO, compiled
from athanor.config.schema import DataConfig
from athanor.prepare.checks import Fault
from athanor.prepare.read_rows import parse

# What others call the four roles of a chat template.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


CHAT_KEYS = ("messages", "conversations", "conversation")


IMAGE_KEYS = frozenset(["image", "images", "image_path", "image_url", "image_file"])


KEPT_OF_A_MESSAGE = ("name", "tool_call_id", "reasoning_content")


TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)


Canonical = dict[str, Any]


@dataclass(slots=True)
class Row:
    """A row in the one form.

    `subject` is the text that a classification is about: the label set that its format writes
    beside it is no part of what makes rows alike, and may grow.
    """

    value: Canonical
    format: str
    subject: str | None = None

    def question(self) -> str:
        """What is asked, system messages left out; nothing for plain text and articles."""
        if self.subject is not None:
            return self.subject
        if "text" in self.value:
            return ""
        messages = self.value["messages"]
        return "\n".join(_said(message) for message in messages[:-1] if message["role"] != "system")

    def asked_otherwise(self, change: Callable[[str], str]) -> "Row":
        """The row with its question, or its plain text, changed.

        Only the subject of a question that has one: the rest is the format's. Answers, labels and
        system messages stay: they are what is learned.
        """
        if "text" in self.value:
            return Row({"text": change(self.value["text"])}, self.format)
        subject = None if self.subject is None else change(self.subject)

        def changed(content: str) -> str:
            if self.subject is None or subject is None:
                return change(content)
            return content.replace(self.subject, subject)

        messages = [
            message | {"content": changed(message["content"])}
            if message["role"] == "user"
            else message
            for message in self.value["messages"]
        ]
        return Row(self.value | {"messages": messages}, self.format, subject)

    def answer(self) -> str:
        """What is learned last."""
        return (
            str(self.value["text"]) if "text" in self.value else _said(self.value["messages"][-1])
        )


class Formats:
    """How records become rows, as data's configuration says."""

    def __init__(self, config: DataConfig, labels: list[str]) -> None:
        """`labels` is the label set; templates are checked by `misfits` before."""
        self.config = config
        self.labels = labels
        self._label_prompt = compiled(config.label_prompt)
        self._templates = {
            key: compiled(text) for key, text in dict(config.template).items() if text is not None
        }
        self._by_kind: dict[str, Callable[[Any], Row]] = {
            "chat": self._chat,
            "completions": partial(
                self._pair, config.prompt_feature, config.completion_feature, "completions"
            ),
            "instruction": self._instruction,
            "classification": self._classification,
            "text": self._text,
            "template": self._template,
            "article": self._article,
        }

    def of(self, path: str) -> str:
        """The format that a file is said to have; `auto` if none."""
        if path.lower().endswith(".md"):
            return "article"
        for pattern, name in self.config.formats.items():
            if fnmatch(path.rpartition("/")[2], pattern) or fnmatch(path, pattern):
                return str(name)
        return self.config.format

    def kind(self, value: Any, said: str) -> str:
        """The format of a record: what was said of its file, or what its keys are.

        Raises:
            Fault: not_an_object, image, missing_key.
        """
        if not isinstance(value, dict):
            kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value))
            raise Fault(
                "not_an_object", f"expected a JSON object, found {kind or f'{value!r:.30}'}"
            )
        if not IMAGE_KEYS.isdisjoint(value) and _has_image(value):
            raise _image()
        if said != AUTO:
            return said
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
            text = f"a list of rows under {next(iter(value))!r}: put the list itself into the file"
            raise Fault("missing_key", text)
        expected = (
            f"{config.prompt_feature!r} and {config.completion_feature!r}, "
            f"{config.chat_feature!r}, 'instruction' and 'output', "
            f"{config.text_feature!r} and {config.label_feature!r}, or {config.text_feature!r}"
        )
        found = ", ".join(map(repr, value)) or "no key"
        raise Fault("missing_key", f"expected the keys {expected}; found {found:.200}")

    def row(self, value: dict[str, Any], kind: str) -> Row:
        """A record in the one form.

        Raises:
            Fault: for whatever keeps it from being that.
        """
        return self._by_kind[kind](value)

    def _chat(self, value: dict[str, Any]) -> Row:
        config = self.config
        keys = (config.chat_feature, *CHAT_KEYS)
        key = next((key for key in keys if key in value), config.chat_feature)
        tools = _tools(value["tools"]) if value.get("tools") else []
        chat: Canonical = {"messages": _messages(_parsed(value.get(key)), key, tools)}
        system = value.get("system")
        if isinstance(system, str) and system.strip() and chat["messages"][0]["role"] != "system":
            chat["messages"].insert(0, {"role": "system", "content": system})
        if tools:
            chat["tools"] = tools
        return Row(chat, "chat")

    def _pair(self, prompt: str, completion: str, kind: str, value: dict[str, Any]) -> Row:
        question = _string(value, prompt, "empty_prompt")
        return _asked(value, question, _string(value, completion, "empty_completion"), kind)

    def _instruction(self, value: dict[str, Any]) -> Row:
        question = _string(value, "instruction", "empty_prompt")
        given = value.get("input")
        if given is not None and not isinstance(given, str):
            raise _wrong_type("input", "a text", given)
        if given and given.strip():
            question = f"{question}\n\n{given}"
        answer = _string(value, "output", "empty_completion")
        return _asked(value, question, answer, "instruction")

    def _classification(self, value: dict[str, Any]) -> Row:
        text = _string(value, self.config.text_feature, "empty_text")
        label = label_of(value, self.config.label_feature)
        if self.labels and label not in self.labels:
            there = ", ".join(self.labels[:20])
            raise Fault("unknown_label", f"the label {label!r} is none of {there}")
        question = self._label_prompt.render(text=text, labels=self.labels)
        row = _asked(value, question, label, "classification")
        row.subject = text
        row.value["label"] = label
        return row

    def _text(self, value: dict[str, Any]) -> Row:
        text = _string(value, self.config.text_feature, "empty_text")
        turns = list(TURN.finditer(text)) if text.startswith("<|im_start|>") else []
        if turns and sum(len(turn[0]) for turn in turns) == len(text):
            # A conversation that somebody's template wrote out: taken apart, so that the template
            # of the model at hand writes it, and only the answers are learned.
            messages = [{"role": turn[1], "content": turn[2]} for turn in turns]
            return Row({"messages": _messages(messages, self.config.text_feature, [])}, "text")
        return Row({"text": text}, "text")

    def _template(self, value: dict[str, Any]) -> Row:
        made: dict[str, Any] = {}
        for key, template in self._templates.items():
            try:
                made[key] = template.render(value)
            except TemplateError as error:
                raise Fault("missing_key", f"data.template.{key}: {error.message}") from None
            except Exception as error:  # filters raise what they like about values of other types
                raise Fault("wrong_type", f"data.template.{key}: {error}") from None
        if "text" in made:
            return Row({"text": _string(made, "text", "empty_text")}, "template")
        question = _string(made, "prompt", "empty_prompt")
        return _asked(made, question, _string(made, "completion", "empty_completion"), "template")

    def _article(self, value: dict[str, Any]) -> Row:
        system = {"role": "system", "content": " › ".join(value["path"])}
        text = {"role": "assistant", "content": value["text"]}
        return Row({"messages": [system, text]}, "article")


def without_nulls(value: Any) -> Any:
    """A record without the keys that it says nothing about, as rows of tables have them."""
    if isinstance(value, dict) and None in value.values():
        return {key: said for key, said in value.items() if said is not None}
    return value


def label_of(value: dict[str, Any], key: str) -> str:
    """A record's label as a text.

    Raises:
        Fault: where there is none.
    """
    label = value.get(key)
    if isinstance(label, bool | int):
        return str(label).lower()
    if not isinstance(label, str):
        raise _wrong_type(key, "a label: a text or a whole number", label)
    if not label.strip():
        raise Fault("empty_completion", f"expected a label under {key!r}, found none")
    if any("\ud800" <= character <= "\udfff" for character in label):
        raise Fault("half_character", f"half a character in the label {label!r}")
    return label.strip()


def _asked(value: dict[str, Any], question: str, answer: str, kind: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = value.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return Row({"messages": messages}, kind)


def _string(value: dict[str, Any], key: str, empty: str) -> str:
    text = value.get(key)
    if isinstance(text, str):
        if text and not text.isspace():
            return text
        raise Fault(empty, f"expected a text that is not empty under {key!r}")
    if key not in value:
        raise Fault("missing_key", f"expected the key {key!r}; found {', '.join(map(repr, value))}")
    raise _wrong_type(key, "a text", text)


def _wrong_type(key: str, expected: str, found: Any) -> Fault:
    return Fault("wrong_type", f"expected {expected} under {key!r}, found {found!r:.60}")


def _image() -> Fault:
    return Fault(
        "image",
        "a row with an image: mlx-lm trains language models on text alone; for images there is "
        "mlx-vlm, or describe the picture in words",
    )


def _has_image(value: dict[str, Any]) -> bool:
    return any(value.get(key) for key in IMAGE_KEYS)


def _parsed(value: Any) -> Any:
    """A list or an object that a cell of a table holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            found, end = parse(value.strip())
        except (json.JSONDecodeError, Fault):
            return value
        return found if end == len(value.strip()) else value
    return value


def _messages(given: Any, key: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise _wrong_type(key, "a list of messages", given)
    messages = [_message(message, number, tools) for number, message in enumerate(given, 1)]
    called = False
    for number, message in enumerate(messages, 1):
        called = called or "tool_calls" in message
        if message["role"] == "tool" and not called:
            raise Fault(
                "malformed_tool_call", f"message {number}: a result, and nothing was called"
            )
    if messages[-1]["role"] != "assistant":
        raise Fault("no_answer", "the conversation does not end with an assistant's answer")
    if all(message["role"] == "assistant" for message in messages):
        raise Fault("no_question", "expected a question before the answer, found the answer alone")
    return messages


def without_end(value: dict[str, Any], kind: str, names: DataConfig) -> dict[str, Any]:
    """The record of a chat without the messages after its last answer."""
    keys = (names.text_feature,) if kind == "text" else (names.chat_feature, *CHAT_KEYS)
    key = next(key for key in keys if key in value)
    messages = _parsed(value[key])
    if isinstance(messages, str):
        turns = [turn[0] for turn in TURN.finditer(messages)]
        while turns and not turns[-1].startswith("<|im_start|>assistant"):
            turns.pop()
        return value | {key: "".join(turns)}
    kept = list(messages)
    while kept and ROLES.get(str(kept[-1].get("role", kept[-1].get("from")))) != "assistant":
        kept.pop()
    return value | {key: kept}


def _message(given: Any, number: int, tools: list[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Fault("wrong_type", f"message {number}: expected an object, found {given!r:.60}")
    said = given.get("role", given.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        expected = "a role, one of system, user, assistant, tool"
        raise Fault("unknown_role", f"message {number}: expected {expected}, found {said!r:.60}")
    content = given.get("content", given.get("value"))
    if isinstance(content, list):
        content = _joined_parts(content, number)
    message: dict[str, Any] = {"role": role, "content": content or ""}
    if content is not None and not isinstance(content, str):
        raise Fault("wrong_type", f"message {number}: expected a text, found {content!r:.60}")
    calls = given.get("tool_calls")
    if calls is None and isinstance(given.get("function_call"), dict):
        calls = [given["function_call"]]
    if calls:
        message["tool_calls"] = _calls(calls, number, tools)
    elif role != "tool" and not (content or "").strip():
        name = "empty_completion" if role == "assistant" else "empty_prompt"
        raise Fault(name, f"message {number}: expected a text that is not empty under 'content'")
    for key in KEPT_OF_A_MESSAGE:
        if isinstance(given.get(key), str):
            message[key] = given[key]
    return message


def _joined_parts(parts: list[Any], number: int) -> str:
    texts = []
    for part in parts:
        if isinstance(part, dict) and ("image" in str(part.get("type")) or _has_image(part)):
            raise _image()
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Fault("wrong_type", f"message {number}: expected a text, found {part!r:.60}")
        texts.append(part["text"])
    return "\n".join(texts)


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = _parsed(given)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault(
            "malformed_tool_call", f"tools: expected a list of objects, found {given!r:.60}"
        )
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Fault("malformed_tool_call", f"tool {number}: expected a function with a name")
    return tools


def _calls(given: Any, number: int, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, which is what chat templates write as JSON."""
    where = f"message {number}"
    if not isinstance(given, list) or not all(isinstance(call, dict) for call in given):
        raise Fault(
            "malformed_tool_call", f"{where}: expected a list of calls, found {given!r:.60}"
        )
    names = {tool.get("function", tool)["name"] for tool in tools}
    calls = []
    for call in given:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise Fault("malformed_tool_call", f"{where}: a call without a function's name")
        if names and name not in names:
            there = ", ".join(sorted(names))
            raise Fault("malformed_tool_call", f"{where}: calls {name!r}; tools has {there}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, dict):
            text = f"{where}: expected an object as arguments of {name!r}, found {arguments!r:.60}"
            raise Fault("malformed_tool_call", text)
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def _said(message: dict[str, Any]) -> str:
    if "tool_calls" not in message:
        return str(message["content"])
    return message["content"] + json.dumps(message["tool_calls"], ensure_ascii=False)
