"""Synthetic rows: every format in every locale, the same bytes again, nothing overwritten."""

import json
import os
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from athanor import synthesize
from support.refused import refused

KEYS = {
    "chat": {"messages"},
    "sharegpt": {"conversations"},
    "tools": {"messages", "tools"},
    "completions": {"prompt", "completion"},
    "text": {"text"},
    "instruction": {"instruction", "input", "output"},
    "classification": {"text", "label"},
    "wikisql": {"question", "table", "sql"},
}
LOCALES = ["zh_CN", "en_US"]
METADATA = {"id", "source", "quality_score"}


def draw(format: str, count: int = 200, locales: list[str] = LOCALES) -> list[dict[str, Any]]:
    return list(synthesize.rows(format, count, locales, 0))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["synthesize", *map(str, arguments)])
    synthesize.main()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def chinese(text: str) -> bool:
    return any("一" <= letter <= "鿿" for letter in text)


def test_all_formats_are_here() -> None:
    assert set(synthesize.FORMATS) == set(KEYS)


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("format", KEYS)
def test_the_command_writes_each_format_in_each_locale(
    format: str, locale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "missing" / "rows.jsonl"
    command(monkeypatch, out, "--rows", 60, "--format", format, "--locale", locale)
    text = out.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) == 60
    assert text.endswith("\n")
    for line in lines:
        assert set(json.loads(line)) - METADATA == KEYS[format]
        assert chinese(line) == (locale == "zh_CN")
    assert names(out.parent) == ["rows.jsonl"]


@pytest.mark.parametrize("format", KEYS)
def test_metadata_comes_at_times_and_ids_are_unique(format: str) -> None:
    rows = draw(format, 1000)
    assert len({row["id"] for row in rows}) == 1000
    assert 400 < sum("source" in row for row in rows) < 600
    scores = [row["quality_score"] for row in rows if "quality_score" in row]
    assert 400 < len(scores) < 600
    assert all(0 <= score <= 1 for score in scores)


def test_locales_are_mixed_row_by_row() -> None:
    languages = [chinese(row["prompt"]) for row in draw("completions", 1000)]
    assert 400 < sum(languages) < 600
    assert 400 < sum(language != next for language, next in pairwise(languages)) < 600


def test_same_arguments_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    def written(hash_seed: str) -> bytes:
        out = tmp_path / f"{hash_seed}.jsonl"
        subprocess.run(
            [sys.executable, "-m", "athanor.synthesize", str(out), "--seed", "1"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        )
        return out.read_bytes()

    first = written("1")
    assert first.count(b"\n") == 100
    assert written("2") == first


def test_another_seed_makes_other_rows() -> None:
    prompts = [
        {row["prompt"] for row in synthesize.rows("completions", 100, LOCALES, seed)}
        for seed in (0, 2, -2)
    ]
    assert len(prompts[0] & prompts[1]) < 5
    assert len(prompts[0] & prompts[2]) < 5
    assert len(prompts[1] & prompts[2]) < 5  # a sign is part of a seed


@pytest.mark.parametrize("format", KEYS)
def test_rows_differ_from_one_another(format: str) -> None:
    values = [{key: row[key] for key in KEYS[format]} for row in draw(format, 10_000)]
    assert len({json.dumps(value, sort_keys=True) for value in values}) > 0.99 * 10_000


@pytest.mark.parametrize("locale", LOCALES)
def test_an_answer_is_the_field_of_its_question(locale: str) -> None:
    person = {field: f"<{field}>" for field in synthesize.COLUMNS}
    language = synthesize.LANGUAGES[locale]
    fields = set()
    for seed in range(200):
        row = synthesize.FORMATS["completions"](synthesize.Random(seed), person, language)
        [field] = [field for field in synthesize.FIELDS if person[field] in row["completion"]]
        questions = tuple(text.format_map(person) for text in language.questions[field])
        assert row["prompt"].endswith(questions)
        assert person[field] in row["prompt"]
        fields.add(field)
    assert fields == set(synthesize.FIELDS)


def test_an_instructions_input_is_empty_at_times() -> None:
    inputs = [row["input"] for row in draw("instruction")]
    assert 50 < inputs.count("") < 150


@pytest.mark.parametrize(
    ("format", "key", "role", "text", "roles"),
    [
        ("chat", "messages", "role", "content", ["user", "assistant"]),
        ("sharegpt", "conversations", "from", "value", ["human", "gpt"]),
    ],
)
def test_roles_alternate(format: str, key: str, role: str, text: str, roles: list[str]) -> None:
    lengths, systems = set(), 0
    for row in draw(format):
        turns = row[key]
        assert all(turn[text].strip() for turn in turns)
        if turns[0][role] == "system":
            systems += 1
            turns = turns[1:]
        assert [turn[role] for turn in turns] == roles * (len(turns) // 2)
        lengths.add(len(turns))
    assert lengths == {2, 4, 6}
    assert 20 < systems < 100


def test_tool_calls_in_both_styles_name_a_function_that_is_offered() -> None:
    rows = draw("tools", 1000)
    styles, offers = [], set()
    for row in rows:
        call = row["messages"][1]["tool_calls"][0]
        arguments = call["function"]["arguments"]
        styles.append(type(arguments))
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        offered = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        parameters = offered[call["function"]["name"]]["parameters"]
        assert set(parameters["required"]) <= set(values) <= set(parameters["properties"])
        assert all(value in row["messages"][0]["content"] for value in values.values())
        offers.add(len(offered))
    assert offers == {1, 2}
    assert set(styles) == {str, dict}
    assert 400 < styles.count(str) < 600


def test_a_tools_result_comes_at_times_and_is_answered() -> None:
    lengths, links = [], set()
    for row in draw("tools", 1000):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant"][: len(roles)]
        lengths.append(len(roles))
        if len(roles) == 4:
            call, result, answer = row["messages"][1:]
            links.add("tool_call_id" in result)
            assert (
                result.get("tool_call_id", call["tool_calls"][0]["id"])
                == (call["tool_calls"][0]["id"])
            )
            [value] = json.loads(result["content"]).values()
            assert value in answer["content"]
    assert set(lengths) == {2, 4}
    assert 400 < lengths.count(2) < 600
    assert links == {True, False}


@pytest.mark.parametrize("locale", LOCALES)
def test_a_label_can_be_learned_from_its_text(locale: str) -> None:
    rows = draw("classification", 1000, [locale])
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    assert set(labels) == {"positive", "negative", "neutral"}
    counts = CountVectorizer(analyzer="char", ngram_range=(2, 4)).fit_transform(texts)
    model = MultinomialNB().fit(counts[:500], labels[:500])
    assert model.score(counts[500:], labels[500:]) > 0.95


def test_sql_runs_on_its_table() -> None:
    rows = draw("wikisql", 1000)
    for row in rows:
        with sqlite3.connect(":memory:") as base:
            columns = ", ".join(row["table"]["header"])
            base.execute(f"CREATE TABLE {row['table']['name']} ({columns})")
            base.execute(row["sql"])
        values = row["sql"].split("'")[1::2]
        assert all(value in row["question"] for value in values)


def test_a_quote_in_a_value_is_doubled_in_sql() -> None:
    person = dict.fromkeys(synthesize.COLUMNS, "O'Hara")
    language = synthesize.LANGUAGES["en_US"]
    row = synthesize.FORMATS["wikisql"](synthesize.Random(0), person, language)
    assert "= 'O''Hara'" in row["sql"]
    assert "O'Hara" in row["question"]


def test_an_existing_file_is_left_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine\n", encoding="utf-8")
    with refused("synthesize.exists", path=out):
        command(monkeypatch, out)
    assert out.read_text(encoding="utf-8") == "mine\n"
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_file_that_appears_meanwhile_is_left_untouched(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"

    def drawn() -> Any:
        out.write_text("mine\n", encoding="utf-8")
        yield {"text": "made up"}

    with refused("synthesize.exists", path=out):
        synthesize.write(out, drawn(), 1)
    assert out.read_text(encoding="utf-8") == "mine\n"
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_stopped_run_leaves_nothing(tmp_path: Path) -> None:
    def drawn() -> Any:
        yield {"text": "made up"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize.write(tmp_path / "rows.jsonl", drawn(), 2)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["file/rows.jsonl", "n" * 256, "n" * 256 + "/rows", "a\0b", "/proc/rows", "/proc/no/rows"],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with refused("synthesize.not_writable", path=str(tmp_path / name)):
        synthesize.write(tmp_path / name, [], 0)
    assert names(tmp_path) == ["file"]


def test_a_missing_faker_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faker", None)
    with refused("synthesize.faker_missing"):
        next(synthesize.rows("text", 1, LOCALES, seed=99))  # of a seed that no test has drawn


@pytest.mark.parametrize("count", [0, 10**22])
def test_impossible_counts_are_refused_before_a_file_is_there(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "rows.jsonl", "--rows", count)
    assert f"got {count}" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_fields_hold_what_they_are_called() -> None:
    """A name is no telephone number: each field is drawn from a pool of its own."""
    rows = list(synthesize.rows("text", 200, ["en_US"], 0))
    sources = {row["source"] for row in rows if "source" in row}
    assert sources
    assert not any(character.isdigit() for source in sources for character in source)
    assert any(" lives in " in row["text"] or "home of" in row["text"] for row in rows)
