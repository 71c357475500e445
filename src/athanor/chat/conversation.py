"""A row as it is learned: a typed conversation, or a plain text, and its line of JSON.

Every format is read into this, and everything after the readers works on this alone. The line is
the one that mlx-lm's own loader reads: {"messages": [{"role", "content", …}, …], "tools": […]} or
{"text": …}. A message that is context and not learned has "weight": 0 there, as OpenAI writes it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
Message = dict[str, Any]
Tool = dict[str, Any]


class Function(msgspec.Struct):
    """The function that a call names, and its arguments as an object."""

    name: str
    arguments: dict[str, Any]


class Call(msgspec.Struct, tag_field="type", tag="function", omit_defaults=True):
    """A call of a tool; `id` links it to the tool's answer."""

    function: Function
    id: str | None = None


class Turn(
    msgspec.Struct,
    omit_defaults=True,
    rename={"calls": "tool_calls", "thought": "reasoning_content"},
):
    """A turn of a conversation.

    Args:
        role: who speaks.
        content: the text, "" for a call alone.
        calls: the calls of tools, of an assistant's turn.
        name: the tool that answers, or another name of the speaker.
        tool_call_id: the call that a tool answers.
        thought: the reasoning before the text, "" for none.
        weight: 0 for an assistant's turn that is context and not learned.
    """

    role: Role
    content: str
    calls: list[Call] = []
    name: str | None = None
    tool_call_id: str | None = None
    thought: str = ""
    weight: Literal[0, 1] = 1

    @property
    def learned(self) -> bool:
        """Return whether the model is to learn this turn."""
        return self.role == "assistant" and self.weight == 1

    def message(self) -> Message:
        """Return the message that a chat template is given."""
        if not (self.calls or self.name or self.tool_call_id or self.thought):
            return {"role": self.role, "content": self.content}
        message: Message = msgspec.to_builtins(self)
        message.pop("weight", None)
        return message

    def spoken(self) -> str:
        """Return the text of the turn with its calls of tools, whose ids mean nothing."""
        if not self.calls:
            return self.content
        calls = (
            f"{call.function.name} {msgspec.json.encode(call.function.arguments).decode()}"
            for call in self.calls
        )
        return "\n".join(filter(None, [self.content, *calls]))


class Conversation(msgspec.Struct, omit_defaults=True, rename={"turns": "messages"}):
    """A row: turns of which the last one is an answer to be learned, or a plain text.

    Args:
        turns: the turns; none for plain text.
        tools: the definitions of tools that the model is offered.
        label: the label of a classification's row.
        text: the plain text; None for a conversation.
    """

    turns: list[Turn] = []
    tools: list[Tool] = []
    label: str | None = None
    text: str | None = None

    @classmethod
    def of(cls, row: Message) -> "Conversation":
        """Return the conversation of a row in the form of its line of JSON.

        Raises:
            msgspec.ValidationError: where it has another form.
        """
        return msgspec.convert(row, cls)

    def line(self) -> str:
        """Return the line of JSON.

        Raises:
            UnicodeEncodeError: for a lone surrogate.
            TypeError: for a value that JSON does not have; ValueError likewise.
        """
        return msgspec.json.encode(self).decode()

    def texts(self) -> list[str]:
        """Return the texts of all turns, or the plain text."""
        return [self.text] if self.text is not None else [turn.content for turn in self.turns]

    def question(self) -> str:
        """Return what is asked, earlier turns included; "" for plain text and articles."""
        return "\n".join(turn.spoken() for turn in self.turns[:-1] if turn.role != "system")

    def system(self) -> str:
        """Return the system messages, "" for none."""
        return "\n".join([turn.content for turn in self.turns if turn.role == "system"])

    def answer(self) -> str:
        """Return the last answer with its calls of tools, or the plain text."""
        return self.text if self.text is not None else self.turns[-1].spoken()

    def map_texts(self, change: Callable[[str], str]) -> "Conversation":
        """Return the conversation with each text and its label changed; calls and tools stay."""
        if self.text is not None:
            return msgspec.structs.replace(self, text=change(self.text))
        turns = [msgspec.structs.replace(turn, content=change(turn.content)) for turn in self.turns]
        label = None if self.label is None else turns[-1].content
        return msgspec.structs.replace(self, turns=turns, label=label)

    def map_strings(self, change: Callable[[str], str]) -> "Conversation":
        """Return the conversation with each of its strings changed, keys of arguments included."""
        return Conversation.of(_map_strings(msgspec.to_builtins(self), change))


def chat(*turns: tuple[Role, str], tools: Iterable[Tool] = ()) -> Conversation:
    """Return a conversation of roles and texts."""
    return Conversation([Turn(role, content) for role, content in turns], list(tools))


def read_line(line: str) -> Conversation:
    """Return the conversation of a line of JSON that `prepare` wrote."""
    return _LINES.decode(line)


_LINES = msgspec.json.Decoder(Conversation)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return value
