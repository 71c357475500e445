"""Rows on their way to training: split, compared, cleaned, and never lost."""

import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from athanor import synthesize
from athanor.chat.conversation import Conversation
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import appends_end_token, tokenize_row
from athanor.config.compose import compose_config
from athanor.config.values import to_dataclass
from athanor.paths import SPLITS
from athanor.prepare import json_values, near_duplicates, origins, read_json
from athanor.prepare.check_rows import CHUNKS_AHEAD, FirstPass
from athanor.prepare.checks import Findings
from athanor.prepare.near_duplicates import BETWEEN
from athanor.prepare.origins import Origin
from athanor.prepare.prepare import prepare
from athanor.prepare.records import Record
from athanor.prepare.streams import Limits
from athanor.prepare.tally import CHUNK
from support import templated
from support.refused import refused

Row = dict[str, Any]
Prepare = Callable[..., dict[str, Any]]
QUICK = hypothesis_settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def prepared(repo: Path, tiny: Path, tmp_path: Path) -> Prepare:
    """Prepares files, given as name=rows or name=text, with overrides of data's configuration."""

    def run(
        *overrides: str,
        synonyms: dict[str, list[str]] | None = None,
        **files: Any,
    ) -> dict[str, Any]:
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        for name, content in files.items():
            path = data / name.replace("__", ".")
            if isinstance(content, list):
                content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
            path.write_text(content, encoding="utf-8")
        config = to_dataclass(compose_config(repo / "conf", [f"model.path={tiny}", *overrides]))
        config.data.synonyms = synonyms or {}
        return prepare(data, tmp_path / "out", config)

    return run


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pair(question: str, answer: str) -> Row:
    return {"prompt": question, "completion": answer}


def answers(out: Path, split: str) -> list[str]:
    return [row["messages"][-1]["content"] for row in lines(out / f"{split}.jsonl")]


def rejected(out: Path) -> dict[str, list[str]]:
    """The checks that left a row out, by the row's place."""
    return {
        Path(row["where"]).name: [reason["check"] for reason in row["reasons"]]
        for row in lines(out / "rejected.jsonl")
    }


# ---- splitting


def test_given_files_are_used_as_they_are(prepared: Prepare, tmp_path: Path) -> None:
    rows = [pair(f"第{n}问", f"甲{n}乙") for n in range(6)]
    prepared(train__jsonl=rows[:3], dev__json=json.dumps(rows[3:5]), test__jsonl=rows[5:])
    split_answers = [answers(tmp_path / "out", split) for split in SPLITS]
    assert split_answers == [["甲0乙", "甲1乙", "甲2乙"], ["甲3乙", "甲4乙"], ["甲5乙"]]


def test_other_files_are_shared_out_and_a_split_with_a_file_gets_none(
    prepared: Prepare, tmp_path: Path
) -> None:
    rows = list(synthesize.rows("completions", 300, ["zh_CN"], 0))
    splits = prepared("data.checks.near_leak=ignore", rows__jsonl=rows)["splits"]
    assert [splits[split]["rows"] for split in SPLITS] == pytest.approx([240, 30, 30], abs=15)
    own = [pair("天是什么颜色", "蓝"), pair("草是什么颜色", "绿")]
    splits = prepared("data.checks.near_leak=ignore", rows__jsonl=rows, valid__jsonl=own)["splits"]
    assert splits["valid"]["rows"] == 2
    assert splits["train"]["rows"] + splits["test"]["rows"] == 300


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)


@QUICK
@given(st.lists(TEXTS, min_size=1, max_size=30), TEXTS, st.integers(0, 30))
def test_a_new_row_moves_no_other(texts: list[str], new: str, place: int) -> None:
    shares = {"valid": 0.2, "test": 0.2, "train": 0.6}

    def sides(rows: list[str]) -> dict[str, str]:
        return {
            row: near_duplicates.split_of(near_duplicates.digest(near_duplicates.fold(row)), shares)
            for row in rows
        }

    before = sides(texts)
    texts.insert(place, new)
    after = sides(texts)
    assert {row: after[row] for row in before} == before


def test_adding_a_row_to_data_moves_no_other(prepared: Prepare, tmp_path: Path) -> None:
    """The whole stage: rows are added one after another, in front, between and behind."""
    rows = list(synthesize.rows("completions", 60, ["zh_CN", "en_US"], 3))
    off = [f"data.checks.{name}=warn" for name in ("near_leak", "leak", "duplicate")]
    sizes = ["data.valid_size=0.3", "data.test_size=0.3"]

    def sides(rows_so_far: list[Row]) -> dict[str, str]:
        prepared(*off, *sizes, rows__jsonl=rows_so_far)
        out = tmp_path / "out"
        return {
            json.dumps(row, ensure_ascii=False): split
            for split in SPLITS
            for row in lines(out / f"{split}.jsonl")
        }

    chance = random.Random(0)
    rows_so_far = rows[:50]
    before = sides(rows_so_far)
    for row in rows[50:53]:
        rows_so_far.insert(chance.randrange(len(rows_so_far) + 1), row)
        after = sides(rows_so_far)
        assert len(after) == len(before) + 1
        assert {key: after[key] for key in before} == before
        before = after


def test_copies_fall_on_one_side(prepared: Prepare, tmp_path: Path) -> None:
    rows = list(synthesize.rows("completions", 80, ["en_US"], 1))
    copies = [pair(row["prompt"].upper(), row["completion"] + "!") for row in rows]
    report = prepared("data.checks.near_leak=ignore", rows__jsonl=rows + copies)
    assert [check for check in report["checks"] if check["name"] == "leak"] == []
    assert report["rows"]["kept"] == 160


def test_a_split_without_rows_is_an_error(prepared: Prepare) -> None:
    with refused("prepare.faults", problems="1 problem", checks=["too_few_rows"]):
        prepared("data.valid_size=0", rows__jsonl=[pair("一", "二"), pair("三", "四")])


# ---- leaks

LONG = (
    "The museum by the old harbour opens at nine and closes at five, but on the first Sunday of "
    "every month visitors may stay until eight in the evening"
)
LEAKS = {
    "exact": (LONG, LONG),
    "punctuation": ("Hello, dear world: how are you?", "Hello dear world, how are you"),
    "full-width digits": ("２０２３年卖出１２０万辆汽车", "2023年卖出120万辆汽车"),
    "case": ("The Capital Of France Is Paris", "the capital of france is paris"),
    "white space": ("a  quick brown\tfox jumps", "a quick brown fox jumps"),
    "one word in twenty, English": (LONG, LONG.replace("harbour", "station")),
    "one word in twenty, Chinese": (
        "老港口旁边的博物馆每天早上九点开门，下午五点关门，但每月第一个星期日可以参观到晚上八点",
        "老港口旁边的图书馆每天早上九点开门，下午五点关门，但每月第一个星期日可以参观到晚上八点",
    ),
}


@pytest.mark.parametrize("held_out", ["valid", "test"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_found(
    prepared: Prepare, tmp_path: Path, leak: str, held_out: str
) -> None:
    trained, known = LEAKS[leak]
    others = list(synthesize.rows("text", 30, ["zh_CN", "en_US"], 5))
    train = [*others[:20], {"text": trained}]
    rows = {"valid": others[20:25], "test": others[25:]}
    rows[held_out] = [*rows[held_out], {"text": known}]
    prepared(train__jsonl=train, valid__jsonl=rows["valid"], test__jsonl=rows["test"])
    near = leak.startswith("one word")
    assert rejected(tmp_path / "out") == {"train.jsonl:21": ["near_leak" if near else "leak"]}
    assert len(lines(tmp_path / "out/train.jsonl")) == 20
    [line] = lines(tmp_path / "out/rejected.jsonl")
    assert line["row"] == {"text": trained}
    assert f"{held_out}.jsonl:6, which is in {held_out}" in line["reasons"][0]["text"]


def test_no_false_alarm_on_a_thousand_different_rows(prepared: Prepare) -> None:
    """Sentences of Faker's, of which no two were made from one another."""
    from faker import Faker

    chinese, english = Faker("zh_CN"), Faker("en_US")
    chinese.seed_instance(0)
    english.seed_instance(0)
    rows = [{"text": chinese.text(80)} for _ in range(500)]
    rows += [{"text": english.text(160)} for _ in range(500)]
    report = prepared("data.valid_size=0.2", "data.test_size=0.2", rows__jsonl=rows)
    assert report["checks"] == []
    assert report["rows"]["kept"] == 1000


def test_the_tutorials_own_leak_is_beyond_it(prepared: Prepare, tmp_path: Path) -> None:
    """Numbers written in words, other words throughout: README says that this is not found."""
    prepared(
        train__jsonl=[{"text": "苹果公司2023年营收$383亿美元", "label": "科技"}],
        valid__jsonl=[{"text": "天气很好", "label": "生活"}],
        test__jsonl=[{"text": "苹果2023财年收入达三百八十三亿美金", "label": "科技"}],
    )
    assert rejected(tmp_path / "out") == {}
    folded = [near_duplicates.fold(text) for text in ("营收$383亿美元。", "营收＄３８３亿美元")]
    assert folded[0] == folded[1]


def test_text_of_the_format_makes_no_leak(prepared: Prepare) -> None:
    """A system message, a label set, an instruction: long, and the same in every row."""
    system = (
        "You are a patient assistant of a large library and answer in a single short sentence. "
    )
    words = ["苹果", "海浪", "铁路", "森林"]
    chats = [
        {
            "messages": [
                {"role": "system", "content": system * 3},
                {"role": "user", "content": word},
                {"role": "assistant", "content": f"{word}{n}"},
            ]
        }
        for n, word in enumerate(words)
    ]
    for rows in (
        chats,
        [{"instruction": system * 3, "input": word, "output": word[::-1]} for word in words],
        [{"text": word, "label": "甲" if n % 2 else "乙"} for n, word in enumerate(words)],
    ):
        report = prepared(train__jsonl=rows[:2], valid__jsonl=rows[2:3], test__jsonl=rows[3:])
        assert report["checks"] == []


@QUICK
@given(st.text())
def test_folded_texts_have_no_case_and_no_breaks(text: str) -> None:
    folded = near_duplicates.fold(text)
    assert folded.casefold() == folded
    assert not {"\n", "\t", BETWEEN} & set(folded)


APART = (
    """1.5 15|3-4 34|a+b ab|😀 😭|-5 5|C# C|foo_bar foobar|5% 5|a.b ab|if(!x) if(x)|f(a,b) f(ab)"""
)


@pytest.mark.parametrize("pair", [*(pair.split() for pair in APART.split("|")), ("12 5", "125")])
def test_distinctive_punctuation_is_not_folded_away(pair: tuple[str, str]) -> None:
    assert near_duplicates.fold(pair[0]) != near_duplicates.fold(pair[1])


def test_near_texts_are_those_that_a_full_comparison_finds() -> None:
    """The index against comparing every pair, on texts of all degrees of likeness."""
    chance = random.Random(0)
    words = [
        word for row in synthesize.rows("text", 50, ["en_US"], 0) for word in row["text"].split()
    ]
    base = [chance.choices(words, k=25) for _ in range(40)]
    queries, held_out = [], []
    for number, text in enumerate(base):
        other = [chance.choice(words) if chance.random() < number / 80 else word for word in text]
        held_out.append(near_duplicates.fold(" ".join(text)))
        queries.append(near_duplicates.fold(" ".join(other)))

    def grams(text: str) -> set[str]:
        return {text[i : i + 3] for i in range(len(text) - 2)}

    expected = {}
    for i, query in enumerate(queries):
        best = max(
            (len(grams(query) & grams(known)) / len(grams(query) | grams(known)), -j)
            for j, known in enumerate(held_out)
        )
        if best[0] >= 0.7:
            expected[i] = (-best[1], pytest.approx(best[0]))
    rows = [[f"{BETWEEN}{text}" for text in texts] for texts in (held_out, queries)]
    none = near_duplicates.common_grams([])
    no_answer = near_duplicates.frequent_answers(near_duplicates.answer_keys(rows[0]))
    index = near_duplicates.NearIndex(rows[0], 0.7, none, no_answer)
    nearest = dict(enumerate(index.nearest(rows[1])))
    assert {i: hit for i, hit in nearest.items() if hit is not None} == expected
    assert 5 < len(expected) < 35


def a_form(kind: str, count: int) -> list[Row]:
    """Rows of one form with something of its own in each: none is another's copy."""
    words = [row["text"].split()[-1] for row in sentences(count)]
    numbers = random.Random(1).sample(range(100, 10_000), 2 * count)
    if kind == "sums":
        task = "Calculate the sum of the following two numbers and answer with the number alone: "
        return [
            pair(f"{task}{a} + {b}", str(a + b))
            for a, b in zip(numbers[:count], numbers[count:], strict=True)
        ]
    if kind == "functions":
        return [
            pair(
                f"Write a Python function named {word}_{n} that returns the square of its input.",
                f"def {word}_{n}(value):\n    return value * value",
            )
            for word, n in zip(words, numbers, strict=False)
        ]
    task = "Judge whether the following sentence is grammatical, and answer with a single word."
    return [
        {"instruction": task, "input": row["text"], "output": "yes" if n % 2 else "no"}
        for n, row in enumerate(sentences(count))
    ]


def sentences(count: int) -> list[Row]:
    from faker import Faker

    faker = Faker("en_US")
    faker.seed_instance(7)
    return [{"text": faker.unique.sentence(9).rstrip(".")} for _ in range(count)]


@pytest.mark.parametrize("kind", ["sums", "functions", "instructions"])
def test_rows_of_one_form_are_no_leaks(prepared: Prepare, kind: str) -> None:
    report = prepared(rows__jsonl=a_form(kind, 600))
    near = [check["rows"] for check in report["checks"] if check["name"] == "near_leak"]
    assert sum(near) <= 12
    assert report["rows"]["kept"] >= 588


def test_copies_among_rows_of_sentence_patterns(prepared: Prepare, tmp_path: Path) -> None:
    """A value that changes the answer makes another row; a copy that keeps its answer is one."""
    chance = random.Random(1)
    made = templated.rows(800)
    held_out = chance.sample(made, 200)
    trained = [row for row in made if row not in held_out]
    copies = [
        (change(question, chance), answer)
        for change in templated.CHANGES
        for question, answer in chance.sample(held_out, 25)
    ]
    prepared(
        train__jsonl=[pair(*row) for row in trained + copies],
        valid__jsonl=[pair(*row) for row in held_out[:100]],
        test__jsonl=[pair(*row) for row in held_out[100:]],
    )
    lines = [int(where.rpartition(":")[2]) for where in rejected(tmp_path / "out")]
    assert sum(line <= len(trained) for line in lines) <= 8
    assert sum(line > len(trained) for line in lines) >= 95
    page = (tmp_path / "out/report.html").read_text("utf-8")
    marked = re.search(r'class="text pair">.*?<mark>(several|kindly|numerous|total)</mark>', page)
    assert marked is not None


def test_a_leak_is_found_among_rows_of_one_form(prepared: Prepare, tmp_path: Path) -> None:
    rows = a_form("instructions", 400)
    copy = dict(rows[390], input=rows[390]["input"].replace(" ", "  ", 2) + "!")
    near = dict(rows[391], input=" ".join([*rows[391]["input"].split()[:-1], "indeed"]))
    prepared(train__jsonl=[*rows[:300], copy, near], valid__jsonl=rows[300:], test__jsonl=[])
    assert rejected(tmp_path / "out") == {
        "train.jsonl:301": ["leak"],
        "train.jsonl:302": ["near_leak"],
    }


def test_the_same_input_for_another_task_is_no_leak(prepared: Prepare) -> None:
    rows = sentences(40)
    grammatical, polite = "Is this sentence grammatical?", "Does its writer sound polite to you?"
    report = prepared(
        "data.checks.near_leak=ignore",
        train__jsonl=[
            {"instruction": grammatical, "input": r["text"], "output": "yes"} for r in rows
        ],
        valid__jsonl=[{"instruction": polite, "input": r["text"], "output": "yes"} for r in rows],
    )
    assert report["checks"] == []


def test_a_new_label_moves_no_row(prepared: Prepare, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": "ab"[n % 2]} for n, row in enumerate(sentences(80))]

    def sides(labelled: list[Row]) -> dict[str, str]:
        prepared("data.checks.near_leak=ignore", rows__jsonl=labelled)
        return {
            row["messages"][0]["content"].partition("\n")[0]: split
            for split in SPLITS
            for row in lines(tmp_path / "out" / f"{split}.jsonl")
        }

    before = sides(rows)
    after = sides([*rows, {"text": "quite another", "label": "c"}])
    assert {text: after[text] for text in before} == before


# ---- cleaning and augmentation


def test_cleaning_is_off_by_default_and_counted(prepared: Prepare, tmp_path: Path) -> None:
    rows = [
        pair("  多  个\u3000空格 ", "好"),
        pair("全角ＡＢＣ１２３，！", "好的"),
        pair("零宽\u200b字符\x07", "嗯"),
        pair("<p>你好<br>世界&nbsp;&amp; 1 < 2</p>", "是<b>的</b>"),
    ]
    files = {"train__jsonl": rows, "valid__jsonl": [pair("一", "二")]}
    assert prepared(**files)["cleaning"] == {}
    questions = [row["messages"][0]["content"] for row in lines(tmp_path / "out/train.jsonl")]
    assert questions == [row["prompt"] for row in rows]
    steps = ("whitespace", "full_width", "control", "html")
    report = prepared(*(f"data.clean.{step}=true" for step in steps), **files)
    assert report["cleaning"] == {"html": 1, "control": 1, "full_width": 2, "whitespace": 2}
    cleaned = [[m["content"] for m in r["messages"]] for r in lines(tmp_path / "out/train.jsonl")]
    assert cleaned == [
        ["多 个 空格", "好"],
        ["全角ABC123，！", "好的"],
        ["零宽字符", "嗯"],
        ["你好\n世界 & 1 < 2", "是的"],
    ]


def test_questions_are_augmented_and_answers_are_not(prepared: Prepare, tmp_path: Path) -> None:
    rows = [pair(f"{n}号老师高兴吗", "老师很高兴") for n in range(20)]
    chosen = ["data.augment_share=0.8", "data.checks.near_leak=ignore"]
    files: dict[str, Any] = {"train__jsonl": rows, "valid__jsonl": [pair("他高兴吗", "高兴")]}
    files["synonyms"] = {"高兴": ["快乐", "开心"], "老师": ["教师"]}
    report = prepared(*chosen, **files)
    rows_written = lines(tmp_path / "out/train.jsonl")
    assert report["rows"]["augmented"] == len(rows_written) - 20 > 10
    assert report["splits"]["valid"]["rows"] == 1
    questions = [row["messages"][0]["content"] for row in rows_written]
    assert {row["messages"][1]["content"] for row in rows_written} == {"老师很高兴"}
    assert any("教师" in question and "快乐" in question for question in questions)
    first = (tmp_path / "out/train.jsonl").read_bytes()
    prepared(*chosen, **files)
    assert (tmp_path / "out/train.jsonl").read_bytes() == first
    prepared(*chosen, "data.augment_seed=1", **files)
    assert (tmp_path / "out/train.jsonl").read_bytes() != first


def test_label_sets_are_not_augmented(prepared: Prepare, tmp_path: Path) -> None:
    rows = [{"text": f"第{n}位老师很好", "label": "很好" if n % 2 else "一般"} for n in range(8)]
    report = prepared(
        "data.augment_share=1.0",
        "data.checks.near_leak=ignore",
        synonyms={"老师": ["教师"], "很好": ["不错"], "一般": ["普通"]},
        train__jsonl=rows,
        valid__jsonl=[{"text": "还可以", "label": "一般"}],
    )
    assert report["rows"]["augmented"] == 8
    rows_written = lines(tmp_path / "out/train.jsonl")
    questions = [row["messages"][0]["content"] for row in rows_written]
    assert sum("教师不错\n\nLabel (一般, 很好):" in question for question in questions) == 8
    assert {row["label"] for row in rows_written} == {"很好", "一般"}


def test_augmented_copies_of_rejected_rows_are_rejected(prepared: Prepare, tmp_path: Path) -> None:
    prepared(
        "data.augment_share=1.0",
        "data.checks.mixed_formats=skip",
        synonyms={"高兴": ["快乐"]},
        train__jsonl=[pair("我今天很高兴", "好"), pair("你呢", "也好"), {"text": "大家都高兴"}],
        valid__jsonl=[pair("我今天很高兴！", "好")],
    )
    assert answers(tmp_path / "out", "train") == ["也好"]
    assert len(rejected(tmp_path / "out")) == 2


def test_an_original_is_no_duplicate_of_an_augmented_copy(
    prepared: Prepare, tmp_path: Path
) -> None:
    report = prepared(
        "data.augment_share=1.0",
        synonyms={"高兴": ["快乐"]},
        train__jsonl=[pair("我很高兴", "好"), pair("我很快乐", "好")],
        valid__jsonl=[pair("一", "二")],
    )
    assert rejected(tmp_path / "out") == {}
    assert report["rows"] == {"read": 3, "kept": 3, "rejected": 0, "augmented": 0}


# ---- files


def test_splits_are_named_by_files_and_folders(prepared: Prepare, tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = {
        "mine/train.jsonl": "train",
        "mine/test.jsonl": "test",
        "validation/a.jsonl": "valid",
        "test-00000-of-00002.jsonl": "test",
        "train_01.jsonl": "train",
        "train/old/b.jsonl": "train",
    }
    for number, name in enumerate(names):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json.dumps(pair(f"{number}问", f"{number}答")), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    row = json.dumps(pair("在别处", "是的"))
    (tmp_path / "elsewhere" / "c.jsonl").write_text(row, encoding="utf-8")
    (data / "valid").symlink_to(tmp_path / "elsewhere")  # leaves the folder
    (data / "mine" / "again").symlink_to(data)  # leads back
    report = prepared()
    assert [report["splits"][split]["rows"] for split in SPLITS] == [3, 1, 2]
    [check] = report["checks"]
    assert check["name"] == "unknown_file"
    assert [example["where"] for example in check["examples"]] == [str(data / "valid")]


def test_a_long_list_of_json_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row looks at itself alone, not at the whole file: what is looked at is counted."""
    looked_at = 0

    class Counting(str):
        def count(self, *arguments: Any) -> int:
            nonlocal looked_at
            start, end = (
                (*arguments[1:], 0, len(self))[:2] if len(arguments) > 1 else (0, len(self))
            )
            looked_at += end - start
            return super().count(*arguments)

    rows = [pair(f"第{n}问", f"第{n}答") for n in range(500)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    parsed = json_values.parse
    monkeypatch.setattr(read_json, "parse", lambda text, start=0: parsed(Counting(text), start))
    [origin], _ = origins.find_files(tmp_path, len, 100, [], Limits(10**6, 10**8))
    assert [record.value for record in origin.read(frozenset())] == rows
    assert 0 < looked_at < 3 * path.stat().st_size


# ---- Hugging Face


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_data_set_of_hugging_faces(
    prepared: Prepare, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder, as a hub's repository holds it, with columns of other names."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "facts"
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("validation", 4)):
        rows = [{"q": f"第{n}个问题", "a": f"答案{n}", "id": n} for n in range(start, start + 4)]
        table = datasets.Dataset.from_list(rows)
        write = table.to_parquet if kind == "parquet" else table.to_json
        write(str(folder / f"{split}.{kind}"))
    chosen = [f"data.dataset={folder}", "data.prompt_feature=q", "data.completion_feature=a"]
    report = prepared(*chosen)
    assert [report["splits"][split]["rows"] for split in SPLITS] == [4, 4, 0]
    assert answers(tmp_path / "out", "valid") == ["答案4", "答案5", "答案6", "答案7"]
    (tmp_path / "hub" / "empty").mkdir()
    empty = str(tmp_path / "hub" / "empty")
    with refused("prepare.dataset_unreadable", dataset=empty):
        prepared(f"data.dataset={empty}")
    with refused("prepare.dataset_without_revision", dataset="somebody/facts"):
        prepared("data.dataset=somebody/facts")


# ---- the report


def test_the_report_counts_what_there_is(prepared: Prepare, tmp_path: Path) -> None:
    rows = [
        {"text": f"第{n}条评论很好", "label": "好" if n else "差", "source": "网页", "id": n}
        for n in range(30)
    ]
    report = prepared(
        train__jsonl=rows,
        valid__jsonl=[{"text": "好 <script>alert(1)</script>", "label": "好"}],
        notes__docx="不读",
    )
    train = report["splits"]["train"]
    assert train["labels"] == {"好": 29, "差": 1}
    assert train["sources"] == {"网页": 30}
    assert train["scripts"] == {"Han": 30}
    assert sum(bar["rows"] for bar in train["lengths"]) == 30
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["imbalance"]["examples"][0]["text"].startswith("97% of 30 rows have the label")
    assert checks["unknown_file"]["examples"][0]["where"].endswith("notes.docx")
    learned = [text for text, marked in report["samples"]["train"][0]["pieces"] if marked]
    assert learned == ["差<|im_end|>"]
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(report)
    )
    assert "<script>alert" not in (out / "report.html").read_text(encoding="utf-8")
    counts = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert counts["train"]["rows"] == 30
    assert counts["checks"]["imbalance"] == 1
    bars = (out / "lengths.csv").read_text(encoding="utf-8").splitlines()
    assert sum(int(line.rpartition(",")[2]) for line in bars[1:]) == 31


def test_nothing_is_left_behind_and_old_results_stay_when_it_stops(
    prepared: Prepare, tmp_path: Path
) -> None:
    rows = [pair("一", "二"), pair("三", "四")]
    prepared(train__jsonl=rows, valid__jsonl=[pair("五", "六")])
    before = (tmp_path / "out/train.jsonl").read_bytes()
    with refused("prepare.faults_of_rows", checks=["empty_prompt"]) as caught:
        prepared(train__jsonl=[rows[0], pair(" ", "七")])
    assert "train.jsonl:2: empty_prompt: " in caught.value.facts["listing"]
    assert (tmp_path / "out/train.jsonl").read_bytes() == before
    assert rejected(tmp_path / "out") == {"train.jsonl:2": ["empty_prompt"]}
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []


def test_rows_stream_through(tiny: Path, repo: Path, tmp_path: Path) -> None:
    """The number of rows in memory does not grow with the file."""
    tokenizer = load_tokenizer(tiny)
    config = to_dataclass(compose_config(repo / "conf", ["train.max_seq_length=64"]))
    read, between = 0, []

    def records(fixes: frozenset[str]) -> Iterator[Record]:
        nonlocal read
        for line in range(1, 12_001):
            read += 1
            if line % 100 == 0:
                written = sum(path.read_bytes().count(b"\n") for path in tmp_path.iterdir())
                between.append(read - written)
            yield Record("made.jsonl", line, {"text": f"{line:06} {line * 7:09} rows stream"})

    findings = Findings(config.data.checks, io.StringIO())
    origin = Origin("made.jsonl", "train", records, lambda: 12_000)
    first = FirstPass([origin], config, tokenizer, tokenizer.eos_token_id, findings)
    # label_set looks at the first row, to see whether there are labels.
    assert read == 1
    tally = first.run(tmp_path)
    assert len(tally.rows) == 12_000
    assert len((tmp_path / "train.spool").read_text(encoding="utf-8").splitlines()) == 12_000
    assert CHUNK < max(between) < CHUNK * (CHUNKS_AHEAD + 3)


def test_plain_texts_have_as_many_tokens_as_training_gives_them(
    prepared: Prepare, tiny: Path
) -> None:
    texts = ["一段文字", "another text", "已经结束<|im_end|>", "x"]
    rows = [{"text": text} for text in texts]
    train = prepared(train__jsonl=rows, valid__jsonl=[{"text": "其他"}])["splits"]["train"]
    tokenizer = load_tokenizer(tiny)
    learned = [tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)[0] for row in rows]
    assert train["tokens"] == sum(map(len, learned))
    assert train["supervised_tokens"] == sum(sum(row.supervised[1:]) for row in learned)
    assert not appends_end_token(tokenizer)
    end = "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    assert appends_end_token(tokenizer)
