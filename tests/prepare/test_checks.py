"""One fault at a time, in every format: each is named with its place, and none is trained on."""

import codecs
import hashlib
import io
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pyarrow import parquet

from athanor import files as files_module
from athanor.chat.load import load_tokenizer
from athanor.config.compose import compose_config
from athanor.config.data_check import CHECKS, FIX, SKIP, STOP, WARN
from athanor.config.schema import Config, ModelConfig
from athanor.config.values import to_dataclass
from athanor.errors import UserError
from athanor.paths import SPLITS
from athanor.prepare import origins
from athanor.prepare.check_rows import FirstPass
from athanor.prepare.checks import Findings
from athanor.prepare.compare_rows import compare_rows
from athanor.prepare.prepare import prepare
from athanor.prepare.streams import Limits
from athanor.prepare.tally import Tally
from support.refused import refused

Object = dict[str, Any]
Files = dict[str, str | bytes]


def pair(question: str, answer: str) -> Object:
    return {"prompt": question, "completion": answer}


def turns(*texts: str) -> list[Object]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def chat(*texts: str, **more: Any) -> Object:
    return {"messages": turns(*texts), **more}


def line(value: Any) -> str:
    """JSON in ASCII: half characters as they are escaped."""
    return json.dumps(value)


def table(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


def parquet_bytes(rows: list[Object]) -> bytes:
    file = io.BytesIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


# What stands around the one bad row, in its own format. The answers tell the rows apart.
EXCHANGES = [("天空是什么颜色", "蓝色的"), ("月亮离我们多远", "三十八万公里")]
GOOD: dict[str, list[Object]] = {
    "completions": [pair(*exchange) for exchange in EXCHANGES],
    "chat": [chat(*exchange) for exchange in EXCHANGES],
    "text": [{"text": "".join(exchange)} for exchange in EXCHANGES],
    "instruction": [{"instruction": q, "output": a} for q, a in EXCHANGES],
    "classification": [{"text": q, "label": "甲"} for q, _ in EXCHANGES],
}
HELD_OUT: dict[str, list[Object]] = {
    "valid": [pair("水为什么会结冰", "因为天冷")],
    "test": [pair("谁写了红楼梦", "曹雪芹")],
}


@dataclass(frozen=True)
class Bad:
    """A folder with one fault: where it is, and what rejected.jsonl has to hold of it.

    `stays` is the number of rows that are trained on without it. `config` changes data's
    configuration; `whole_file` means that the fault is not one row's, so that none is rejected.
    """

    id: str
    check: str
    files: Files
    at: str
    row: Any = None
    stays: int = 2
    config: Object = field(default_factory=dict)
    limit: int = 512
    strange: bool = False
    whole_file: bool = False


def jsonl(id: str, check: str, bad: Any, among: str = "completions", **more: Any) -> Bad:
    """A bad row on line 2 of 3: an object, or a line as it is written."""
    first, last = map(line, GOOD[among])
    written = bad if isinstance(bad, str | bytes) else line(bad)
    data = b"\n".join(p if isinstance(p, bytes) else p.encode() for p in (first, written, last))
    more.setdefault("row", bad)
    return Bad(id, check, {"train.jsonl": data + b"\n"}, "train.jsonl:2", **more)


def of_json(id: str, check: str, bad: Any, among: str = "completions", **more: Any) -> Bad:
    """A bad row on line 3 of a list of three."""
    first, last = map(line, GOOD[among])
    written = bad if isinstance(bad, str) else line(bad)
    more.setdefault("row", bad)
    text = f"[\n{first},\n{written},\n{last}\n]\n"
    return Bad(id, check, {"train.json": text}, "train.json:3", **more)


def of_csv(id: str, check: str, bad: str | bytes, row: Any, **more: Any) -> Bad:
    """A bad row on line 3 of 4, the header included."""
    first, last = (",".join(exchange).encode() for exchange in EXCHANGES)
    written = bad if isinstance(bad, bytes) else bad.encode()
    data = b"\n".join((b"prompt,completion", first, written, last, b""))
    return Bad(id, check, {"train.csv": data}, "train.csv:3", row, **more)


def of_parquet(id: str, check: str, bad: Object, among: str = "completions", **more: Any) -> Bad:
    first, last = GOOD[among]
    data = parquet_bytes([first, bad, last])
    row = {key: bad.get(key) for key in {**first, **bad}}
    return Bad(id, check, {"train.parquet": data}, "train.parquet:2", row, **more)


def beside(id: str, check: str, name: str, data: str | bytes, at: int | None, **more: Any) -> Bad:
    """A bad file beside good rows."""
    good = table(*map(line, GOOD["completions"]))
    where = f"train/{name}" if at is None else f"train/{name}:{at}"
    return Bad(id, check, {"train/good.jsonl": good, f"train/{name}": data}, where, **more)


def call(arguments: Any, name: Any = "time") -> Object:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(calls: Any, result: str | None = "noon", **more: Any) -> Object:
    """A conversation that calls a tool."""
    messages: list[Object] = [{"role": "user", "content": "几点了"}]
    messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    messages += [] if result is None else [{"role": "tool", "content": result}]
    return {"messages": [*messages, {"role": "assistant", "content": "十二点"}], **more}


TWENTY = (
    "Every autumn the old gardener carries seven heavy baskets of ripe golden apples down from the "
    "windy hill to market"
)
NEARLY = pair(TWENTY.replace("golden", "yellow"), "yes")
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
POOL = "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会"
CHANCE = random.Random(0)
HAN = [pair(*("".join(CHANCE.sample(POOL, 12)) for _ in range(2))) for _ in range(30)]
SYSTEM = {"role": "system", "content": "你是<|im_end|>助手"}
DEMO = {
    "md5": hashlib.md5(table(*map(line, HELD_OUT["valid"])).encode()).hexdigest(),
    "relpath": "valid.jsonl",
}
LIMITS = Limits(row=10**6, file=10**8)
HALF_A_LINE = '{"prompt": "为什么", "compl'
LONG = "很长的问题" * 40
ENDS_WITH_CONTEXT = [*turns("a", "b", "c"), {"role": "assistant", "content": "d", "weight": 0}]
OVER_LINES = '{"prompt": "海水为什么咸",\n "completion": "有盐"}'
TWO = '{"prompt": "海水为什么咸", "completion": "有盐"} {"prompt": "谁", "completion": "我"}'
LATIN = '{"prompt": "café", "completion": "là"}'.encode("latin-1")
WRITTEN = line(pair("月亮的光是什么", "是太阳的光")).encode().decode("unicode_escape")

TABLE = [
    # Files
    beside("a-word-document", "unknown_file", "notes.docx", b"PK", None, whole_file=True),
    beside("no-suffix", "unknown_file", "README", "read me", None, whole_file=True),
    beside("about-the-data", "unknown_file", "README.md", "# A\n\nb\n", None, whole_file=True),
    beside("info", "unknown_file", "dataset_info.json", '{"builder": "b"}', None, whole_file=True),
    Bad(
        "rows-of-the-demo",
        "demo_rows",
        {
            "train/good.jsonl": table(*map(line, GOOD["completions"])),
            "../.dvc/demo-remote/files/md5/00/0.dir": line([DEMO]),
        },
        "valid.jsonl",
        whole_file=True,
    ),
    Bad(
        "no-splits-name",
        "shared_out",
        {"train/good.jsonl": line(pair("天空", "蓝")), "vaild.jsonl": line(pair("云", "白"))},
        "vaild.jsonl",
        stays=2,
        whole_file=True,
    ),
    beside("semicolons", "delimiter", "b.csv", "prompt;completion\na;b\n", 1),
    beside("utf-16-jsonl", "encoding", "b.jsonl", '{"text": "a"}'.encode("utf-16"), 1),
    beside("utf-16-json", "encoding", "b.json", '[{"text": "a"}]'.encode("utf-16"), 1),
    beside("utf-16-csv", "encoding", "b.csv", "text\na\n".encode("utf-16"), 1),
    beside("utf-16-md", "encoding", "b.md", "# A\n\nb\n".encode("utf-16"), 1),
    beside("gb18030", "encoding", "b.jsonl", WRITTEN.encode("gb18030"), 1),
    jsonl("a-thousand-messages", "too_large", chat(*map(str, range(1002))), "chat"),
    jsonl(
        "a-row-too-large",
        "too_large",
        pair("x" * 300, "y"),
        row=line(pair("x" * 300, "y"))[:201],
        config={"max_row_bytes": 200},
    ),
    beside("no-parquet", "unreadable_file", "b.parquet", b"PAR1 is all that it says", 1),
    beside("half-a-parquet", "unreadable_file", "b.parquet", parquet_bytes(GOOD["text"])[:-20], 1),
    beside("a-column-twice", "unreadable_file", "b.csv", "prompt,prompt\na,b\n", 1),
    *(
        Bad(f"mark-{kind}", "byte_order_mark", {f"train.{kind}": codecs.BOM_UTF8 + data}, at, row)
        for kind, data, at, row in (
            ("jsonl", b'{"text": "a"}\n', "train.jsonl:1", {"text": "a"}),
            ("json", b'[{"text": "a"}]', "train.json:1", {"text": "a"}),
            ("csv", b"text\na\n", "train.csv:1", None),
            ("md", b"# A\n\nb\n", "train.md:3", {"path": ["A"], "text": "b"}),
        )
    ),
    # Bytes and characters
    jsonl("latin-1-jsonl", "invalid_utf8", LATIN, row=LATIN.decode(errors="backslashreplace")),
    jsonl("cut-utf-8", "invalid_utf8", b'{"text": "\xe4\xbd"}', row='{"text": "\\xe4\\xbd"}'),
    beside("latin-1-json", "invalid_utf8", "b.json", b"[\n" + LATIN + b"]", 2, whole_file=True),
    beside(
        "latin-1-md",
        "invalid_utf8",
        "b.md",
        "# A\n\ncafé\n".encode("latin-1"),
        3,
        row="# A\n\ncaf\\xe9\n",
    ),
    of_csv("gb18030-csv", "invalid_utf8", "中,b".encode("gb18030"), ["\udcd6\udcd0", "b"]),
    jsonl("half-an-emoji", "half_character", pair("好\ud83d", "好的")),
    jsonl("half-an-emoji-in-an-answer", "half_character", chat("好", "好的\ude00"), "chat"),
    of_json("half-an-emoji-json", "half_character", pair("好\ud83d", "好的")),
    # JSON
    jsonl("single-quotes", "invalid_json", "{'prompt': '问', 'completion': '答'}"),
    jsonl("unquoted-key", "invalid_json", '{text: "缺少引号"}'),
    jsonl("trailing-comma", "invalid_json", '{"prompt": "问", "completion": "答",}'),
    jsonl("half-a-line", "invalid_json", HALF_A_LINE),
    jsonl("no-json-at-all", "invalid_json", "hello"),
    jsonl("something-behind", "invalid_json", '{"prompt": "问", "completion": "答"} # why'),
    jsonl("too-deep", "invalid_json", '{"text": ' + "[" * 10**5, "text"),
    jsonl("a-number-too-long", "invalid_json", '{"text": "a", "n": ' + "1" * 5000 + "}", "text"),
    Bad(
        "single-quotes-json",
        "invalid_json",
        {"train.json": "[\n" + "".join(line(g) + ",\n" for g in GOOD["text"]) + "{'text': 'a'}]"},
        "train.json:4",
        "{'text': 'a'}]",
    ),
    jsonl("two-on-a-line", "several_objects", TWO),
    jsonl("over-two-lines", "split_object", OVER_LINES, row=pair("海水为什么咸", "有盐")),
    jsonl("key-twice", "duplicate_key", '{"prompt": "a", "prompt": "b", "completion": "c"}'),
    jsonl(
        "nested-key-twice",
        "duplicate_key",
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "chat",
    ),
    jsonl("nan", "not_a_number", '{"prompt": "a", "completion": "b", "quality_score": NaN}'),
    jsonl("infinity", "not_a_number", '{"prompt": "a", "completion": "b", "n": -Infinity}'),
    jsonl("1e999", "not_a_number", '{"prompt": "a", "completion": "b", "n": [1e999]}'),
    *(
        of_json(f"{name}-json", check, written, row=written)
        for name, check, written in (
            ("key-twice", "duplicate_key", '{"prompt": "a", "prompt": "b", "completion": "c"}'),
            ("nan", "not_a_number", '{"prompt": "a", "completion": NaN}'),
        )
    ),
    *(
        jsonl(f"a-{name}", "not_an_object", json.dumps(value), row=value)
        for name, value in (
            ("list", [pair("a", "b")]),
            ("string", "a"),
            ("number", 7),
            ("null", None),
            ("truth", True),
        )
    ),
    of_json("a-string-json", "not_an_object", '"a"', row="a"),
    # CSV
    of_csv("a-cell-too-few", "wrong_columns", "只有一格", ["只有一格"]),
    of_csv("a-cell-too-many", "wrong_columns", "a,b,c", ["a", "b", "c"]),
    of_csv("behind-a-quote", "wrong_columns", '"a"b,c', '"a"b,c'),
    Bad(
        "unterminated-quote",
        "wrong_columns",
        {"train.csv": "prompt,completion\n天空,蓝色的\n月亮,很远\n" + '"没有完,答\n下一行,答\n'},
        "train.csv:4",
        '"没有完,答\n下一行,答',
    ),
    # Images
    jsonl("images", "image", {**pair("这是什么", "猫"), "images": ["cat.jpg"]}),
    jsonl("image-path", "image", {"image_path": "cat.jpg", "label": "甲"}, "classification"),
    jsonl("image-and-text", "image", {"image": "cat.jpg", "text": "一只猫"}, "text"),
    jsonl(
        "image-url-in-a-message",
        "image",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "这是什么"},
                        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                    ],
                },
                {"role": "assistant", "content": "猫"},
            ]
        },
        "chat",
    ),
    of_parquet("images-parquet", "image", {**pair("这是什么", "猫"), "images": ["cat.jpg"]}),
    # Keys and types
    jsonl("no-key", "missing_key", {}),
    jsonl("answer-null", "missing_key", {"prompt": "a", "completion": None}),
    jsonl("foreign-keys", "missing_key", {"frage": "a", "antwort": "b"}),
    beside(
        "unknown-columns",
        "unknown_columns",
        "b.jsonl",
        line({"frage": "a", "antwort": "b"}),
        None,
        row={"frage": "a", "antwort": "b"},
    ),
    jsonl("unknown-key", "unknown_key", {**pair("a", "b"), "hint": "c"}),
    jsonl(
        "unknown-key-of-a-message",
        "unknown_key",
        {"messages": [{"role": "user", "content": "a", "hint": "c"}, *turns("a", "b")[1:]]},
        "chat",
    ),
    Bad(
        "a-bad-answer",
        "preference",
        {"train.jsonl": table(*map(line, [*GOOD["chat"], chat("a", "b", label=False)]))},
        "train.jsonl",
    ),
    jsonl("no-completion", "missing_key", {"prompt": "a"}),
    jsonl("no-prompt", "missing_key", {"completion": "a"}),
    jsonl("no-output", "missing_key", {"instruction": "a"}, "instruction"),
    jsonl("prompt-a-number", "wrong_type", pair(3, "b")),  # type: ignore[arg-type]
    jsonl("prompt-null", "missing_key", {"prompt": None, "completion": "b"}),
    jsonl(
        "input-a-list",
        "wrong_type",
        {"instruction": "a", "input": [], "output": "b"},
        "instruction",
    ),
    jsonl("messages-a-string", "wrong_type", {"messages": "a"}, "chat"),
    jsonl("no-messages", "wrong_type", {"messages": []}, "chat"),
    jsonl("message-a-string", "wrong_type", {"messages": ["a", "b"]}, "chat"),
    jsonl("content-a-number", "wrong_type", chat(3, "b"), "chat"),  # type: ignore[arg-type]
    jsonl("content-of-numbers", "wrong_type", chat([1], "b"), "chat"),  # type: ignore[arg-type]
    jsonl("label-a-float", "wrong_type", {"text": "a", "label": 0.5}, "classification"),
    jsonl("label-null", "mixed_formats", {"text": "a", "label": None}, "classification"),
    jsonl(
        "quality-a-word",
        "wrong_type",
        {**pair("a", "b"), "quality_score": "good"},
        config={"min_quality": 0.5},
    ),
    jsonl(
        "quality-beyond-floats",
        "wrong_type",
        {**pair("a", "b"), "quality_score": 10**400},
        config={"min_quality": 0.5},
    ),
    of_json("prompt-a-list-json", "wrong_type", {"prompt": ["a"], "completion": "b"}),
    of_parquet("completion-null-parquet", "missing_key", {"prompt": "a", "completion": None}),
    jsonl("text-among-pairs", "mixed_formats", {"text": "一段话"}),
    jsonl("chat-among-texts", "mixed_formats", chat("谁", "我"), "text"),
    # Empty texts
    jsonl("empty-prompt", "empty_prompt", pair("", "b")),
    jsonl("blank-prompt", "empty_prompt", pair(" \n\u3000", "b")),
    jsonl("empty-question", "empty_prompt", chat("", "b"), "chat"),
    jsonl("empty-instruction", "empty_prompt", {"instruction": "", "output": "b"}, "instruction"),
    of_csv("empty-prompt-csv", "empty_prompt", ",b", pair("", "b")),
    jsonl("empty-completion", "empty_completion", pair("a", "")),
    jsonl("blank-answer", "empty_completion", chat("a", "\t"), "chat"),
    jsonl("empty-label", "empty_completion", {"text": "a", "label": " "}, "classification"),
    of_csv("blank-completion-csv", "empty_completion", "a,  ", pair("a", "  ")),
    of_parquet("empty-completion-parquet", "empty_completion", pair("a", "")),
    jsonl("empty-text", "empty_text", {"text": ""}, "text"),
    jsonl("blank-text", "empty_text", {"text": "\n \n"}, "text"),
    of_json("empty-text-json", "empty_text", {"text": ""}, "text"),
    # Conversations
    jsonl(
        "unknown-role",
        "unknown_role",
        {"messages": [{"role": "narrator", "content": "a"}, *turns("a", "b")]},
        "chat",
    ),
    jsonl(
        "unknown-from",
        "unknown_role",
        {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "chat",
    ),
    jsonl("no-role", "unknown_role", {"messages": [{"content": "a"}, *turns("a", "b")]}, "chat"),
    jsonl("ends-with-the-user", "no_answer", chat("a", "b", "c"), "chat"),
    jsonl(
        "chatml-ends-with-the-user",
        "no_answer",
        {"text": "<|im_start|>user\na<|im_end|>\n"},
        "text",
    ),
    of_json("ends-with-the-user-json", "no_answer", chat("a", "b", "c"), "chat"),
    jsonl(
        "a-system-message-without-text",
        "empty_system",
        {"messages": [{"role": "system", "content": " "}, *turns("a", "b")]},
        "chat",
    ),
    jsonl("ends-with-context", "unlearned_end", {"messages": ENDS_WITH_CONTEXT}, "chat"),
    jsonl("all-context", "nothing_to_learn", {"messages": ENDS_WITH_CONTEXT[2:]}, "chat"),
    jsonl("an-answer-alone", "no_question", {"messages": turns("a", "b")[1:]}, "chat"),
    # Tools
    *(
        jsonl(name, "malformed_tool_call", row, "chat")
        for name, row in (
            ("arguments-no-json", calling([call("noon")])),
            ("arguments-broken-json", calling([call('{"city": ')])),
            ("arguments-a-list", calling([call([])])),
            ("arguments-a-list-in-json", calling([call("[]")])),
            ("a-call-without-a-name", calling([call({}, None)])),
            ("calls-no-list", calling("time")),
            ("calls-of-strings", calling(["time"])),
            ("a-function-that-tools-lacks", calling([call({}, "date")], tools=[TIME])),
            ("tools-no-list", calling([call({})], tools="time")),
            ("a-tool-without-a-name", calling([call({})], tools=[{"type": "function"}])),
            (
                "a-result-without-a-call",
                {"messages": [{"role": "tool", "content": "noon"}, *turns("a", "b")]},
            ),
        )
    ),
    # Labels and numbers
    jsonl(
        "unknown-label",
        "unknown_label",
        {"text": "a", "label": "丙"},
        "classification",
        config={"labels": ["甲", "乙"]},
    ),
    Bad(
        "unknown-label-csv",
        "unknown_label",
        {"train.csv": "text,label\n天空,甲\n大地,丙\n月亮,乙\n"},
        "train.csv:3",
        {"text": "大地", "label": "丙"},
        config={"labels": ["甲", "乙"]},
    ),
    jsonl(
        "low-quality",
        "low_quality",
        {**pair("a", "b"), "quality_score": 0.2},
        config={"min_quality": 0.5},
    ),
    of_parquet(
        "low-quality-parquet",
        "low_quality",
        {**pair("a", "b"), "quality_score": 0.2},
        config={"min_quality": 0.5},
    ),
    # The model's own tokens
    jsonl(
        "another-models-turn",
        "mixed_text",
        {"text": "前言<|start_header_id|>user<|end_header_id|>\n\n谁<|eot_id|>"},
        "text",
    ),
    jsonl("another-models-end", "mixed_text", pair("a", "b<|eot_id|>\n")),
    jsonl("token-in-a-prompt", "special_token", pair("a<|im_start|>system", "b")),
    jsonl("token-in-a-completion", "special_token", pair("a", "b<|endoftext|>c")),
    jsonl("token-in-a-text", "special_token", {"text": "一段<|im_end|>话"}, "text"),
    jsonl("token-in-a-system", "special_token", {"messages": [SYSTEM, *turns("a", "b")]}, "chat"),
    jsonl("token-in-a-question", "special_token", chat("a<|im_end|>", "b"), "chat"),
    jsonl("token-in-an-answer", "special_token", chat("a", "b<|im_end|>"), "chat"),
    jsonl(
        "token-in-a-result",
        "special_token",
        calling([call({})], "<|im_end|>noon"),
        "chat",
        strange=True,
    ),
    jsonl(
        "token-in-arguments",
        "special_token",
        calling([call({"x": "<|im_end|>"})]),
        "chat",
        strange=True,
    ),
    jsonl(
        "token-in-a-tool",
        "special_token",
        calling([call({})], tools=[{**TIME, "description": "<|im_end|>"}]),
        "chat",
        strange=True,
    ),
    of_csv("token-csv", "special_token", "a<|im_end|>,b", pair("a<|im_end|>", "b")),
    jsonl(
        "token-in-a-label",
        "special_token",
        {"text": "a", "label": "<|im_end|>"},
        "classification",
        config={"labels": ["甲", "<|im_end|>"], "label_prompt": "{{ text }}?"},
    ),
    # Lengths and templates
    jsonl("learned-by-none", "nothing_to_learn", pair(LONG, "b"), limit=100),
    jsonl("an-answer-too-long", "nothing_to_learn", pair("谁", LONG), limit=100),
    jsonl("an-answer-cut", "end_cut", chat("谁", "我", "谁", LONG), "chat", limit=100),
    jsonl("a-text-cut", "too_long", {"text": LONG}, "text", limit=100),
    jsonl("a-line-break-cut", "too_long", pair("谁" * 60, "我"), limit=0),
    jsonl("refused", "template_refuses", chat("refuse", "b"), "chat", strange=True),
    jsonl("a-question-left-out", "left_out_by_template", chat("hush", "b"), "chat", strange=True),
    jsonl("a-tool-left-out", "left_out_by_template", calling([call({})], tools=[TIME]), "chat"),
    jsonl("a-call-left-out", "left_out_by_template", calling([call({})]), "chat"),
    jsonl(
        "a-thought-left-out",
        "thought_left_out",
        {
            "messages": [
                *turns("a"),
                {"role": "assistant", "content": "b", "reasoning_content": "c"},
            ]
        },
        "chat",
    ),
    jsonl(
        "an-answer-rewritten",
        "answer_not_found",
        chat("a", "shout", "b", "c"),
        "chat",
        strange=True,
    ),
    jsonl("asked-otherwise", "asked_otherwise", chat("think", "b"), "chat", strange=True),
    jsonl("spelled", "spelled_characters", pair("𠮷𠮾𡃁𡈽𡌛", "𠮷𡃁")),
    Bad(
        "latin-among-han",
        "other_script",
        {"train.jsonl": table(*map(line, [*HAN, pair("who is it", "me")]))},
        "train.jsonl:31",
        pair("who is it", "me"),
        stays=30,
    ),
    # Rows beside each other
    jsonl("the-same-row", "duplicate", GOOD["completions"][0]),
    jsonl("the-same-text", "duplicate", GOOD["text"][0], "text"),
    jsonl("a-test-row", "leak", HELD_OUT["test"][0]),
    jsonl("a-valid-row-in-other-signs", "leak", pair("水为什么会结冰？", "因为天冷。")),
    of_csv("a-test-row-csv", "leak", "谁写了红楼梦,曹雪芹", HELD_OUT["test"][0]),
    Bad(
        "a-word-of-twenty",
        "near_leak",
        {
            "test.jsonl": line(pair(TWENTY, "yes")),
            "train.jsonl": table(line(GOOD["completions"][0]), line(NEARLY)),
        },
        "train.jsonl:2",
        NEARLY,
        stays=1,
    ),
    jsonl("the-same-question", "question_leak", pair("谁写了红楼梦", "清朝的一位小说家，名字忘了")),
    Bad(
        "one-label",
        "imbalance",
        {
            "train.jsonl": table(
                *(line({"text": row["prompt"], "label": "甲"}) for row in HAN[:29]),
                line({"text": HAN[29]["prompt"], "label": "乙"}),
            )
        },
        "train",
        stays=30,
        whole_file=True,
    ),
    Bad(
        "one-source",
        "imbalance",
        {
            "train.jsonl": table(
                *(line({**row, "source": "a"}) for row in HAN[:29]),
                line({**HAN[29], "metadata": {"source": "b"}}),
            )
        },
        "train",
        stays=30,
        whole_file=True,
    ),
    Bad("no-rows-to-train-on", "too_few_rows", {"train.jsonl": ""}, "train", stays=0),
]


# What is learned of the good rows.
ANSWERS = {row["completion"] for row in [*GOOD["completions"], *HELD_OUT["valid"], *HAN]} | {
    *(row["text"] for row in GOOD["text"]),
    *("曹雪芹", "yes", "甲", "乙", "很远"),
}


def allowing(action: str) -> list[Any]:
    """The table's entries whose check may have an action."""
    return [pytest.param(b, id=b.id) for b in TABLE if action in CHECKS[b.check][1].split()]


@pytest.fixture(scope="session")
def conf(repo: Path) -> Config:
    config: Config = to_dataclass(compose_config(repo / "conf", []))
    return config


@pytest.fixture(scope="session")
def strange(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that refuses a row, leaves out one, writes two otherwise."""
    folder = tmp_path_factory.mktemp("models") / "strange"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(
        "{%- if tools -%}{{ tools | tojson }}{%- endif -%}"
        "{%- for m in messages if m.content != 'hush' -%}"
        "{%- if m.content == 'refuse' -%}{{ raise_exception('no such word here') }}{%- endif -%}"
        "{%- if m.content == 'shout' -%}{{ '<|im_start|>ASSISTANT\nSHOUT<|im_end|>\n' }}"
        "{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{%- if m.tool_calls -%}{{ m.tool_calls | tojson }}{%- endif -%}{{ '<|im_end|>\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
        "{%- if messages[-1].content == 'think' -%}{{ '<think>' }}{%- endif -%}{%- endif -%}",
        encoding="utf-8",
    )
    return folder


@dataclass
class Shop:
    """Prepares files in a folder of their own."""

    folder: Path
    conf: Config
    model: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def write(self, files: Files) -> None:
        for name, content in files.items():
            path = self.data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def prepare(self, limit: int = 512, **changes: Any) -> Object:
        checks = {**self.conf.data.checks, **changes.pop("checks", {})}
        config = replace(
            self.conf,
            model=ModelConfig(str(self.model), None),
            data=replace(self.conf.data, checks=checks, **changes),
            train=replace(self.conf.train, max_seq_length=limit),
        )
        return prepare(self.data, self.folder / "out", config)

    def rows(self, name: str) -> list[Any]:
        return files_module.read_jsonl(self.folder / "out" / f"{name}.jsonl")

    def where(self, bad: Bad) -> str:
        return bad.at if bad.at in SPLITS else f"{self.data}/{bad.at}"


@pytest.fixture
def shop(tmp_path: Path, conf: Config, tiny: Path) -> Shop:
    shop = Shop(tmp_path, conf, tiny)
    shop.write({f"{split}.jsonl": table(*map(line, rows)) for split, rows in HELD_OUT.items()})
    return shop


def prepared(bad: Bad, action: str, shop: Shop, strange: Path) -> Object:
    """Prepares a bad folder with an action for its check."""
    shop.write(bad.files)
    shop.model = strange if bad.strange else shop.model
    limit = bad.limit
    if not limit:  # as many tokens as the bad row has, without the line break at its end
        limit = shop.prepare()["splits"]["train"]["longest_row"] - 1
    return shop.prepare(limit, checks={bad.check: action}, **bad.config)


def test_every_check_is_in_the_table() -> None:
    assert {bad.check for bad in TABLE} == set(CHECKS)
    assert len(TABLE) >= 50
    assert len({bad.id for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", allowing(STOP))
def test_stop_names_the_row_and_nothing_else(bad: Bad, shop: Shop, strange: Path) -> None:
    with pytest.raises(UserError) as raised:
        prepared(bad, STOP, shop, strange)
    listed = [text for text in str(raised.value).splitlines() if text.startswith("  ")]
    assert [text.partition(f": {bad.check}: ")[0] for text in listed] == [f"  {shop.where(bad)}"]


@pytest.mark.parametrize("bad", allowing(SKIP))
def test_skip_keeps_the_row_from_training(bad: Bad, shop: Shop, strange: Path) -> None:
    report = prepared(bad, SKIP, shop, strange)
    assert [(check["name"], check["rows"]) for check in report["checks"]] == [(bad.check, 1)]
    (rejected,) = shop.rows("rejected")
    assert rejected["where"].startswith(shop.where(bad))
    assert [reason["check"] for reason in rejected["reasons"]] == [bad.check]
    if not bad.whole_file:
        assert rejected["row"] == bad.row
    kept = {split: shop.rows(split) for split in SPLITS}
    assert {split: len(rows) for split, rows in kept.items()} == {
        "train": bad.stays,
        "valid": 1,
        "test": 1,
    }
    learned = [
        row["messages"][-1]["content"] if "messages" in row else row["text"]
        for row in kept["train"]
    ]
    assert set(learned) <= ANSWERS


@pytest.mark.parametrize("bad", allowing(WARN))
def test_warn_counts_the_row_and_keeps_it(bad: Bad, shop: Shop, strange: Path) -> None:
    report = prepared(bad, WARN, shop, strange)
    (check,) = report["checks"]
    assert (check["name"], check["action"], check["rows"]) == (bad.check, WARN, 1)
    assert [example["where"] for example in check["examples"]] == [shop.where(bad)]
    assert files_module.read_json(shop.folder / "out" / "report.json")["checks"] == [check]
    is_a_row = not bad.whole_file and bad.check != "unreadable_file"
    assert len(shop.rows("train")) == bad.stays + is_a_row
    assert shop.rows("rejected") == []


ONE = [chat("a", "b")]
MENDED: list[tuple[str, Files, list[Object]]] = [
    ("encoding", {"train.jsonl": line(pair("a", "b")).encode("utf-16")}, ONE),
    ("encoding", {"train.csv": "prompt,completion\na,b\n".encode("utf-16-le")}, ONE),
    (
        "encoding",
        {"train.jsonl": WRITTEN.encode("gb18030")},
        [chat("月亮的光是什么", "是太阳的光")],
    ),
    ("delimiter", {"train.csv": "prompt;completion\na;b\n"}, ONE),
    ("delimiter", {"train.csv": "prompt\tcompletion\ra\tb\r"}, ONE),
    (
        "byte_order_mark",
        {"train.jsonl": codecs.BOM_UTF8 + line(pair("a", "b")).encode()},
        [chat("a", "b")],
    ),
    (
        "byte_order_mark",
        {"train.json": codecs.BOM_UTF8 + line([pair("a", "b")]).encode()},
        [chat("a", "b")],
    ),
    (
        "byte_order_mark",
        {"train.csv": codecs.BOM_UTF8 + b"prompt,completion\na,b\n"},
        [chat("a", "b")],
    ),
    (
        "byte_order_mark",
        {"train.md": codecs.BOM_UTF8 + b"# A\n\nb\n"},
        [{"messages": [{"role": "system", "content": "A"}, {"role": "assistant", "content": "b"}]}],
    ),
    ("several_objects", {"train.jsonl": TWO}, [chat("海水为什么咸", "有盐"), chat("谁", "我")]),
    (
        "several_objects",
        {"train.jsonl": '{"text": "a", "label": "x"} {"text": "b", "label": "y"}'},
        [
            {**chat("a\n\nLabel (x, y):", "x"), "label": "x"},
            {**chat("b\n\nLabel (x, y):", "y"), "label": "y"},
        ],
    ),
    ("split_object", {"train.jsonl": OVER_LINES}, [chat("海水为什么咸", "有盐")]),
    (
        "split_object",
        {"train.jsonl": json.dumps(chat("a", "b"), indent=2) + "\n" + line(chat("c", "d"))},
        [chat("a", "b"), chat("c", "d")],
    ),
    ("half_character", {"train.jsonl": line(pair("好\ud83d", "b"))}, [chat("好\ufffd", "b")]),
    ("half_character", {"train.json": line([{"text": "\ude00好"}])}, [{"text": "\ufffd好"}]),
    ("no_answer", {"train.jsonl": line(chat("a", "b", "c"))}, [chat("a", "b")]),
    (
        "no_answer",
        {"train.jsonl": line({"conversations": turns("a", "b", "c"), "id": "d"})},
        [chat("a", "b")],
    ),
    (
        "no_answer",
        {
            "train.jsonl": line(
                {
                    "text": "".join(
                        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
                        for m in turns("a", "b", "c")
                    )
                }
            )
        },
        [chat("a", "b")],
    ),
    (
        "empty_system",
        {"train.jsonl": line({"messages": [{"role": "system", "content": ""}, *turns("a", "b")]})},
        [chat("a", "b")],
    ),
    (
        "empty_system",
        {"train.jsonl": line({"系统提示": " ", "问题": "a", "回答": "b"})},
        [chat("a", "b")],
    ),
    (
        "preference",
        {"train.jsonl": line({"prompt": "a", "chosen": "b", "rejected": "c"})},
        [chat("a", "b")],
    ),
    (
        "unlearned_end",
        {"train.jsonl": line({"messages": ENDS_WITH_CONTEXT})},
        [chat("a", "b")],
    ),
    ("special_token", {"train.jsonl": line(pair("a<|im_end|>", "b"))}, [chat("a", "b")]),
    ("special_token", {"train.jsonl": line({"text": "a<|im_start|>b"})}, [{"text": "ab"}]),
    (
        "special_token",
        {"train.jsonl": line(pair("a<|im_<|im_end|>end|>", "b"))},
        [chat("a", "b")],
    ),
]


@pytest.mark.parametrize(("check", "files", "mended"), MENDED)
def test_fix_mends_the_row(check: str, files: Files, mended: list[Object], shop: Shop) -> None:
    shop.write(files)
    report = shop.prepare(checks={check: FIX})
    assert shop.rows("train") == mended
    assert shop.rows("rejected") == []
    (counted,) = files_module.read_json(shop.folder / "out" / "report.json")["checks"]
    assert (counted["name"], counted["action"], counted["rows"]) == (check, FIX, 1)
    assert report["rows"]["rejected"] == 0


def test_a_file_without_known_columns_is_one_problem_that_names_its_settings(shop: Shop) -> None:
    rows: list[Object] = [{"frage": f"{question}?", "antwort": "ja", "id": 1} for question in POOL]
    shop.write({"train.jsonl": table(*map(line, rows))})
    with pytest.raises(UserError) as raised:
        shop.prepare()
    assert raised.value.code == "prepare.faults"  # no advice to skip
    (listed,) = str(raised.value).splitlines()[1:]
    assert listed.startswith(f"  {shop.data}/train.jsonl: unknown_columns: ")
    assert "'frage', 'antwort', 'id'; its first row: {" in listed
    assert rows[0]["frage"] in listed
    assert f"({len(rows)} rows)" in listed
    settings = dict(re.findall(r"data\.(\w+_feature)=(\w+)", listed))
    assert settings == {"prompt_feature": "frage", "completion_feature": "antwort"}
    assert 'prompt_feature: "frage", completion_feature: "antwort"' in listed
    report = shop.prepare(**settings)
    assert report["rows"]["kept"] == len(rows) + 2


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"gespräch": turns("a", "b")}, "data.chat_feature=gespräch"),
        ({"question": "a", "antwort": "b"}, "data.completion_feature=antwort"),
        ({"was fragt er": "a", "it's": "b"}, 'prompt_feature: "was fragt er"'),
        ({"brief": "a"}, "data.text_feature=brief"),
        ({"prompt": "a"}, "data.text_feature=prompt"),
        ({"review": "a", "label": "b"}, "data.text_feature=review data.label_feature=label"),
        ({"system": "s", "question": "a", "antwort": "b"}, "data.completion_feature=antwort"),
        ({"null": "a", "True": "b"}, "data.prompt_feature='\"'\"'null'\"'\"'"),
        ({"${q}": "a", "b": "b"}, "rename its columns"),
        ({"id": "a", "data": ["b", "c"]}, "data.format=template"),
        ({"prompt": None, "completion": "b"}, "null under 'prompt'"),
        ({"data": [pair("a", "b")]}, "put the list itself into the file"),
        ({"zahl": 5}, "data.format=template"),
        ({}, "data.format=template"),
    ],
)
def test_the_settings_for_unknown_columns(row: Object, advice: str, shop: Shop) -> None:
    shop.write({"train.jsonl": line(row)})
    with pytest.raises(UserError, match=re.escape(advice)):
        shop.prepare()


def test_a_key_that_is_not_read_is_one_line_with_its_rows(shop: Shop) -> None:
    first, second = ({**pair(*exchange), "hint": "x"} for exchange in EXCHANGES)
    rows = [first, {**second, "mood": "y"}]
    shop.write({"train.jsonl": table(*map(line, rows))})
    (check,) = shop.prepare()["checks"]
    assert (check["name"], check["rows"], check["problems"]) == ("unknown_key", 3, 2)
    assert [(example["where"], example["text"]) for example in check["examples"]] == [
        (f"{shop.data}/train.jsonl:1", "'hint' is not read (2 rows)"),
        (f"{shop.data}/train.jsonl:2", "'mood' is not read (1 row)"),
    ]
    assert shop.prepare(checks={"unknown_key": "ignore"})["checks"] == []


def test_marked_answers_are_counted_and_the_good_ones_learned(shop: Shop) -> None:
    marked = [chat(q, a, label=number % 2 == 0) for number, (q, a) in enumerate(EXCHANGES * 2)]
    shop.write({"train.jsonl": table(*map(line, marked))})
    with pytest.raises(UserError) as raised:
        shop.prepare()
    (listed,) = str(raised.value).splitlines()[1:]
    assert listed.startswith(f"  {shop.data}/train.jsonl: preference: 'label' is false")
    assert listed.endswith("(2 rows)")
    assert "data.checks.preference=fix" in listed
    shop.prepare(checks={"preference": FIX, "duplicate": WARN})
    assert shop.rows("train") == [chat(*EXCHANGES[0])] * 2
    assert [row["row"]["label"] for row in shop.rows("rejected")] == [False, False]


def test_every_fix_is_tried() -> None:
    fixable = {name for name, (_, actions) in CHECKS.items() if FIX in actions.split()}
    assert {check for check, *_ in MENDED} == fixable


@pytest.mark.parametrize("answer", ["<|im_end|>", " <|endoftext|>\n"])
def test_nothing_is_learned_where_a_fix_leaves_nothing(answer: str, shop: Shop) -> None:
    shop.write({"train.jsonl": table(line(pair("a", answer)), line(pair("c", "d")))})
    shop.prepare(checks={"special_token": FIX, "empty_completion": SKIP})
    assert shop.rows("train") == [chat("c", "d")]
    assert [row["row"] for row in shop.rows("rejected")] == [pair("a", answer)]


def test_a_fix_that_fails_loses_no_row(shop: Shop) -> None:
    only_a_question = {"conversations": turns("a"), "text": 5}
    shop.write({"train.jsonl": table(line(chat("a", "b")), line(only_a_question))})
    shop.prepare(checks={"no_answer": FIX, "wrong_type": SKIP})
    assert [row["row"] for row in shop.rows("rejected")] == [only_a_question]
    assert shop.rows("train") == [chat("a", "b")]


MEANT = [call({"zone": "UTC"})]
TOOL_CHAT = {
    "messages": [
        {"role": "user", "content": "几点了"},
        {"role": "assistant", "content": "", "tool_calls": MEANT},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "十二点"},
    ],
    "tools": [TIME],
}
ASKED = chat("a", "b")
WITH_SYSTEM = {"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]}
LABELLED = [
    {**chat("a\n\nLabel (x, y):", "x"), "label": "x"},
    {**chat("b\n\nLabel (x, y):", "y"), "label": "y"},
]
WIKISQL = {
    "question": "How many?",
    "table": {"name": "cars", "header": ["make", "year"]},
    "sql": "SELECT COUNT(*) FROM cars",
}
INSTRUCTED = {"instruction": "Translate", "output": "b"}
SPEECH = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TEMPLATE = {
    "system": None,
    "prompt": "table: {{ table.name }}\ncolumns: {{ table.header | join(', ') }}\n{{ question }}",
    "completion": "{{ sql }}",
    "text": None,
}

CANONICAL: dict[str, tuple[str, str | bytes, Object, list[Object]]] = {
    "messages": ("jsonl", line(ASKED), {}, [ASKED]),
    "system": ("jsonl", line(WITH_SYSTEM), {}, [WITH_SYSTEM]),
    "system-as-a-key": ("jsonl", line({**ASKED, "system": "s"}), {}, [WITH_SYSTEM]),
    "conversations": ("jsonl", line({"conversations": turns("a", "b")}), {}, [ASKED]),
    "from-value": ("jsonl", line({"conversations": SPEECH}), {}, [ASKED]),
    "content-in-parts": (
        "jsonl",
        line(chat([{"type": "text", "text": "a"}], "b")),  # type: ignore[arg-type]
        {},
        [ASKED],
    ),
    "tools": ("jsonl", line(TOOL_CHAT), {}, [TOOL_CHAT]),
    "tools-as-text": (
        "jsonl",
        line(
            calling(
                [{"function": {"name": "time", "arguments": '{"zone": "UTC"}'}}], tools=line([TIME])
            )
        ),
        {},
        [TOOL_CHAT],
    ),
    "completions": ("jsonl", line(pair("a", "b")), {}, [ASKED]),
    "other-keys": (
        "jsonl",
        line({"问": "a", "答": "b"}),
        {"prompt_feature": "问", "completion_feature": "答"},
        [ASKED],
    ),
    "other-chat-key": (
        "jsonl",
        line({"dialog": turns("a", "b")}),
        {"chat_feature": "dialog"},
        [ASKED],
    ),
    "text": ("jsonl", line({"text": " a\n"}), {}, [{"text": " a\n"}]),
    "chatml": (
        "jsonl",
        line({"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"}),
        {},
        [ASKED],
    ),
    "instruction": ("jsonl", line(INSTRUCTED), {}, [chat("Translate", "b")]),
    "instruction-with-input": (
        "jsonl",
        line({**INSTRUCTED, "input": "a"}),
        {},
        [chat("Translate\n\na", "b")],
    ),
    "classification": (
        "jsonl",
        table(*(line({"text": text, "label": label}) for text, label in ("ax", "by"))),
        {},
        LABELLED,
    ),
    "classification-csv": ("csv", "text,label\na,x\nb,y\n", {}, LABELLED),
    "labels-of-numbers": (
        "jsonl",
        line({"text": "a", "label": 1}),
        {"labels": ["0", "1"], "label_prompt": "{{ text }} {{ labels }}"},
        [{**chat("a ['0', '1']", "1"), "label": "1"}],
    ),
    "template": (
        "jsonl",
        line(WIKISQL),
        {"format": "template", "template": TEMPLATE},
        [chat("table: cars\ncolumns: make, year\nHow many?", "SELECT COUNT(*) FROM cars")],
    ),
    "csv": ("csv", 'prompt,completion\n"a, ""b""\nc",d\n', {}, [chat('a, "b"\nc', "d")]),
    "csv-with-messages": (
        "csv",
        'messages\n"' + line(turns("a", "b")).replace('"', '""') + '"\n',
        {},
        [ASKED],
    ),
    "json": (
        "json",
        json.dumps([pair("a", "b"), pair("c", "d")], indent=1),
        {},
        [ASKED, chat("c", "d")],
    ),
    "json-of-one": ("json", line(pair("a", "b")), {}, [ASKED]),
    "parquet": ("parquet", parquet_bytes([pair("a", "b")]), {}, [ASKED]),
    "parquet-of-messages": ("parquet", parquet_bytes([ASKED]), {}, [ASKED]),
    "md": (
        "md",
        "---\ntitle: 茶\n---\n\n## 水\n\n要热。\n\n- 但\n- 不沸\n",
        {},
        [
            {
                "messages": [
                    {"role": "system", "content": "茶 › 水"},
                    {"role": "assistant", "content": "要热。\n\n- 但\n- 不沸"},
                ]
            }
        ],
    ),
}


@pytest.mark.parametrize(
    ("suffix", "content", "config", "rows"), CANONICAL.values(), ids=CANONICAL.keys()
)
def test_good_rows_in_the_one_form(
    suffix: str, content: str | bytes, config: Object, rows: list[Object], shop: Shop
) -> None:
    shutil.rmtree(shop.data)
    shop.write({f"train.{suffix}": content, f"valid.{suffix}": content})
    report = shop.prepare(checks={"leak": WARN, "left_out_by_template": WARN}, **config)
    assert {check["name"] for check in report["checks"]} - {"left_out_by_template"} == {"leak"}
    assert shop.rows("train") == rows
    assert shop.rows("valid") == rows


def test_the_wikisql_template_is_the_one_in_conf(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    data = to_dataclass(compose_config(Path("conf"), ["data=wikisql"]).data)
    assert (data.format, data.template) == ("template", TEMPLATE)


# ---- Faults that touch more than their own row


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"}]\n[{"text": "b"}]',
        '[{"text": "a"}] b',
        '[{"text": "a"},\n',
        '[{"text": "a"}',
    ],
    ids=["two-lists", "something-behind", "half-a-list", "no-end"],
)
def test_a_list_ends_where_its_file_does(text: str, shop: Shop) -> None:
    shop.write({"train.json": text})
    with refused("prepare.faults_of_rows") as caught:
        shop.prepare()
    assert "invalid_json" in caught.value.facts["checks"]


def test_a_header_that_cannot_be_read_ends_its_file(shop: Shop) -> None:
    """The line below a header is no header."""
    good = table(*map(line, GOOD["completions"]))
    rows = "é,à\nprompt,completion\na,b\n".encode("latin-1")
    shop.write({"train/a.csv": rows, "train/b.jsonl": good})
    shop.prepare(checks={"invalid_utf8": SKIP, "unreadable_file": WARN})
    assert len(shop.rows("train")) == 2


@pytest.mark.parametrize(
    ("check", "row"),
    [
        ("mixed_formats", {"text": "b"}),
        ("image", {"image": "a.png", "label": "x"}),
        ("several_objects", '{"text": "b", "label": "x"} {"text": "c", "label": "x"}'),
        ("half_character", {"text": "b", "label": "\ud83d"}),
    ],
)
def test_a_rejected_row_changes_no_labels(check: str, row: Any, shop: Shop) -> None:
    first, last = ({"text": text, "label": label} for text, label in ("ax", "by"))
    bad = row if isinstance(row, str) else line(row)
    shop.write({"train.jsonl": table(line(first), bad, line(last))})
    shop.prepare(checks={check: SKIP})
    assert shop.rows("train") == LABELLED


def test_a_rejected_row_gives_its_file_no_format(shop: Shop) -> None:
    image = line({"image": "a.png", "caption": "b"})
    shop.write({"train.jsonl": table(image, *map(line, GOOD["completions"]))})
    report = shop.prepare(checks={"image": SKIP})
    assert [check["name"] for check in report["checks"]] == ["image"]


HALF = {"name": "\ud83d"}


@pytest.mark.parametrize(
    "row",
    [
        {**pair("a", "b"), "source": "\ud83d"},
        {**pair("a", "b"), "metadata": {"source": "\ud83d"}},
        calling([call({})], tools=[HALF]),
        calling([call({}, "\ud83d")], tools=[HALF]),
    ],
    ids=["source", "metadata", "name-of-a-tool", "name-in-a-call"],
)
def test_half_a_character_in_a_report(row: Object, shop: Shop) -> None:
    first = chat("c", "d") if "messages" in row else pair("c", "d")
    shop.write({"train.jsonl": table(line(first), line(row))})
    checks = dict.fromkeys(("mixed_formats", "malformed_tool_call", "half_character"), SKIP)
    report = shop.prepare(checks=checks)
    assert json.dumps(report, ensure_ascii=False).encode()
    assert files_module.read_json(shop.folder / "out" / "report.json")["rows"] == report["rows"]


def test_a_question_that_cleaning_empties(shop: Shop) -> None:
    shop.write({"train.jsonl": table(line(pair("<br>", "b")), line(pair("c", "d")))})
    shop.prepare(checks={"empty_prompt": SKIP}, clean={"html": True})
    assert shop.rows("train") == [chat("c", "d")]


def test_augmented_copies_are_no_duplicates(shop: Shop) -> None:
    shop.write({"train.jsonl": line(pair("你 高兴 吗", "b"))})
    augmentation: Object = {
        "synonyms": {"高兴": ["快乐"]},
        "augment_copies": 3,
        "augment_share": 1.0,
    }
    shop.prepare(checks={"duplicate": STOP}, **augmentation)
    assert shop.rows("train") == [chat("你 高兴 吗", "b"), chat("你 快乐 吗", "b")]


# ---- Rows and files that nobody thought of

LENIENT = {
    name: next((action for action in (SKIP, WARN) if action in actions.split()), STOP)
    for name, (_, actions) in CHECKS.items()
}
MENDING = {
    name: FIX if FIX in actions.split() else LENIENT[name] for name, (_, actions) in CHECKS.items()
}
KEYS = [
    "messages",
    "role",
    "content",
    "tool_calls",
    "function_call",
    "function",
    "name",
    "arguments",
    "tools",
    "text",
    "label",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "conversations",
    "from",
    "value",
    "quality_score",
    "images",
    "image_url",
    "type",
    "system",
    "metadata",
    "source",
]
TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "tool",
        "function",
        "<|im_end|>",
        "[",
        "{}",
        '{"a": 1}',
        "\ud83d",
        "<|im_start|>user\na<|im_end|>\n",
        "<|im_<|im_end|>end|>",
        "a\n1\r2",
        "image",
        "1\t2",
        "",
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), True, False, 0.0])
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=5)
    ),
    max_leaves=12,
)
FUNCTIONS = st.fixed_dictionaries({}, optional={"name": TEXTS | VALUES, "arguments": VALUES})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        **{
            key: st.sampled_from(["user", "assistant", "tool", "gpt"]) | VALUES
            for key in ("role", "from")
        },
        **dict.fromkeys(("content", "value"), TEXTS | VALUES),
        "tool_calls": st.lists(
            FUNCTIONS | st.fixed_dictionaries({"function": FUNCTIONS}), max_size=2
        )
        | VALUES,
    },
)
ROWS = (
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(
                ("prompt", "completion", "text", "label", "source", "output"), TEXTS | VALUES
            ),
            **dict.fromkeys(("instruction", "input", "images", "system", "metadata"), VALUES),
            "quality_score": NUMBERS | VALUES,
            "tools": st.lists(FUNCTIONS, max_size=2) | VALUES,
        },
    )
    | st.fixed_dictionaries(
        {"messages": st.lists(MESSAGES, max_size=4) | VALUES},
        optional={"tools": st.lists(FUNCTIONS, max_size=2) | VALUES, "text": TEXTS | VALUES},
    )
    | VALUES
)
LISTS = st.lists(ROWS, max_size=6)
TEMPLATES = b'{"prompt": "a", "completion": "b"}', b"prompt,completion\na,b\n", b"# a\n\nb\n"
PIECES = st.sampled_from(
    [
        *TEMPLATES,
        codecs.BOM_UTF8,
        b"\xff\xfe",
        b"\n",
        b"\r",
        b"\x00",
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"---\n",
    ]
)
CONTENTS = st.binary(max_size=60) | st.lists(PIECES | st.binary(max_size=6), max_size=10).map(
    b"".join
)
MANY = int(os.environ.get("ATHANOR_EXAMPLES", "1"))  # times as many examples


def fuzzed(count: int) -> Callable[[Any], Any]:
    return examples(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=count * MANY,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


Try = Callable[[str, bytes, dict[str, str]], None]


@pytest.fixture(scope="session")
def through(conf: Config, tiny: Path) -> Try:
    """Takes a train file through both passes, beside good rows of all splits."""
    tokenizer = load_tokenizer(tiny)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    def run(suffix: str, content: bytes, checks: dict[str, str]) -> None:
        config = replace(
            conf,
            data=replace(conf.data, checks=checks, min_quality=0.5),
            train=replace(conf.train, max_seq_length=64),
        )
        with tempfile.TemporaryDirectory() as name:
            data, out = Path(name, "data"), Path(name, "out")
            out.mkdir()
            shop = Shop(Path(name), conf, tiny)
            shop.write({f"{split}.jsonl": table(*map(line, HELD_OUT[split])) for split in HELD_OUT})
            shop.write(
                {f"train.{suffix}": content, "train/good.jsonl": line(GOOD["completions"][0])}
            )
            with (out / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
                findings = Findings(checks, rejected)
                read, _ = origins.find_files(data, count, config.data.article_tokens, [], LIMITS)
                first = FirstPass(read, config, tokenizer, tokenizer.eos_token_id, findings)
                tally = first.run(out)
                compare_rows(tally, config.data, findings, out)
            accounted(tally, findings, out)

    return run


def accounted(tally: Tally, findings: Findings, out: Path) -> None:
    """Every record is either in a split or in rejected.jsonl, but for files that can't be read."""
    kept = sum(len(files_module.read_jsonl(out / f"{split}.jsonl")) for split in SPLITS)
    rejected = len(files_module.read_jsonl(out / "rejected.jsonl"))
    assert kept == len(tally.rows)
    assert rejected == findings.rejected
    assert kept + rejected + findings.counts["unreadable_file"] >= sum(tally.read)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "md", "parquet"])
@fuzzed(25)
@given(content=CONTENTS)
def test_any_bytes(suffix: str, content: bytes, through: Try) -> None:
    for checks in (LENIENT, MENDING):
        through(suffix, content, checks)


@fuzzed(80)
@given(rows=LISTS, whole=st.booleans())
def test_any_json(rows: list[Any], whole: bool, through: Try) -> None:
    text = line(rows) if whole else table(*map(line, rows))
    for checks in (LENIENT, MENDING):
        through("json" if whole else "jsonl", text.encode(), checks)


@fuzzed(12)
@given(rows=LISTS, content=CONTENTS, suffix=st.sampled_from(origins.SUFFIXES))
def test_any_folder_is_prepared_or_refused(
    rows: list[Any], content: bytes, suffix: str, conf: Config, tiny: Path
) -> None:
    with tempfile.TemporaryDirectory() as name:
        shop = Shop(Path(name), conf, tiny)
        shop.write({f"{split}.jsonl": table(*map(line, HELD_OUT[split])) for split in HELD_OUT})
        shop.write({"train/a.jsonl": table(*map(line, [*rows, *GOOD["completions"]]))})
        shop.write({f"train/b{suffix}": content})
        for checks in (LENIENT, MENDING, {}):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    report = shop.prepare(checks=checks, min_quality=0.5)
                except UserError as error:
                    str(error).encode()
                else:
                    assert (
                        files_module.read_json(shop.folder / "out" / "report.json")["rows"]
                        == report["rows"]
                    )
