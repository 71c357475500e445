"""The fixed pieces of a chat template, seen in conversations of known texts.

The pieces between these texts have to write what the template writes for further conversations, or
the template has no such pieces.
"""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from athanor.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Turn = dict[str, str]


@dataclass(frozen=True)
class Pieces:
    """The texts of a chat template around contents: before and after, by role.

    A system message has a turn of its own, opens the first question, or opens the last (`place`);
    in the second case its first text includes the opening of that question. None: the template
    drops it.
    """

    start: str
    no_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str
    system: tuple[str, str] | None = None
    place: Literal["turn", "first", "last"] = "turn"
    trimmed: frozenset[str] = field(default=frozenset())
    # Earlier answers are written without their thoughts, which end with "</think>".
    cuts_thoughts: bool = False
    # The text that closes the thought at once, where the template can be told not to think.
    no_thought: str = ""


def derive_pieces(tokenizer: "TokenizerWrapper", name: str) -> Pieces:
    """Return the pieces of a tokenizer's chat template, checked against the template itself.

    Raises:
        UserError: with the conversation that the pieces write in a different way.
    """
    pieces = _find_pieces(tokenizer, name)
    for messages in sample_conversations(pieces):
        expected = render(messages, tokenizer)
        if expected is None:
            continue  # the template refuses it, which Ollama's can't
        text = assemble(pieces, messages)
        if text != expected:
            raise UserError(
                "fuse.template_without_pieces",
                model=name,
                conversation=json.dumps(messages, ensure_ascii=False),
                expected=expected,
                text=text,
            )
    return pieces


def render(messages: list[Turn], tokenizer: "TokenizerWrapper", **options: Any) -> str | None:
    """Return the prompt that the chat template writes, None if it refuses the conversation.

    A first token that the tokenizer itself puts before every text is left out.
    """
    options = {"add_generation_prompt": True} | options
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # a chat template may raise any
        return None
    return text.removeprefix(str(tokenizer.bos_token)) if puts_bos(tokenizer) else text


def assemble(pieces: Pieces, messages: list[Turn]) -> str:
    """Return the prompt that the pieces write; a system message is the first or there is none."""
    around = {"system": pieces.system, "user": pieces.user, "assistant": pieces.assistant}
    has_system = messages[0]["role"] == "system"
    text = pieces.start + ("" if has_system else pieces.no_system)
    for place, message in enumerate(messages):
        role = message["role"]
        before, after = around[role] or ("", "")
        if role == "system" and (pieces.system is None or pieces.place == "last"):
            continue
        if role == "user" and pieces.system and has_system:
            if pieces.place == "first" and place == 1:
                before = ""
            if pieces.place == "last" and message is messages[-1]:
                opens, closes = pieces.system
                before += opens + _content(messages[0], pieces) + closes
        text += before + _content(message, pieces) + after
    return text + pieces.ask


def sample_conversations(pieces: Pieces) -> list[list[Turn]]:
    """Return conversations that the template and its pieces have to write alike.

    Ollama takes thoughts out of answers before a TEMPLATE sees them; here that is the chat
    template's work, on answers as a program other than Ollama keeps them.
    """
    texts = [
        "Hello",
        "月亮哪天最圆？\n请回答。",
        " \n leading and trailing \n\n",
        'say "no", \'yes\', """this""" and {{ .Content }} {% if %} {"a": {"b": 1}}}',
        "line one\r\n\tline two",
        "<b>x</b> & <|x|> [INST] </s> 🙂",
    ]
    samples = []
    for i, text in enumerate(texts):
        other, last = texts[(i + 1) % len(texts)], texts[(i + 2) % len(texts)]
        answer = f"<think>{other}</think>{last}" if pieces.cuts_thoughts else last
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": other},
            {"role": "user", "content": last},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": text},
        ]
        system = [{"role": "system", "content": text}]
        for count in (1, 3, 5):
            samples += [turns[:count], *([system + turns[:count]] if pieces.system else [])]
    if pieces.system and pieces.place == "turn":
        samples.append([{"role": "system", "content": "alone"}])
    return samples


def _find_pieces(tokenizer: "TokenizerWrapper", name: str) -> Pieces:
    """Find the pieces around texts that the template cannot know."""
    texts = ["uno1dos", "ans1wer", "uno2dos", "ans2wer", "uno3dos"]
    roles = ["user", "assistant"] * 3
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    parts = _split_at(render(turns, tokenizer), texts)
    if parts is None:
        raise UserError("fuse.template_hides_turns", model=name)
    opening, to_answer, to_question, *_, end = parts
    after_user = _shared_start(_tail(turns[:1], tokenizer), to_answer, end)
    after_assistant = _shared_start(_tail(turns[:2], tokenizer), to_question)
    # Read backwards: what opens the first question too, where that comes after the first token.
    before_user = _shared_start(to_question[len(after_assistant) :][::-1], opening[::-1])[::-1]
    after_assistant = to_question.removesuffix(before_user)
    start = opening.removesuffix(before_user)
    bos = str(tokenizer.bos_token or "")
    bos = bos if start.startswith(bos) else ""
    pieces = Pieces(
        start=bos,
        no_system=start.removeprefix(bos),
        user=(before_user, after_user),
        assistant=(to_answer[len(after_user) :], after_assistant),
        ask=end[len(after_user) :],
    )
    pieces = _with_system(pieces, turns, tokenizer)

    silent = render(turns[:1], tokenizer, enable_thinking=False) or ""
    usual = assemble(pieces, turns[:1])
    if silent.startswith(usual):
        pieces = replace(pieces, no_thought=silent.removeprefix(usual))

    thought = [turns[0], turns[1] | {"content": "<think>tho1ught</think>ans1wer"}, turns[2]]
    if render(thought, tokenizer) == assemble(pieces, turns[:3]):
        pieces = replace(pieces, cuts_thoughts=True)

    for role in ("system", "user", "assistant"):
        first = [{"role": "system", "content": "sys1tem"}] if pieces.system else []
        padded = [
            m | {"content": f" \n {m['content']} \n "} if m["role"] == role else m
            for m in first + turns[:3]
        ]
        trims = replace(pieces, trimmed=pieces.trimmed | {role})
        if assemble(trims, padded) == render(padded, tokenizer):
            pieces = trims
    return pieces


def _with_system(pieces: Pieces, turns: list[Turn], tokenizer: "TokenizerWrapper") -> Pieces:
    """Return the pieces with those of a system message, wherever the template puts it."""
    system = {"role": "system", "content": "sys1tem"}
    text = render([system, *turns], tokenizer)
    texts = [m["content"] for m in turns]
    if parts := _split_at(text, ["sys1tem", *texts]):
        before, after = parts[0].removeprefix(pieces.start), parts[1]
        opens = pieces.user[0]
        if after.endswith(opens):
            return replace(pieces, system=(before, after.removesuffix(opens)))
        return replace(pieces, system=(before, after), place="first")
    if parts := _split_at(text, [*texts[:-1], "sys1tem", texts[-1]]):
        before = parts[-3].removeprefix(pieces.assistant[1] + pieces.user[0])
        return replace(pieces, system=(before, parts[-2]), place="last")
    return pieces


def _split_at(text: str | None, marks: list[str]) -> list[str] | None:
    """Return the text around the marks, None unless each is there once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = re.fullmatch("(.*)".join(["", *map(re.escape, marks), ""]), text, re.DOTALL)
    return list(parts.groups()) if parts else None


def _shared_start(*texts: str) -> str:
    """Return the longest start that texts have in common."""
    columns = zip(*texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns))


def _tail(messages: list[Turn], tokenizer: "TokenizerWrapper") -> str:
    """Return the text that the template writes after the last content when nothing is asked."""
    text = render(messages, tokenizer, add_generation_prompt=False) or ""
    return text.rpartition(messages[-1]["content"])[2]


def _content(message: Turn, pieces: Pieces) -> str:
    content = message["content"]
    if message["role"] == "assistant" and pieces.cuts_thoughts:
        content = content.rpartition("</think>")[2]
    return content.strip(" \n\t\r") if message["role"] in pieces.trimmed else content


def puts_bos(tokenizer: "TokenizerWrapper") -> bool:
    """Return true if the tokenizer puts its first token before a text, as the runtime will."""
    ids = tokenizer.encode("x")
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
