"""Chats that are written out as one text, in the forms of the usual chat templates.

A text that is wholly in one form is a list of messages, which the model's own template writes
again. A text that is only partly in one would teach a model another model's marks.
"""

import re
from dataclasses import dataclass

# The role of a message, as its form names it, and its content.
Said = tuple[str, str]


@dataclass(frozen=True)
class Form:
    """A form of chats.

    Args:
        name: the form's name.
        sign: what every text in the form contains; it is cheaper to find than a pattern.
        header: the pattern before a turn, with its role as group 1.
        ends: what ends a turn; the last turn of a text may lack it.
        before: the pattern before the first turn, which may have a group `system`.
        needs_end: whether all other turns have an end.
        first: the role that the first turn must have, as the form writes it; "" for any.
        is_marked: whether the form is written with tokens that other texts don't have.
    """

    name: str
    sign: str
    header: re.Pattern[str]
    ends: tuple[str, ...]
    before: re.Pattern[str]
    needs_end: bool
    first: str
    is_marked: bool


def _form(
    name: str,
    sign: str,
    header: str,
    ends: tuple[str, ...],
    before: str = "",
    *,
    needs_end: bool = True,
    first: str = "",
    is_marked: bool = True,
) -> Form:
    start = re.compile(rf"\s*{before}\s*", re.DOTALL)
    return Form(name, sign, re.compile(header), ends, start, needs_end, first, is_marked)


FORMS = (
    _form(
        "ChatML",
        "<|im_start|>",
        r"<\|im_start\|>(\w+)(?:\n|<\|im_sep\|>)",
        ("<|im_end|>", "<|endoftext|>", "</s>"),
        r"(?:<s>|<\|endoftext\|>|<bos>)?",
    ),
    _form(
        "Llama 3",
        "<|start_header_id|>",
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n{0,2}",
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        r"(?:<\|begin_of_text\|>)?",
    ),
    _form(
        "Llama 4",
        "<|header_start|>",
        r"<\|header_start\|>(\w+)<\|header_end\|>\n{0,2}",
        ("<|eot|>", "<|eom|>", "<|end_of_text|>"),
        r"(?:<\|begin_of_text\|>)?",
    ),
    _form(
        "Gemma",
        "<start_of_turn>",
        r"<start_of_turn>(\w+)\n",
        ("<end_of_turn>", "<eos>"),
        r"(?:<bos>)?",
    ),
    _form(
        "Command R",
        "<|START_OF_TURN_TOKEN|>",
        r"<\|START_OF_TURN_TOKEN\|><\|(SYSTEM|USER|CHATBOT)_TOKEN\|>",
        ("<|END_OF_TURN_TOKEN|>",),
        r"(?:<BOS_TOKEN>)?",
    ),
    _form(
        "Zephyr, Phi or GLM",
        "<|user|>",
        r"<\|(system|user|assistant)\|>\n?",
        ("<|end|>", "</s>", "<|endoftext|>"),
        r"(?:<s>|\[gMASK\]<sop>)?",
        needs_end=False,
    ),
    _form(
        "OpenAssistant",
        "<|prompter|>",
        r"<\|(system|prompter|assistant)\|>",
        ("<|endoftext|>", "</s>"),
        needs_end=False,
    ),
    _form(
        "gpt-oss",
        "<|message|>",
        r"<\|start\|>(\w+)(?:<\|channel\|>final)?<\|message\|>",
        ("<|end|>", "<|return|>"),
    ),
    _form(
        "DeepSeek",
        "<｜User｜>",
        r"<｜(User|Assistant)｜>",
        ("<｜end▁of▁sentence｜>",),
        r"(?:<｜begin▁of▁sentence｜>)?(?P<system>.*?)",
        needs_end=False,
    ),
    _form(
        "[INST]",
        "[/INST]",
        r"(?:<s>\s*)?(\[/?INST\])",
        ("</s>",),
        r"(?:<s>)?(?:\s*\[SYSTEM_PROMPT\](?P<system>.*?)\[/SYSTEM_PROMPT\])?",
        needs_end=False,
        first="[INST]",
    ),
    _form(
        "Alpaca",
        "### Response:",
        r"(?m)^### ?(Instruction|Input|Response):",
        ("</s>", "<|endoftext|>", "<|end_of_text|>"),
        r"(?:Below is an instruction[^\n]*)?",
        needs_end=False,
        first="Instruction",
        is_marked=False,
    ),
    _form(
        "### Human",
        "### Human:",
        r"### ?(Human|Assistant):",
        ("</s>", "<|endoftext|>"),
        needs_end=False,
        first="Human",
        is_marked=False,
    ),
    _form(
        "Vicuna",
        "ASSISTANT:",
        r"(?:(?<=\s)|(?<=</s>)|\A)(USER|ASSISTANT):",
        ("</s>",),
        r"(?P<system>A chat between [^\n]*?)?",
        needs_end=False,
        first="USER",
        is_marked=False,
    ),
    _form(
        "Human and Assistant",
        "\n\nHuman:",
        r"\n\n(Human|Assistant):",
        (),
        needs_end=False,
        first="Human",
        is_marked=False,
    ),
)
ENDS = tuple(dict.fromkeys(end for form in FORMS for end in form.ends))
# Marks that no content of a turn has.
MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|begin_of_text|header_start|eot"
    r"|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|start|channel|message|return)\|>"
    r"|<(?:start|end)_of_turn>|<｜(?:User|Assistant)｜>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS)\]"
)
# The roles that have other names in a form than in data.columns.roles.
ROLES = {
    "[INST]": "user",
    "[/INST]": "assistant",
    "Instruction": "user",
    "Response": "assistant",
}
LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


def may_be_chat(text: str) -> bool:
    """Return False for a text without the sign of any form, as most are."""
    return ("<" in text or "[/" in text or "###" in text) or (
        "ASSISTANT:" in text or "\n\nHuman:" in text
    )


def read_text(text: str) -> list[Said]:
    """Return the messages of a text that is wholly in one form, as role and content; else []."""
    for form in FORMS:
        if form.sign in text and (messages := _read(text, form)):
            return messages
    return []


def find_end(text: str) -> str | None:
    """Return the token that ends a text as the answers of a form end; None without one."""
    text = text.rstrip()
    if not text.endswith(ENDS):
        return None
    end = next(end for end in ENDS if text.endswith(end))
    return None if end == "</s>" and "<s>" in text else end  # a text that is struck out


def find_form(text: str) -> str | None:
    """Return the name of the first form of which a text has a whole turn; None without one."""
    for form in FORMS:
        if not form.is_marked or form.sign not in text:
            continue
        turns = list(form.header.finditer(text))
        if form.needs_end:
            is_whole = any(text.find(form.ends[0], turn.end()) >= 0 for turn in turns[:1])
        else:
            is_whole = len(turns) > 1
        if is_whole:
            return form.name
    return None


def _read(text: str, form: Form) -> list[Said]:
    turns = list(form.header.finditer(text))
    if not turns or (form.first and turns[0][1] != form.first):
        return []
    before = form.before.fullmatch(text, 0, turns[0].start())
    if before is None:
        return []
    system = (before.groupdict().get("system") or "").strip()
    if MARKS.search(system):
        return []
    said = [("system", system)] if system else []
    stops = [turn.start() for turn in turns[1:]] + [len(text)]
    for turn, stop in zip(turns, stops, strict=True):
        content, has_end = _without_end(text[turn.end() : stop], form.ends)
        if MARKS.search(content) or (form.needs_end and not has_end and stop < len(text)):
            return []
        if not form.needs_end:
            content = content.strip()
        role = ROLES.get(turn[1], turn[1])
        if form.name == "[INST]" and not said and (parts := LLAMA_2_SYSTEM.fullmatch(content)):
            said.append(("system", parts[1].strip()))
            content = parts[2].strip()
        if role == "Input":  # Alpaca's, which belongs to the question
            if said[-1][0] != "user":
                return []
            said[-1] = ("user", f"{said[-1][1]}\n\n{content}".strip())
        else:
            said.append((role, content))
    return said


def _without_end(content: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    """Return a content without the ends behind it, and whether it had one."""
    has_end = False
    while (stripped := content.rstrip()).endswith(ends) if ends else False:
        end = next(end for end in ends if stripped.endswith(end))
        content, has_end = stripped[: -len(end)], True
    return content, has_end
