"""The identity of rows: what a model reads before an answer belongs to it in every comparison."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from athanor.config.compose import compose_config
from athanor.config.schema import Config, ModelConfig
from athanor.config.values import to_dataclass
from athanor.prepare.prepare import prepare

Row = dict[str, Any]
Prepare = Callable[..., dict[str, Any]]

COMPARED = {"duplicate", "leak", "question_leak", "near_leak"}


@pytest.fixture(scope="session")
def conf(repo: Path) -> Config:
    config: Config = to_dataclass(compose_config(repo / "conf", []))
    return config


@pytest.fixture
def prepared(tmp_path: Path, conf: Config, tiny: Path) -> Prepare:
    """Prepares files of rows, and returns the report; definitions of tools may be left out."""

    def build(mask_prompt: bool = True, **rows: list[Row]) -> dict[str, Any]:
        for name, of_file in rows.items():
            path = tmp_path / "data" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in of_file), encoding="utf-8")
        ignored = ("left_out_by_template", "mixed_formats")
        checks = {**conf.data.checks, **dict.fromkeys(ignored, "warn")}
        config = replace(
            conf,
            model=ModelConfig(str(tiny), None),
            data=replace(conf.data, checks=checks),
            train=replace(conf.train, mask_prompt=mask_prompt),
        )
        return prepare(tmp_path / "data", tmp_path / "out", config)

    return build


def chat(*turns: tuple[str, str], **more: Any) -> Row:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def asked(question: str, answer: str, system: str | None = None, **more: Any) -> Row:
    before = [] if system is None else [("system", system)]
    return chat(*before, ("user", question), ("assistant", answer), **more)


def called(id: str, result: str, tool: str = "tide") -> Row:
    """A question that a tool answers, among two tools."""
    function = {"name": "lamp", "arguments": {"at": "noon"}}
    call = {"role": "assistant", "tool_calls": [{"id": id, "function": function}]}
    row = asked("Is the lamp lit?", "It is as the keeper says.")
    row["messages"][1:1] = [call, {"role": "tool", "content": result, "tool_call_id": id}]
    tools = [{"name": name, "description": f"asks for the {name}"} for name in ("lamp", tool)]
    return row | {"tools": tools}


def offered(*tools: str) -> Row:
    """A call, with long definitions of the tools that the model may choose from."""
    parameters = {"type": "object", "properties": {"unit": {"type": "string"}}}
    row = asked("Please help", "")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "help", "arguments": {}}}]
    functions = ({"name": name, "parameters": parameters} for name in ("help", *tools))
    return row | {"tools": [{"type": "function", "function": each} for each in functions]}


def then(first: str, answer: str) -> Row:
    return chat(
        ("user", first), ("assistant", "Well."), ("user", "And then?"), ("assistant", answer)
    )


def context(*texts: str) -> Row:
    """Turns of a user and an assistant; an answer with a - has the weight 0."""
    row = chat(*zip(("user", "assistant") * len(texts), texts, strict=False))
    for message in row["messages"]:
        if message["content"].startswith("-"):
            message["weight"] = 0
    return row


STORM = "Log: a storm from the west, two gulls, the lamp was lit at six."
CALM = "Log: calm all night, no ship passed, bread and eggs came by boat."
THOUGHT = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "It is prime indeed.", "reasoning_content": "no divisor"},
]


@pytest.mark.parametrize(
    ("train", "test", "checks"),
    [
        (asked("Storm?", "yes", STORM), asked("Storm?", "yes", STORM), {"leak"}),
        (asked("Storm?", "yes", STORM), asked("Storm?", "no", STORM), {"question_leak"}),
        (asked("Storm?", "yes", STORM), asked("Storm?", "yes", CALM), set()),
        (asked("Storm?", "yes", STORM), asked("Storm?", "no", CALM), set()),
        (asked("Storm?", "yes", STORM), asked("Storm?", "yes"), set()),
        (asked("Storm?", "yes", " "), asked("Storm?", "yes"), {"leak"}),
        (then("Boil the egg.", "Eat it."), then("Boil the egg.", "Eat it."), {"leak"}),
        (then("Boil the egg.", "Eat it."), then("Catch a fish.", "Eat it."), set()),
        (called("a1", "lit"), called("b2", "lit"), {"leak"}),
        (called("a1", "It burns bright"), called("a1", "Out of oil"), set()),
        (called("a1", "lit"), called("a1", "lit", tool="weather"), set()),
        (offered("egg_timer"), offered("find_pan"), set()),
        (offered("egg_timer"), offered("egg_timer"), {"leak"}),
        (
            {"instruction": "Sum up", "input": STORM, "output": "A night at sea."},
            {"instruction": "Sum up", "input": CALM, "output": "A night at sea."},
            set(),
        ),
        (
            chat(("system", "Eggs › Boiled"), ("assistant", "See the next page.")),
            chat(("system", "Lamps › Oil"), ("assistant", "See the next page.")),
            set(),
        ),
        ({"messages": THOUGHT}, asked("Is 7 prime?", "It is prime indeed."), {"leak"}),
        (
            context("An egg", "Nine minutes.", "Sure?", "-Eight."),
            asked("An egg", "Nine minutes!"),
            {"leak"},
        ),
    ],
)
def test_rows_are_the_same_by_all_that_is_read(
    train: Row, test: Row, checks: set[str], prepared: Prepare
) -> None:
    other = asked("Who keeps the lamp?", "The keeper.")
    report = prepared(train=[train, other], valid=[asked("Tide?", "Spring.")], test=[test])
    assert {check["name"] for check in report["checks"]} & COMPARED == checks


def test_a_question_under_long_systems_that_differ_in_a_word_is_no_leak(prepared: Prepare) -> None:
    rules = " ".join(f"Rule {i}: answer the guests of the harbour kindly." for i in range(30))
    rows = [
        asked("What do I owe?", f"You owe {17 * i} coins.", f"{rules} Guest {i} owes {17 * i}.")
        for i in range(1, 61)
    ]
    report = prepared(train=rows[:44], valid=rows[44:52], test=rows[52:])
    assert not {check["name"] for check in report["checks"]} & COMPARED
    assert report["rows"]["kept"] == 60


def test_rows_of_one_question_are_split_by_what_they_are_about(prepared: Prepare) -> None:
    """In a file without splits; rows that are the same row stay together."""
    rows = [asked("Storm?", "yes", f"Day {i}: wind and {i * 7} gulls") for i in range(60)]
    report = prepared(rows=[*rows, *rows])
    assert all(split["rows"] for split in report["splits"].values())
    assert report["rows"]["kept"] == 60
    assert [check["name"] for check in report["checks"]] == ["duplicate"]


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_answers_of_weight_0_are_context_in_figures_and_in_prepared_rows(
    mask_prompt: bool, prepared: Prepare, tmp_path: Path
) -> None:
    rows = [
        context("Boil an egg", "-wrong", "no", "nine minutes"),
        context("Boil two eggs", "nine minutes", "sure?", "-wrong"),
        context("Boil three eggs", "-wrong"),
    ]
    report = prepared(mask_prompt, train=rows, valid=[asked("Tide?", "Spring.")])
    assert {(check["name"], check["rows"]) for check in report["checks"]} == {
        ("nothing_to_learn", 1),
        ("unlearned_end", 1),
    }
    [first, second] = files.read_jsonl(tmp_path / "out" / "train.jsonl")
    assert [message.get("weight", 1) for message in first["messages"]] == [1, 0, 1, 1]
    assert second == context("Boil two eggs", "nine minutes")
    pieces = [piece for row in report["samples"]["train"] for piece in row["pieces"]]
    assert "wrong" not in "".join(text for text, is_learned in pieces if is_learned)
    assert "wrong" in "".join(text for text, is_learned in pieces if not is_learned)
    [rejected] = files.read_jsonl(tmp_path / "out" / "rejected.jsonl")
    assert rejected["row"] == rows[2]
