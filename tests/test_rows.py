"""Rows as people write them: every bad one is named with its file and line."""

import json
from pathlib import Path

import pytest

from athanor import rows, settings
from athanor.console import UserError
from athanor.schema import DataConfig

GOOD = '{"prompt": "问", "completion": "答"}'


@pytest.fixture(scope="module")
def names(repo: Path) -> DataConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return settings.compose(Path("conf"), []).data


def write(folder: Path, train: str, valid: str = GOOD) -> Path:
    (folder / "train.jsonl").write_text(train, encoding="utf-8")
    (folder / "valid.jsonl").write_text(valid, encoding="utf-8")
    return folder


def test_the_tutorials_rows(data: Path, names: DataConfig) -> None:
    found = rows.read(data, names)
    assert [len(found[split]) for split in ("train", "valid", "test")] == [6, 3, 3]
    assert found["train"][5].value["messages"][1] == {"role": "assistant", "content": "德哥"}
    assert found["train"][5].where.endswith("train.jsonl:6")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON, one object a line: Expecting property name"),
        ('{"prompt": "问", "completion": "\\ud83d"}', "half a character"),
        ('{"prompt": "问"}', "'completion'"),
        ('{"prompt": "问", "completion": ""}', "not empty"),
        ('{"prompt": 5, "completion": "答"}', "'prompt'"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"question": "问"}', "found 'question'"),
        ('{"messages": []}', "a list of messages"),
        ('{"messages": [{"role": "user", "content": "问"}]}', "does not end with an assistant"),
        ('{"messages": [{"role": "robot", "content": "问"}]}', "message 1: expected a role"),
        ('{"messages": [{"role": "user", "content": "问"}, {"role": "assistant"}]}', "message 2"),
        (
            '{"messages": [{"role": "user", "content": "问"}, '
            '{"role": "assistant", "content": ""}]}',
            "message 2: expected a text that is not empty",
        ),
        ('{"messages": [{"role": "assistant", "content": "答"}]}', "a question before the answer"),
        ('{"text": " "}', "not empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, names: DataConfig, line: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        rows.read(write(tmp_path, f"{GOOD}\n\n{line}\n"), names)
    text = str(caught.value)
    assert "data: 1 problem; nothing was prepared" in text
    assert f"{tmp_path / 'train.jsonl'}:3: " in text
    assert said in text


def test_all_bad_rows_of_all_files_are_named_together(tmp_path: Path, names: DataConfig) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": ""}', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        rows.read(write(tmp_path, f"{GOOD}\n{{\n[]\n", '{"text": "一"}\n' + GOOD), names)
    text = str(caught.value)
    assert "4 problems" in text
    assert f"{tmp_path / 'test.jsonl'}:1: expected a text" in text
    assert "train.jsonl:2" in text
    assert "train.jsonl:3" in text
    assert "expected one format in a file, found text (line 1) and completions (line 2)" in text


def test_invalid_utf8_is_named(tmp_path: Path, names: DataConfig) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "train.jsonl").write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(UserError, match=r"train\.jsonl:2"):
        rows.read(tmp_path, names)


def test_missing_files_are_named_and_test_may_be(tmp_path: Path, names: DataConfig) -> None:
    assert rows.read(write(tmp_path, GOOD), names)["test"] == []
    (tmp_path / "valid.jsonl").unlink()
    (tmp_path / "val.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"valid\.jsonl: missing; .* holds train\.jsonl, val\.jsonl"
    ):
        rows.read(tmp_path, names)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path, names: DataConfig) -> None:
    assert len(rows.read(write(tmp_path, "\ufeff" + GOOD), names)["train"]) == 1


def test_keys_go_by_configured_names(tmp_path: Path, names: DataConfig) -> None:
    other = DataConfig("input", "output", names.chat_feature, names.text_feature)
    line = json.dumps({"input": "问", "output": "答", "id": 7}, ensure_ascii=False)
    found = rows.read(write(tmp_path, line, line), other)["train"][0].value
    assert found == {
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    }
