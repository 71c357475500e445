"""Probes of a chat template: its end of answers, its thoughts, the messages that it drops."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, Any]

# Words that no template has, to find the contents of messages in its output.
QUESTION, ANSWER, OTHER, TOOL, CALL = "qAsked1", "qAnswered2", "qTold3", "q_tool_4", "qCalled05"
DEFINED, MEANT, GIVEN = "q_defined_6", "qMeant7", "q_given_8"
# Keys under which templates read the thought of a message.
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
# Marks around a thought: <think> and </think>, [THINK] and [/THINK].
OPENER = re.compile(r"[<\[]\w*think\w*[>\]]", re.IGNORECASE)
CLOSER = re.compile(r"[<\[]/\w*think\w*[>\]]", re.IGNORECASE)
PROMPTED = re.compile(rf"{OPENER.pattern}(\s*{CLOSER.pattern})?", re.IGNORECASE)


class NoTemplate(Exception):
    """A conversation for a model without a chat template."""

    def __init__(self) -> None:
        super().__init__(
            "the model has no chat template; choose its instruct version, put a "
            "chat_template.jinja into its folder, or train on plain text"
        )


@lru_cache(maxsize=8)
def find_turn_end(tokenizer: "TokenizerWrapper") -> int | None:
    """Return the token that the chat template writes after an answer; None if it writes none.

    It may differ from the tokenizer's end token: Qwen2.5's base models end texts with
    `<|endoftext|>` and turns with `<|im_end|>`, and a model that learned the latter has to stop
    there.
    """
    if not tokenizer.has_chat_template:
        return None
    text = write_text(_question_and_answer(), {}, tokenizer)
    _, written, behind = text.rpartition(ANSWER)
    after = encode_text(behind, tokenizer) if written else []
    return next((id for id in after if id in tokenizer.added_tokens_decoder), None)


@lru_cache(maxsize=8)
def find_open_thought(tokenizer: "TokenizerWrapper") -> str | None:
    """Return the opening of a thought at the end of the prompt that finished answers lack.

    Some prompts also close it.
    """
    question, answered = _question_and_answer()
    prompt = write_text([question], {}, tokenizer, add_generation_prompt=True)
    text = write_text([question, answered], {}, tokenizer)
    opened = prompt[common_length(prompt, text) :]
    return opened if PROMPTED.fullmatch(opened.strip()) else None


@lru_cache(maxsize=8)
def find_thought_key(tokenizer: "TokenizerWrapper") -> str:
    """Return the key of a message under which the template reads its thought; the first if none."""
    question, answered = _question_and_answer()
    for key in THOUGHT_KEYS:
        with suppress(Exception):  # a chat template may raise any
            if OTHER in write_text([question, answered | {key: OTHER}], {}, tokenizer):
                return key
    return THOUGHT_KEYS[0]


def probe_support(tokenizer: "TokenizerWrapper") -> dict[str, str]:
    """Return how the template treats a system message, earlier turns and tools.

    Each is "kept", "dropped", or "refused: " with the template's reason.
    """
    question, answered = _question_and_answer()
    last = {"role": "user", "content": "?"}
    support = {}
    for name, messages, row, marks in (
        ("system", [{"role": "system", "content": OTHER}, last], {}, [OTHER]),
        ("earlier turns", [question, answered, last], {}, [QUESTION, ANSWER]),
        ("tools", [last], {"tools": [_tool()]}, [TOOL]),
    ):
        try:
            text = write_text(messages, row, tokenizer, add_generation_prompt=True)
            support[name] = "kept" if all(mark in text for mark in marks) else "dropped"
        except Exception as error:  # a chat template may raise any
            support[name] = f"refused: {error}"
    return support


def probe_conversations() -> list[dict[str, Any]]:
    """Return conversations of all kinds as the variables that a template is rendered with.

    The first is a question with its answer.
    """
    question, answered = _question_and_answer()
    system = {"role": "system", "content": OTHER}
    call = {"type": "function", "id": CALL, "function": {"name": TOOL, "arguments": {"a": CALL}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "content": OTHER, "name": TOOL, "tool_call_id": CALL}
    thinking = answered | {"reasoning_content": OTHER}
    thought = answered | {"content": f"<think>\n{OTHER}\n</think>\n\n{ANSWER}"}
    long = {"role": "user", "content": f"{QUESTION} " * 2000}
    turns = [
        [question, answered],
        [question],
        [system, question, answered],
        [question, answered, system, question, answered],
        [question, thought, question, thinking],
        [question, calling, told, answered],
        [answered],
        [long, answered],
        [question, answered] * 20,
    ]
    return [
        {"messages": messages, "tools": tools, "add_generation_prompt": asks, **options}
        for messages in turns
        for tools in (None, [_tool()])
        for asks, options in (
            (False, {}),
            (True, {}),
            (True, {"enable_thinking": False}),
            (True, {"enable_thinking": True}),
        )
    ]


def _tool() -> Message:
    function = {"name": TOOL, "description": "", "parameters": {}}
    return {"type": "function", "function": function}


def _definition(is_wrapped: bool, has_description: bool, has_parameters: bool) -> Message:
    function: Message = {"name": DEFINED}
    if has_description:
        function["description"] = MEANT
    properties = {GIVEN: {"type": "string"}} if has_parameters else {}
    function["parameters"] = {"type": "object", "properties": properties, "required": []}
    return {"type": "function", "function": function} if is_wrapped else function


def _question_and_answer() -> tuple[Message, Message]:
    return {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}


@lru_cache(maxsize=8)
def rewrites_earlier_turns(tokenizer: "TokenizerWrapper") -> bool:
    """Return whether the template writes an earlier answer differently from the last one."""
    question, answered = _question_and_answer()
    for answer in (
        answered,
        answered | {"content": f"<think>\n{OTHER}\n</think>\n\n{ANSWER}"},
        answered | {find_thought_key(tokenizer): OTHER},
    ):
        alone = write_text([question, answer], {}, tokenizer).rstrip()
        try:
            twice = write_text([question, answer, question, answer], {}, tokenizer)
        except Exception:  # the template allows no second question
            return False
        if not twice.startswith(alone):
            return True
    return find_turn_end(tokenizer) is None


@lru_cache(maxsize=1024)
def find_dropped_kind(
    shape: tuple[tuple[str, bool, int], ...],
    tools: tuple[tuple[bool, bool, bool], ...],
    tokenizer: "TokenizerWrapper",
) -> str | None:
    """Name what the template drops of conversations of a shape; None if nothing, or if unknown.

    Args:
        shape: each message's role, whether it has a content, and its number of tool calls.
        tools: for each definition of a tool, whether it stands under "function", has a
            description, and has parameters.
    """
    row: Message = {"tools": [_definition(*kind) for kind in tools]} if tools else {}
    messages: list[Message] = []
    defined = [
        (DEFINED, "the definitions of tools", True),
        (MEANT, "the descriptions of tools", any(has_text for _, has_text, _ in tools)),
        (GIVEN, "the parameters of tools", any(has_parameters for _, _, has_parameters in tools)),
    ]
    marks = []
    for number, (role, has_content, calls) in enumerate(shape, 1):
        message: Message = {"role": role, "content": f"{OTHER}n{number}n" if has_content else ""}
        named = [f"{QUESTION}n{number}n{call}n" for call in range(calls)]
        if calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": CALL,
                    "function": {"name": TOOL, "arguments": {"a": mark}},
                }
                for mark in named
            ]
        if role == "tool":
            message |= {"name": TOOL, "tool_call_id": CALL}
        messages.append(message)
        marks += [(number, message["content"], f"message {number}, of the {role}")]
        marks += [(number, mark, f"the call of a tool in message {number}") for mark in named]
    try:
        text = write_text(messages, row, tokenizer)
        for mark, description, is_there in defined if tools else ():
            if is_there and mark not in text:
                return description
        for number, mark, description in marks:
            # An earlier answer may be whole only in the text where it is the last.
            answer = shape[number - 1][0] == "assistant"
            if mark not in text and not (
                answer and mark in write_text(messages[:number], row, tokenizer)
            ):
                return description
    except Exception:  # a chat template may raise any, and perhaps not for the row itself
        return None
    return None


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts, or of their tokens."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def encode_text(text: str, tokenizer: "TokenizerWrapper") -> list[int]:
    """Return the tokens of a text that already has all special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def write_text(
    messages: Sequence[Message],
    row: Message,
    tokenizer: "TokenizerWrapper",
    add_generation_prompt: bool = False,
) -> str:
    """Return messages as the template writes them, with the tools of their row.

    Raises:
        NoTemplate: where there is none.
        Exception: any that the template raises to refuse them.
    """
    if not tokenizer.has_chat_template:
        raise NoTemplate
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tools=row.get("tools"),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )
