"""Rows in every notation that people have them in are read as the same conversations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from athanor.chat.conversation import Conversation
from athanor.config.compose import compose_config
from athanor.config.schema import DataConfig
from athanor.config.values import to_dataclass
from athanor.prepare.chats import Reading
from athanor.prepare.checks import Fault
from athanor.prepare.formats import Formats, without_nulls
from athanor.prepare.origins import Origin, find_dataset, find_files
from athanor.prepare.streams import Limits
from athanor.prepare.text_forms import find_form, read_text

Object = dict[str, Any]


@pytest.fixture(scope="module")
def config(repo: Path) -> DataConfig:
    config: DataConfig = to_dataclass(compose_config(repo / "conf", []).data)
    return config


@pytest.fixture(scope="module")
def formats(config: DataConfig) -> Formats:
    return Formats(config, [])


def read(value: Any, formats: Formats, *fixes: str) -> tuple[Object, Reading]:
    """The line of a record, and what was found in it."""
    value = without_nulls(value)
    reading = Reading(formats.columns, frozenset(fixes))
    layout = formats.layout(value, formats.config.format)
    row = formats.row(value, layout, reading).conversation
    line: Object = json.loads(row.line())
    assert Conversation.of(line) == row
    return line, reading


def turn(role: str, content: str, **more: Any) -> Object:
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "a"), turn("assistant", "b")]
BRIEF = turn("system", "s")
BEFORE = [turn("user", "q"), turn("assistant", "r")]
UNLEARNED = [turn("user", "q"), turn("assistant", "r", weight=0), *ASKED]
THOUGHTFUL = [turn("user", "a"), turn("assistant", "b", reasoning_content="t")]
CONTEXT = [turn("user", "a\n\nc"), turn("assistant", "b")]


def called(**arguments: Any) -> Object:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


CALLING = [
    turn("user", "a"),
    turn("assistant", "", tool_calls=[called(x=1)]),
    turn("tool", "r"),
    turn("assistant", "b"),
]
LINKED = [
    turn("user", "a"),
    turn("assistant", "k", tool_calls=[called(x=1) | {"id": "1"}], reasoning_content="t"),
    turn("tool", "r", tool_call_id="1"),
    turn("assistant", "b"),
]
F = {"name": "f", "parameters": {"type": "object"}}
NEUTRAL = {"type": "function", "function": F}

NO_ARGUMENTS: list[Any] = [None, "", "null", "{}", {}]

CHATS: dict[str, tuple[Object, list[Object]]] = {
    # Names of columns
    "dolly": ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, CONTEXT),
    "dolly-without-context": ({"instruction": "a", "context": "", "response": "b"}, ASKED),
    "alpaca-in-chinese": ({"指令": "a", "输入": "c", "输出": "b"}, CONTEXT),
    "input-alone-is-the-question": ({"instruction": "", "input": "a", "output": "b"}, ASKED),
    "instruction-null": ({"instruction": None, "input": "a", "output": "b"}, ASKED),
    "instruction-and-question": ({"instruction": "a", "question": "c", "answer": "b"}, CONTEXT),
    **{
        f"{question}-{answer}": ({question: "a", answer: "b", "id": 7}, ASKED)
        for question, answer in (
            ("question", "answer"),
            ("Question", "Answer"),
            ("QUESTION", "ANSWER"),
            (" ｑｕｅｓｔｉｏｎ", "answer "),
            ("query", "response"),
            ("问题", "答案"),
            ("问", "答"),
            ("提问", "回答"),
            ("input", "output"),
            ("输入", "输出"),
            ("q", "a"),
            ("user", "assistant"),
            ("human", "bot"),
            ("prompt", "response"),
            ("prompt", "chosen"),
            ("User Input", "model-output"),
        )
    },
    "squad": (
        {
            "id": "1",
            "question": "a",
            "context": "c",
            "answers": {"text": ["b"], "answer_start": [3]},
        },
        CONTEXT,
    ),
    "several-documents": (
        {"question": "a", "documents": ["c", "d"], "answer": "b"},
        [turn("user", "a\n\nc\n\nd"), turn("assistant", "b")],
    ),
    "system": ({"system_prompt": "s", "question": "a", "response": "b"}, [BRIEF, *ASKED]),
    # Earlier turns
    "history": ({"query": "a", "response": "b", "history": [["q", "r"]]}, [*BEFORE, *ASKED]),
    "history-of-alpaca": (
        {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["q", "r"]]},
        [BRIEF, *BEFORE, *ASKED],
    ),
    "history-as-text": (
        {"问题": "a", "回答": "b", "历史": '[["q", "r"]]'},
        [*BEFORE, *ASKED],
    ),
    "history-of-messages": (
        {"query": "a", "response": "b", "history": BEFORE},
        [*BEFORE, *ASKED],
    ),
    "history-of-objects": (
        {"query": "a", "response": "b", "history": [{"query": "q", "response": "r"}]},
        [*BEFORE, *ASKED],
    ),
    "no-history": ({"query": "a", "response": "b", "history": []}, ASKED),
    # Roles and keys of messages
    **{
        f"{asking}-{answering}": (
            {"conversations": [{"from": asking, "value": "a"}, {"from": answering, "value": "b"}]},
            ASKED,
        )
        for asking, answering in (
            ("User", "Assistant"),
            ("USER", "ASSISTANT"),
            ("prompter", "assistant"),
            ("Human", "ai"),
            ("human", "gpt"),
            ("user", "chatbot"),
            ("用户", "助手"),
            ("人类", "模型"),
        )
    },
    "speaker-and-text": (
        {"dialog": [{"speaker": "用户", "text": "a"}, {"speaker": "机器人", "text": "b"}]},
        ASKED,
    ),
    "pairs": ({"conversation": [["q", "r"], ["a", "b"]]}, [*BEFORE, *ASKED]),
    "objects-of-pairs": ({"conversation": [{"human": "a", "assistant": "b"}]}, ASKED),
    "developer": ({"messages": [turn("developer", "s"), *ASKED]}, [BRIEF, *ASKED]),
    "系统": ({"对话": [{"角色": "系统", "内容": "s"}, *ASKED]}, [BRIEF, *ASKED]),
    "messages-as-text": ({"messages": json.dumps(ASKED)}, ASKED),
    "null-system": (
        {"messages": [{"role": "system", "content": None}, *ASKED]},
        [turn("system", ""), *ASKED],
    ),
    "prompt-and-completion-of-messages": ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    # Thoughts
    **{
        f"{key}-of-a-message": (
            {"messages": [turn("user", "a"), turn("assistant", "b", **{key: "t"})]},
            THOUGHTFUL,
        )
        for key in ("thinking", "reasoning", "reasoning_content", "think", "thought", "思考")
    },
    "thought-of-a-chat": ({"messages": ASKED, "reasoning": "t"}, THOUGHTFUL),
    "thought-of-a-pair": ({"Question": "a", "Complex_CoT": "t", "Response": "b"}, THOUGHTFUL),
    # What is learned
    **{
        f"{key}-{value}": ({"messages": [*BEFORE[:1], BEFORE[1] | {key: value}, *ASKED]}, UNLEARNED)
        for key, value in (
            ("weight", 0),
            ("weight", 0.0),
            ("weight", "0"),
            ("train_on_turn", False),
            ("is_masked", True),
            ("train", False),
            ("loss", False),
            ("trainable", False),
            ("Train", "false"),
            ("loss_scale", 0),
            ("mask", True),
            ("mask", 1),
        )
    },
    "all-is-learned": (
        {"messages": [*BEFORE[:1], BEFORE[1] | {"weight": 1, "loss": None}, *ASKED]},
        [*BEFORE, *ASKED],
    ),
    "weights-of-questions": ({"messages": [ASKED[0] | {"train": False}, ASKED[1]]}, ASKED),
    "mask-of-messages": ({"messages": [*BEFORE, *ASKED], "loss_mask": [0, 0, 0, 1]}, UNLEARNED),
    "mask-of-answers": ({"messages": [*BEFORE, *ASKED], "loss_mask": [0, 1]}, UNLEARNED),
    "mask-with-a-system": (
        {"messages": [BRIEF, *BEFORE, *ASKED], "loss_mask": "[0, 0, 0, 0, 1]"},
        [BRIEF, *UNLEARNED],
    ),
    "weight-of-a-row": (
        {"messages": ASKED, "weight": "0"},
        [ASKED[0], ASKED[1] | {"weight": 0}],
    ),
    "mask-of-a-pair": (
        {"prompt": "a", "completion": "b", "mask": True},
        [ASKED[0], ASKED[1] | {"weight": 0}],
    ),
    # Calls of tools
    "sharegpt-call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "b"},
            ]
        },
        CALLING,
    ),
    "traditional": ({"對話": [turn("使用者", "a"), turn("助理", "b")]}, ASKED),
    "traditional-context": (
        {"問題": "a", "輸入": "c", "答案": "b"},
        [turn("user", "a\n\nc"), ASKED[1]],
    ),
    "hermes-call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {
                    "from": "gpt",
                    "value": '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
                },
                {"from": "tool", "value": "<tool_response>\nr\n</tool_response>"},
                {"from": "gpt", "value": "b"},
            ]
        },
        CALLING,
    ),
    "tagged-call": (
        {
            "messages": [
                turn("user", "a"),
                turn("tool_call", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'),
                *CALLING[2:],
            ]
        },
        CALLING,
    ),
    "call-of-an-object": (
        {
            "messages": [
                turn("user", "a"),
                {"role": "tool_call", "content": {"name": "f", "parameters": {"x": 1}}},
                turn("ipython", "r"),
                turn("assistant", "b"),
            ]
        },
        CALLING,
    ),
    "calls-side-by-side": (
        {
            "messages": [
                turn("user", "a"),
                turn("tool_call", '{"name": "f", "arguments": {"x": 1}}'),
                turn("tool_call", '{"name": "f", "arguments": "{}"}'),
                turn("tool_response", "r"),
                turn("tool_response", "r"),
                turn("assistant", "b"),
            ]
        },
        [
            turn("user", "a"),
            turn("assistant", "", tool_calls=[called(x=1), called()]),
            turn("tool", "r"),
            turn("tool", "r"),
            turn("assistant", "b"),
        ],
    ),
    **{
        f"arguments-{json.dumps(value)}": (
            {
                "messages": [
                    turn("user", "a"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": value}}],
                    },
                    turn("tool", "r", name="f"),
                    turn("assistant", "b"),
                ]
            },
            [
                turn("user", "a"),
                turn("assistant", "", tool_calls=[called()]),
                turn("tool", "r", name="f"),
                turn("assistant", "b"),
            ],
        )
        for value in NO_ARGUMENTS
    },
    "a-null-in-arguments": (
        {
            "messages": [
                turn("user", "a"),
                turn("function_call", '{"name": "f", "arguments": {"x": null}}'),
            ]
        },
        [turn("user", "a"), turn("assistant", "", tool_calls=[called(x=None)])],
    ),
    "a-result-that-is-an-object": (
        {"messages": [*CALLING[:2], {"role": "tool", "content": {"set": True}}, CALLING[3]]},
        [*CALLING[:2], turn("tool", '{"set": true}'), CALLING[3]],
    ),
    # Parts
    "openai-parts": (
        {"messages": [turn("user", "") | {"content": [{"type": "text", "text": "a"}]}, ASKED[1]]},
        ASKED,
    ),
    "anthropic": (
        {
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                turn("user", "a"),
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "x"},
                        {"type": "text", "text": "k"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}],
                },
                turn("assistant", "b"),
            ],
        },
        [BRIEF, *LINKED],
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "a"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}}]},
                {
                    "role": "function",
                    "parts": [{"functionResponse": {"name": "f", "response": {"y": 2}}}],
                },
                {"role": "model", "parts": [{"text": "b"}]},
            ],
        },
        [BRIEF, *CALLING[:2], turn("tool", '{"y": 2}', name="f"), CALLING[3]],
    ),
}


@pytest.mark.parametrize(("value", "turns"), CHATS.values(), ids=CHATS.keys())
def test_chats_are_read(value: Object, turns: list[Object], formats: Formats) -> None:
    line, reading = read(value, formats)
    assert line["messages"] == turns
    assert not reading.unread
    assert not reading.faults


@pytest.mark.parametrize(
    ("key", "tools", "read_as"),
    [
        ("tools", [NEUTRAL], [NEUTRAL]),
        ("tools", json.dumps([F]), [F]),
        ("tools", [json.dumps(NEUTRAL)], [NEUTRAL]),
        ("functions", [F], [F]),
        ("tools", [{"name": "f", "input_schema": {"type": "object"}}], [NEUTRAL]),
        ("tools", [{"functionDeclarations": [F]}], [NEUTRAL]),
    ],
)
def test_tools_are_read(key: str, tools: Any, read_as: list[Object], formats: Formats) -> None:
    line, reading = read({"messages": CALLING, key: tools}, formats)
    assert line["tools"] == read_as
    assert not reading.unread


@pytest.mark.parametrize(
    ("value", "check", "text"),
    [
        ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, "wrong_type", "0.5"),
        ({"messages": [ASKED[0], ASKED[1] | {"train": "some"}]}, "wrong_type", "'some'"),
        ({"messages": [ASKED[0], ASKED[1] | {"weight": [0]}]}, "wrong_type", "[0]"),
        ({"messages": ASKED, "loss_mask": [1, 0, 1]}, "wrong_type", "3 values"),
        ({"query": "a", "response": "b", "history": "q and r"}, "wrong_type", "history"),
        ({"query": "a", "response": "b", "history": [["q"]]}, "wrong_type", "exchange 1"),
        ({"query": "a", "response": "b", "history": [["", "r"]]}, "empty_prompt", "exchange 1"),
        ({"question": "a", "answers": ["b", "c"]}, "wrong_type", "one answer"),
        ({"question": "a", "answers": {"text": []}}, "empty_completion", "answers"),
        ({"instruction": "", "input": " ", "output": "b"}, "empty_prompt", "instruction"),
        ({"messages": [turn("tool_call", "f(1)"), ASKED[1]]}, "malformed_tool_call", "f(1)"),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "image", "image"),
        ({"messages": [turn("narrator", "a"), ASKED[1]]}, "unknown_role", "narrator"),
        ({"text": "a", "answer": "b"}, "missing_key", "'answer'"),
    ],
)
def test_rows_that_cannot_be_read(value: Object, check: str, text: str, formats: Formats) -> None:
    with pytest.raises(Fault) as raised:
        read(value, formats)
    assert raised.value.name == check
    assert text in raised.value.text


KEPT = {
    "id": 1,
    "source": "s",
    "category": "c",
    "metadata": {"a": 1},
    "lang": "zh",
    "score": 0.5,
    "prompt_id": "x",
    "conversationId": "y",
    "created_at": "2026",
    "__index_level_0__": 3,
    "来源": "w",
}


@pytest.mark.parametrize(
    ("value", "unread"),
    [
        ({"prompt": "a", "completion": "b", **KEPT}, []),
        ({"messages": [{**turn, **KEPT} for turn in ASKED], **KEPT}, []),
        ({"prompt": "a", "completion": "b", "hint": "", "notes": [], "more": {}}, []),
        ({"prompt": "a", "completion": "b", "hint": "c"}, ["'hint'"]),
        ({"": "3", "Unnamed: 0": 3, "prompt": "a", "completion": "b"}, []),
        ({"": "c", "prompt": "a", "completion": "b"}, ["''"]),
        ({"problem": "a", "answer": "b", "solution": "c"}, ["'solution'"]),
        ({"messages": ASKED, "prompt": "a"}, ["'prompt'"]),
        ({"messages": ASKED, "weight": 0.5}, ["'weight'"]),
        ({"messages": ASKED, "label": 3}, ["'label'"]),
        ({"text": "a", "title": "b"}, ["'title'"]),
        ({"text": "a", "category": "b", "source": "c"}, ["'category'"]),
        ({"text": "a", "category": "b", "label": "c"}, []),
        ({"text": "a", "label": "b", "title": "c"}, ["'title'"]),
        ({"messages": [ASKED[0] | {"mood": "x"}, ASKED[1]]}, ["'mood' of a message"]),
        ({"messages": [ASKED[0] | {"thinking": "x"}, ASKED[1]]}, ["'thinking' of a message"]),
        (
            {"messages": [ASKED[0], ASKED[1] | {"thinking": "x", "reasoning": "y"}]},
            ["'thinking' of a message"],
        ),
        (
            {"messages": [ASKED[0], turn("assistant", "", tool_calls=[called() | {"why": 1}])]},
            ["'why' of a call"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a", "bold": True}]}, ASKED[1]]},
            ["'bold' of a part of a message"],
        ),
        ({"messages": [BRIEF, *ASKED], "system": "other"}, ["'system'"]),
        ({"messages": [BRIEF, *ASKED], "system": "s"}, []),
    ],
)
def test_keys_that_are_not_read_are_named(
    value: Object, unread: list[str], formats: Formats
) -> None:
    assert list(read(value, formats)[1].unread) == unread


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ASKED),
        ({"question": "a", "chosen_response": "b", "rejected-response": "c"}, ASKED),
        ({"prompt": "a", "response_chosen": "b", "response_rejected": "c"}, ASKED),
        ({"prompt": "a", "chosen": ASKED[1:], "rejected": [turn("assistant", "c")]}, ASKED),
        ({"prompt": "a", "chosen": ASKED, "rejected": [*ASKED[:1], turn("assistant", "c")]}, ASKED),
        ({"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [turn("assistant", "c")]}, ASKED),
        ({"chosen": ASKED, "rejected": [*ASKED[:1], turn("assistant", "c")]}, ASKED),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, ASKED),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            ASKED,
        ),
        ({"messages": ASKED, "rejected_response": "c"}, ASKED),
        (
            {
                "input": {"messages": ASKED[:1]},
                "preferred_output": ASKED[1:],
                "non_preferred_output": [turn("assistant", "c")],
            },
            ASKED,
        ),
        ({"messages": ASKED, "label": False}, None),
        ({"prompt": "a", "completion": "c", "label": False}, None),
        ({"prompt": "a", "completion": "c", "label": "False"}, None),
        ({"messages": ASKED, "kto_tag": False}, None),
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"}, None),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}, None),
    ],
)
def test_preference_data_is_refused_or_learned_by_its_good_answers(
    value: Object, good: list[Object] | None, formats: Formats
) -> None:
    with pytest.raises(Fault) as raised:
        read(value, formats)
    assert raised.value.name == "preference"
    if good is None:
        with pytest.raises(Fault, match=r"to be learned|several answers"):
            read(value, formats, "preference")
    else:
        assert read(value, formats, "preference")[0]["messages"] == good


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a", "label": False},
        {"text": "a", "label": "false"},
        {"messages": ASKED, "label": True},
        {"prompt": "a", "completion": "b", "label": "true"},
        {"prompt": "a", "completion": "b", "rejected": None},
    ],
)
def test_rows_that_are_no_preference_data(value: Object, formats: Formats) -> None:
    assert not read(value, formats)[1].unread


FORMS = {
    "chatml": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "chatml-without-an-end": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "llama-4": "<|begin_of_text|><|header_start|>user<|header_end|>\n\na<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nb<|eot|>",
    "gemma": "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "mistral": "<s>[INST] a [/INST] b</s>",
    "phi": "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n",
    "zephyr": "<|user|>\na</s>\n<|assistant|>\nb</s>",
    "glm": "[gMASK]<sop><|user|>\na<|assistant|>\nb",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜>",
    "command-r": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>a<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>b<|END_OF_TURN_TOKEN|>",
    "alpaca": "Below is an instruction that describes a task.\n\n### Instruction:\na\n\n"
    "### Response:\nb",
    "guanaco": "### Human: a### Assistant: b",
    "openassistant": "<|prompter|>a<|endoftext|><|assistant|>b<|endoftext|>",
    "gpt-oss": "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    "<|return|>",
    "vicuna": "USER: a ASSISTANT: b</s>",
    "human-and-assistant": "\n\nHuman: a\n\nAssistant: b",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_a_text_in_the_form_of_a_chat_is_read_as_one(text: str, formats: Formats) -> None:
    line, reading = read({"text": text}, formats)
    assert line == {"messages": ASKED}
    assert not reading.faults
    middle = text.rindex("b")
    line, reading = read({"prompt": text[:middle], "completion": text[middle:]}, formats)
    assert line == {"messages": ASKED}
    assert not reading.faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] r </s><s>[INST] a [/INST] b </s>",
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")],
        ),
        (
            "<s>[SYSTEM_PROMPT] s[/SYSTEM_PROMPT][INST] a[/INST] b</s>",
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            "### Instruction:\na\n\n### Input:\nc\n\n### Response:\nb",
            [("user", "a\n\nc"), ("assistant", "b")],
        ),
        (
            "<|system|>\ns</s>\n<|user|>\na</s>\n<|assistant|>\n",
            [("system", "s"), ("user", "a"), ("assistant", "")],
        ),
    ],
)
def test_the_turns_of_forms(text: str, said: list[tuple[str, str]]) -> None:
    assert read_text(text) == said


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (f"序\n{FORMS['llama-3']}", "Llama 3"),
        (f"{FORMS['gemma']}后记", "Gemma"),
        (f"{FORMS['chatml']}{FORMS['gemma']}", "ChatML"),
        (f"see: {FORMS['mistral']}", "[INST]"),
        ("<|start|>assistant<|channel|>analysis<|message|>t<|end|>" + FORMS["gpt-oss"], "gpt-oss"),
        ("Llama 3 ends a turn with <|eot_id|>.", None),
        ("一段<|im_end|>话", None),
        ("### Response:\nb", None),
        ("Notes\n\n### Instruction:\na\n\n### Response:\nb", None),
        ("Human: a\n\nAssistant: b", None),
    ],
)
def test_a_text_that_is_partly_a_chat_is_named(
    text: str, form: str | None, formats: Formats
) -> None:
    assert read_text(text) == []
    assert find_form(text) == form
    line, reading = read({"text": text}, formats)
    assert line == {"text": text}
    assert [fault.name for fault in reading.faults] == ["mixed_text"] * (form is not None)


def test_settings_come_before_the_usual_names(config: DataConfig) -> None:
    formats = Formats(replace(config, prompt_feature="input", completion_feature="Ziel"), [])
    line, reading = read({"prompt": "c", "input": "a", "ziel": "b", "output": "d"}, formats)
    assert line["messages"] == ASKED
    assert list(reading.unread) == ["'prompt'", "'output'"]


def test_a_person_adds_names(config: DataConfig) -> None:
    columns = {
        **config.columns,
        "question": [*config.columns["question"], "Frage"],
        "answer": ["Antwort"],
        "roles": {**config.columns["roles"], "user": ["Kunde"]},
    }
    formats = Formats(replace(config, columns=columns), [])
    assert read({"frage": "a", "antwort": "b"}, formats)[0]["messages"] == ASKED
    assert read({"messages": [turn("KUNDE", "a"), ASKED[1]]}, formats)[0]["messages"] == ASKED


# Each call and each tool of a column of Arrow's has the fields of all others.
FILLED: list[Any] = [
    {
        "messages": [
            turn("user", "a"),
            turn(
                "assistant",
                "",
                tool_calls=[{"function": {"name": name, "arguments": {key: value, "all": [None]}}}],
            ),
        ],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": {key: {"x": key}}}}
        ],
        "history": None,
        "metadata": {"weight": value},
    }
    for name, key, value in (("f", "minutes", 9), ("g", "metal", "iron"))
]


def of_parquet(folder: Path) -> list[Origin]:
    columns = {key: [row[key] for row in FILLED] for key in ("messages", "tools", "history")}
    parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return find_files(folder, len, 256, [], Limits(10**6, 10**8))[0]


def of_dataset(folder: Path) -> list[Origin]:
    lines = [json.dumps({key: row[key] for key in ("messages", "tools")}) for row in FILLED]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return find_dataset(str(folder), None, None)


@pytest.mark.parametrize("origins", [of_parquet, of_dataset])
def test_nulls_that_only_a_schema_puts_there_are_taken_out(
    origins: Callable[[Path], list[Origin]], tmp_path: Path, formats: Formats
) -> None:
    (origin,) = origins(tmp_path)
    for record, written in zip(origin.read(frozenset()), FILLED, strict=True):
        line, reading = read(record.value, formats)
        function = written["messages"][1]["tool_calls"][0]["function"]
        (call,) = line["messages"][1]["tool_calls"]
        assert call["function"] == function
        assert line["tools"] == written["tools"]
        assert not reading.unread
