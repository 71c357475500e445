"""The rendering of conversations by a model's chat template, within limits and on a fixed date.

A tokenizer of chat.load renders by this wherever it is asked to: in training, in tests, in exports.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from athanor.chat.conversation import Conversation, Message, Turn
from athanor.chat.template_probes import probe_conversations

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The seconds that a conversation may take, and each further one of a batch, looked at in ticks. A
# usual one takes 0.1 ms, a megabyte of text 50 ms.
SECONDS, SECONDS_EACH = 5.0, 0.05
TICK = 0.25
# A text that is longer than this is held against its conversation: it may be so many times as long
# as what the template has for each message and the contents together.
LONG, MULTIPLE = 100_000, 20
# Llama 3.1's form of a date, for templates that take it as a variable.
DATE_STRING = "%d %b %Y"
# Days without a part in common, to see whether a template writes one.
OTHER_DAYS = ("1999-01-02", "2010-11-13")


class TemplateUnending(Exception):
    """A conversation that a template does not end to write within a limit."""


@dataclass(frozen=True)
class Rendering:
    """The choices about rendering that `prepare` records for the later stages.

    Args:
        date: the date that the template writes, as YYYY-MM-DD; None for today's.
        merge_system: whether system messages are put into the questions that follow them.
    """

    date: str | None = None
    merge_system: bool = False


class Renderer:
    """The chat template of a tokenizer as a function of conversations."""

    def __init__(self, tokenizer: "TokenizerWrapper", rendering: Rendering) -> None:
        """Take the template of a tokenizer; mlx-lm has code of its own for some models'."""
        self.rendering = rendering
        self._inner = tokenizer._tokenizer
        self._of_library = tokenizer._chat_template

    def __call__(
        self, conversation: list[Any], tools: list[Message] | None = None, **options: Any
    ) -> Any:
        """Return a conversation's text, or the texts of a list of conversations.

        Raises:
            TemplateUnending: where it takes too long or too much memory, or writes too much.
            Exception: any that the template raises to refuse one.
        """
        several = bool(conversation) and isinstance(conversation[0], list)
        conversations = conversation if several else [conversation]
        if self.rendering.merge_system:
            conversations = [merge_system(messages) for messages in conversations]
        seconds = SECONDS + SECONDS_EACH * (len(conversations) - 1)
        _clock.end = time.monotonic() + seconds
        try:
            texts = self._render(conversations, tools, options)
        except MemoryError as error:
            raise TemplateUnending("it takes more memory than there is") from error
        finally:
            _clock.end = inf
        for messages, text in zip(conversations, texts, strict=True):
            if len(text) > LONG:
                self._refuse_explosion(text, messages, tools)
        return texts if several else texts[0]

    def _render(
        self, conversations: list[Any], tools: list[Message] | None, options: dict[str, Any]
    ) -> list[str]:
        if self._of_library is not None:
            return [self._of_library(messages, tools, **options) for messages in conversations]
        if self.rendering.date is not None:
            template = self._inner.get_chat_template(options.pop("chat_template", None), tools)
            options["chat_template"] = open_with_date(template, self.rendering.date) + template
        texts: list[str] = self._inner.apply_chat_template(
            conversations, tools=tools, tokenize=False, **options
        )
        return texts

    def _refuse_explosion(
        self, text: str, messages: list[Message], tools: list[Message] | None
    ) -> None:
        own = len(str(self._inner.chat_template or ""))
        most = MULTIPLE * (len(str([messages, tools])) + own * (1 + len(messages)))
        if len(text) > most:
            raise TemplateUnending(
                f"it writes {len(text):,} characters for this conversation; at most {most:,} are "
                "taken"
            )


def install_renderer(tokenizer: "TokenizerWrapper", rendering: Rendering) -> None:
    """Let a tokenizer render by its own template within limits, as `rendering` says."""
    own = tokenizer._chat_template
    if isinstance(own, Renderer):
        own.rendering = rendering
    elif tokenizer.has_chat_template:
        tokenizer._chat_template = Renderer(tokenizer, rendering)


def rendering_of(tokenizer: "TokenizerWrapper") -> Rendering:
    """Return how a tokenizer renders."""
    renderer = tokenizer._chat_template
    return renderer.rendering if isinstance(renderer, Renderer) else Rendering()


def choose_date(tokenizer: "TokenizerWrapper", configured: str | None) -> str | None:
    """Return the date that a tokenizer's template is to write; None where it writes none.

    It is the configured one, else today's where the template asks for the day.
    """
    renderer, template = tokenizer._chat_template, str(tokenizer.chat_template)
    asked = ("strftime_now",) if configured is None else ("strftime_now", "date_string")
    if not isinstance(renderer, Renderer) or not any(name in template for name in asked):
        return None
    chosen = configured or date.today().isoformat()
    other = next(day for day in OTHER_DAYS if day != chosen)
    return chosen if _write_probes(renderer, chosen) != _write_probes(renderer, other) else None


def describe_rendering(tokenizer: "TokenizerWrapper") -> dict[str, Any]:
    """Return how a tokenizer renders as the settings of a served model; {} for the usual way."""
    rendering = rendering_of(tokenizer)
    settings: dict[str, Any] = {}
    if rendering.merge_system:
        settings["merge_system"] = True
    if rendering.date is not None:
        template = tokenizer.get_chat_template()
        settings["template_opening"] = open_with_date(template, rendering.date)
    return settings


@lru_cache(maxsize=8)
def open_with_date(template: str, day: str) -> str:
    """Return what makes a template write a day (YYYY-MM-DD), if it is put before it.

    It defines `strftime_now` or `date_string`, whichever the template has.

    transformers gives templates a `strftime_now` of the current time, which no argument replaces.
    The time of a day is its beginning.
    """
    if "strftime_now" not in template:
        return f'{{% set date_string = "{datetime.fromisoformat(day).strftime(DATE_STRING)}" %}}\n'
    moment = datetime.fromisoformat(day)
    directives = sorted(set(re.findall(r"%-?[A-Za-z]", template)))
    values = [[directive, moment.strftime(directive)] for directive in directives]
    pairs = json.dumps([["%%", "\0"], *values, ["\0", "%"]])
    return (
        "{% macro strftime_now(format) %}{% set written = namespace(text=format) %}"
        f"{{% for directive, value in {pairs} %}}"
        "{% set written.text = written.text | replace(directive, value) %}{% endfor %}"
        "{{ written.text }}{% endmacro %}\n"
    )


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages in which each system message opens the question that follows it.

    Where none follows before the next answer, it ends the question before, or becomes one.
    """
    merged: list[Message] = []
    waiting: list[str] = []

    def place() -> None:
        if waiting and merged and merged[-1]["role"] == "user":
            content = merged[-1]["content"]
            merged[-1] = merged[-1] | {"content": "\n\n".join([content, *waiting])}
        elif waiting:
            merged.append({"role": "user", "content": "\n\n".join(waiting)})
        waiting.clear()

    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"]] if message["content"] else []
        elif message["role"] == "user":
            content = "\n\n".join([*waiting, message["content"]])
            merged.append(message | {"content": content})
            waiting.clear()
        else:
            place()
            merged.append(message)
    place()
    return merged


def merge_system_turns(row: Conversation) -> Conversation:
    """Return a row in which each system message opens the question that follows it."""
    messages = merge_system([msgspec.to_builtins(turn) for turn in row.turns])
    return msgspec.structs.replace(row, turns=msgspec.convert(messages, list[Turn]))


def _write_probes(renderer: Renderer, day: str) -> list[str]:
    """Return the texts of the probes on a day, empty ones for those that the template refuses."""
    texts, own = [], renderer.rendering
    renderer.rendering = replace(own, date=day)
    try:
        for call in probe_conversations():
            options = dict(call)
            try:
                texts.append(renderer(options.pop("messages"), **options))
            except Exception:  # a chat template may raise any
                texts.append("")
    finally:
        renderer.rendering = own
    return texts


@contextmanager
def limit_rendering() -> Iterator[None]:
    """Let each rendering in the main thread end after some seconds, if nothing else has the timer.

    On Linux also before it takes more than half of the machine's memory.

    The first stage needs it alone: later ones render rows that it has rendered. Python's code is
    interrupted, a single operation of C is not.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGALRM, _clock.tick)
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        with _limit_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def _limit_memory() -> Iterator[None]:
    """Let this process take half of the machine's memory in addition to what it has, on Linux."""
    if sys.platform != "linux":
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = (taken + os.sysconf("SC_PHYS_PAGES") // 2) * os.sysconf("SC_PAGE_SIZE")
    own = [value for value in (before, hard) if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *own]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


class _Clock:
    """The end of the rendering that runs, as `time.monotonic` counts."""

    def __init__(self) -> None:
        self.end = inf

    def tick(self, *_: Any) -> None:
        """Raise where the rendering that runs has had its time."""
        if time.monotonic() > self.end:
            self.end = inf
            raise TemplateUnending(f"it did not end within {SECONDS:.0f} seconds")


_clock = _Clock()
