"""Chat templates within limits, on a fixed date, and with system messages in questions."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import pytest
from mlx_lm.utils import load_tokenizer as load_with_ends

from athanor import files
from athanor.chat import rendering, template_trial, trial_process
from athanor.chat.contract import Contract, resolve_contract
from athanor.chat.conversation import chat
from athanor.chat.load import load_configured_tokenizer, load_tokenizer
from athanor.chat.rendering import Rendering, TemplateUnending, merge_system, open_with_date
from athanor.chat.templates import encode_prompt, render_rows, suggest_merge
from support.chat_templates import CHATML, SILENT
from support.refused import refused

Make = Callable[..., Path]

STRICT = (
    "{% if messages | selectattr('role', 'equalto', 'system') | list %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
LLAMA32 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{{ 'Today: ' + date_string + '\\n' }}" + CHATML
)
LLAMA31 = LLAMA32.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
# As Mistral's: only where no system message is.
UNASKED = (
    "{% if messages[0].role != 'system' %}{% macro today() %}{{ strftime_now('%A, %-d %B %Y %%') }}"
    "{% endmacro %}{{ today() }}{% endif %}" + CHATML
)
QUESTION = chat(("user", "hello"), ("assistant", "hi"))
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    """The tiny model's tokenizer with another template, in either of its two places."""

    def build(template: Any, name: str = "chat_template.jinja") -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        for path in tiny.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
        if name == "chat_template.jinja":
            (folder / name).write_text(template, encoding="utf-8")
        else:
            settings = files.read_json(folder / name)
            text = json.dumps(settings | {"chat_template": template})
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return build


# Templates that end or fill the process which tries them, and those that it judges.
UNENDING = {
    "unending for a system message": (
        f"{CHATML}{{% if messages[0].role == 'system' %}}{NESTED}{{% endif %}}",
        "it does not end",
    ),
    "constant": ("{{ 'x' * 2 * 10**9 }}", "MB of memory"),
    "doubling": (
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}",
        "MB of memory",
    ),
    "padding": ("{{ messages[0].content | center(10**10) }}", "MB of memory"),
    "nested": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "cannot be compiled"),
}
FAULTY = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "long": (CHATML + "{% for i in range(99999) %}a long line of text{% endfor %}", "characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "syntax": ("{{ messages }}\n{% for %}", "line 2: "),
    "unknown filter": ("{{ messages | backwards }}", "No filter named 'backwards'"),
    "empty": ("{# nothing #}", "neither the question nor the answer"),
    "fixed text": ("hello", "neither the question nor the answer"),
    "refuses all": ("{{ raise_exception('not today') }}", "with its answer: not today"),
    "includes a file": ("{% include '/etc/hostname' %}", "no loader"),
    "reaches for code": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "half a character": (CHATML + "{{ '\\ud83d' }}", "a lone surrogate"),
}


@pytest.mark.parametrize(("template", "fault"), UNENDING.values(), ids=UNENDING)
def test_a_template_is_tried_within_limits(
    template: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_trial, "CPU", 1)
    assert fault in str(template_trial.find_fault({"default": template}, {}))


@pytest.mark.parametrize(("template", "fault"), FAULTY.values(), ids=FAULTY)
def test_a_faulty_template_is_named(template: str, fault: str) -> None:
    named = trial_process.find_fault(template_trial.describe_trial({"default": template}, {}))
    assert fault in str(named)
    assert "\n" not in str(named)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ messages | backwards }}", "No filter named 'backwards'"),
        (CHATML + "{# " + "x" * 1_000_000 + " #}", "characters; at most 1,000,000 are read"),
        (
            [
                {"name": "default", "template": CHATML},
                {"name": "tool_use", "template": "{{ x.y.z }}"},
            ],
            "the template tool_use: it refuses",
        ),
    ],
    ids=["file", "huge", "named"],
)
def test_a_faulty_template_is_refused_by_its_file(make: Make, template: Any, fault: str) -> None:
    name = "chat_template.jinja" if isinstance(template, str) else "tokenizer_config.json"
    folder = make(template, name)
    with refused("chat.template_faulty", path=folder / name) as caught:
        load_tokenizer(folder)
    assert fault in caught.value.facts["fault"]


@pytest.mark.parametrize("template", [CHATML, STRICT, SILENT, LLAMA32, LLAMA31, UNASKED])
def test_a_usual_template_passes_its_trial(template: str) -> None:
    calls = template_trial.describe_trial({"default": template}, {})
    assert trial_process.find_fault(calls) is None
    marked = CHATML.replace(
        "m.content", "'' }}{% generation %}{{ m.content }}{% endgeneration %}{{ ''"
    )
    assert trial_process.find_fault(calls | {"templates": {"default": marked}}) is None


def test_a_trial_has_the_packages_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where PYTHONPATH alone names them, as modules of clusters do."""
    monkeypatch.setattr(sys, "executable", sys._base_executable)  # type: ignore[attr-defined]
    monkeypatch.setenv("PYTHONPATH", str(Path(jinja2.__file__).parents[1]))
    assert template_trial.find_fault({"default": CHATML}, {}) is None


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (NESTED, "did not end within"),
        ("{{ messages[0].content * 99999 }}", "characters"),
        ("{{ messages[0].content * 10**11 }}", "memory"),
    ],
    ids=["time", "length", "memory"],
)
def test_a_row_that_a_template_does_not_end_is_refused(
    make: Make, ending: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        tokenizer = load_tokenizer(
            make(f"{CHATML}{{% if 'again' in messages[0].content %}}{ending}{{% endif %}}"),
            Rendering(),
        )
        with rendering.limit_rendering():
            texts, error = render_rows(
                [QUESTION, chat(("user", "once again"), ("assistant", "no"))], tokenizer
            )
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(texts, list)
    assert isinstance(error, TemplateUnending)
    assert reason in str(error)


@pytest.mark.parametrize(
    ("template", "configured", "fixed", "written"),
    [
        (CHATML, "2026-07-31", None, "<|im_start|>user"),
        (LLAMA32, None, date.today().isoformat(), f"Today: {date.today():%d %b %Y}\n"),
        (LLAMA32, "2026-07-31", "2026-07-31", "Today: 31 Jul 2026\n"),
        (LLAMA31, None, None, "Today: 26 Jul 2024\n"),
        (LLAMA31, "2026-07-31", "2026-07-31", "Today: 31 Jul 2026\n"),
        (UNASKED, "2026-07-03", "2026-07-03", "Friday, 3 July 2026 %<|im_start|>user"),
    ],
)
def test_the_date_of_a_template_is_fixed_and_recorded(
    make: Make, template: str, configured: str | None, fixed: str | None, written: str
) -> None:
    folder = make(template)
    tokenizer = load_configured_tokenizer(folder, configured, "keep")
    contract = resolve_contract(folder, tokenizer, "auto")
    assert contract.rendering == Rendering(fixed)
    contract.write(folder / "chat.json")
    again = load_tokenizer(folder, Contract.read(folder / "chat.json").rendering)
    for each in (tokenizer, again):
        assert each.decode(encode_prompt(QUESTION, each)).startswith(written)
    assert tokenizer.chat_template == template  # that of the fused folder


def test_a_date_leaves_the_rest_of_a_template_as_it_is(make: Make) -> None:
    """Its first line, which Jinja would strip after a tag, included."""
    for text in ("\n  {{ strftime_now('%Y') }}\n{% if true %}\n x\n{% endif %}", " \n{{ 1 }}"):
        environment = trial_process.build_environment()
        expected = environment.from_string(text).render()
        now = date.today().isoformat()
        assert environment.from_string(open_with_date(text, now) + text).render() == expected


SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


@pytest.mark.parametrize(
    ("turns", "merged"),
    [
        ([(USER, "q"), (ASSISTANT, "a")], [(USER, "q"), (ASSISTANT, "a")]),
        ([(SYSTEM, "s"), (USER, "q"), (ASSISTANT, "a")], [(USER, "s\n\nq"), (ASSISTANT, "a")]),
        (
            [(SYSTEM, "s"), (SYSTEM, "t"), (USER, "q"), (ASSISTANT, "a")],
            [(USER, "s\n\nt\n\nq"), (ASSISTANT, "a")],
        ),
        (
            [(USER, "q"), (ASSISTANT, "a"), (SYSTEM, "s"), (USER, "r"), (ASSISTANT, "b")],
            [(USER, "q"), (ASSISTANT, "a"), (USER, "s\n\nr"), (ASSISTANT, "b")],
        ),
        ([(USER, "q"), (SYSTEM, "s"), (ASSISTANT, "a")], [(USER, "q\n\ns"), (ASSISTANT, "a")]),
        ([(SYSTEM, "s"), (ASSISTANT, "a")], [(USER, "s"), (ASSISTANT, "a")]),
        ([(SYSTEM, ""), (USER, "q"), (ASSISTANT, "a")], [(USER, "q"), (ASSISTANT, "a")]),
        (
            [(USER, "q"), (TOOL, "t"), (SYSTEM, "s"), (ASSISTANT, "a")],
            [(USER, "q"), (TOOL, "t"), (USER, "s"), (ASSISTANT, "a")],
        ),
    ],
)
def test_system_messages_open_the_questions_after_them(
    turns: list[tuple[str, str]], merged: list[tuple[str, str]]
) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    assert merge_system(messages) == [{"role": role, "content": text} for role, text in merged]


@pytest.mark.parametrize("template", [STRICT, SILENT], ids=["refused", "dropped"])
def test_a_template_without_a_place_for_system_messages(make: Make, template: str) -> None:
    folder = make(template)
    row = chat(("system", "Be brief."), ("user", "hello"), ("assistant", "hi"))
    assert "data.system=merge" in suggest_merge(row, load_tokenizer(folder, Rendering()))
    merging = load_configured_tokenizer(folder, None, "merge")
    assert "Be brief.\n\nhello" in merging.decode(encode_prompt(row, merging))
    report = resolve_contract(folder, merging, "auto")
    assert report.rendering == Rendering(merge_system=True)


@pytest.mark.parametrize(
    ("template", "configured", "system"),
    [(STRICT, None, "merge"), (LLAMA32, "2026-07-31", "keep"), (UNASKED, "2026-07-31", "merge")],
)
def test_a_served_model_is_asked_as_in_the_training(
    make: Make, template: str, configured: str | None, system: str
) -> None:
    from athanor.runs.served_model import FusedModel, put_system_into_questions

    folder = make(template)
    tokenizer = load_configured_tokenizer(folder, configured, system)
    settings = rendering.describe_rendering(tokenizer)
    row = chat(("system", "Be brief."), ("user", "hello"), ("assistant", ""))
    messages = [turn.message() for turn in row.turns[:-1]]
    if settings.get("merge_system"):
        messages = put_system_into_questions(messages)
    served = FusedModel()
    served.tokenizer = load_with_ends(folder)
    prompt = served._prompt(messages, settings.get("template_opening", ""))
    assert prompt == encode_prompt(row, tokenizer)
