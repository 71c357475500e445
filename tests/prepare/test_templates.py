"""Rows for templates without a place for system messages, with a date, or that do not end."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from athanor.chat import rendering
from athanor.chat.contract import Contract
from athanor.config.compose import compose_config
from athanor.config.values import to_dataclass
from athanor.prepare.prepare import prepare
from support.chat_templates import CHATML, SILENT
from support.refused import refused

Prepare = Callable[..., Any]

STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
NO_ANSWER_FIRST = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
    + CHATML
)
SLOW = (
    CHATML + "{% if messages[0].content == 'slow' %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
SYSTEM = [{"role": "system", "content": "Be brief."}]
QUESTION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
OTHER = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a lamp"}]

LAST = [{"role": "user", "content": "who knows"}, {"role": "assistant", "content": "nobody"}]


@pytest.fixture
def run(repo: Path, tiny: Path, tmp_path: Path) -> Prepare:
    """Prepares conversations for the tiny model with a template, and returns the report."""

    def run(template: str, *conversations: Any, **data: Any) -> Any:
        model = Path(shutil.copytree(tiny, tmp_path / "model", dirs_exist_ok=True))
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        (tmp_path / "data").mkdir(exist_ok=True)
        for name, rows in (("train", conversations), ("valid", [OTHER]), ("test", [LAST])):
            text = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows)
            (tmp_path / f"data/{name}.jsonl").write_text(text, encoding="utf-8")
        config = to_dataclass(compose_config(repo / "conf", [f"model.path={model}"]))
        config = replace(config, data=replace(config.data, **data))
        return prepare(tmp_path / "data", tmp_path / "out", config)

    return run


@pytest.fixture
def free_timer() -> Iterator[None]:
    """Gives the alarm back to the process, in case a test runner holds it."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("template", "reason"), [(STRICT, "no system role"), (SILENT, "leaves out message 1")]
)
def test_a_refused_system_message_names_the_setting_that_merges_it(
    run: Prepare, tmp_path: Path, template: str, reason: str
) -> None:
    with refused("prepare.faults_of_rows") as caught:
        run(template, SYSTEM + QUESTION)
    assert reason in str(caught.value)
    assert "data.system=merge puts system messages into the questions after them" in str(
        caught.value
    )
    report = run(template, SYSTEM + QUESTION, system="merge")
    assert list(report["cleaning"].values()) == [1]
    question = {"role": "user", "content": "Be brief.\n\nhello"}
    assert files.read_jsonl(tmp_path / "out/train.jsonl") == [{"messages": [question, QUESTION[1]]}]
    assert Contract.read(tmp_path / "out/chat.json").rendering.merge_system


def test_an_answer_that_begins_is_refused_in_the_words_of_the_template(run: Prepare) -> None:
    with refused("prepare.faults_of_rows") as caught:
        run(NO_ANSWER_FIRST, [QUESTION[1], *OTHER])
    assert "refused by the chat template: a user begins" in str(caught.value)
    assert "data.system" not in str(caught.value)


def test_a_row_that_a_template_does_not_end_stops_at_its_place(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_timer: None
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    with refused("prepare.template_unending", where=f"{tmp_path}/data/train.jsonl:2"):
        run(SLOW, QUESTION, [{"role": "user", "content": "slow"}, QUESTION[1]])


def test_the_date_of_a_template_is_in_the_rows_and_in_the_record(
    run: Prepare, tmp_path: Path
) -> None:
    dated = "{{ strftime_now('%d %B %Y') }}" + CHATML
    report = run(dated, QUESTION, date="2026-07-31")
    assert Contract.read(tmp_path / "out/chat.json").rendering.date == "2026-07-31"
    assert report["samples"]["train"][0]["pieces"][0][0].startswith("31 July 2026")
