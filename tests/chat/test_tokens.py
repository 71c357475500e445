"""Supervised tokens, for templates of the kinds that models come with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from athanor import files
from athanor.chat import template_probes, templates
from athanor.chat.contract import resolve_contract
from athanor.chat.conversation import Conversation, Turn, chat
from athanor.chat.load import load_tokenizer
from athanor.chat.tokens import mark_supervised, tokenize_row, tokenize_rows
from athanor.compute.arrays import pad_rows
from athanor.prepare.form_rows import special_tokens
from support import kinds

QUESTIONS = {
    "messages": [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "第一答"},
        {"role": "user", "content": "二"},
        {"role": "assistant", "content": "第二答"},
    ]
}

# Like Qwen3's: an empty thought before the last answer, and only there.
QWEN3 = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# Like R1's: asks with an open thought that no finished conversation has.
R1 = """{%- for m in messages -%}
{%- set said = m.content.split('</think>')[-1] -%}
{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""

Make = Callable[..., Any]


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    """The tiny model's tokenizer with another template or another end token."""

    def build(template: str | None = None, **settings: Any) -> Any:
        folder = Path(shutil.copytree(tiny, tmp_path / "model", dirs_exist_ok=True))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        for name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
            path = folder / name
            content = json.loads(path.read_text(encoding="utf-8"))
            if key in settings:
                path.write_text(json.dumps(content | {key: settings[key]}), encoding="utf-8")
        if "eos_token_id" in settings:
            (folder / "generation_config.json").unlink()
        return load_tokenizer(folder)

    return build


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    """Return the supervised part of each text of a row, joined by bars."""
    return " | ".join(
        tokenizer.decode([i for i, s in zip(text.targets(), text.supervised, strict=True) if s])
        for text in tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
    )


def asked_as_trained(row: dict[str, Any], tokenizer: Any) -> bool:
    """Compare the tokens before each answer with its prompt, independently of the code."""
    messages = row["messages"]
    asked = [
        templates.encode_prompt(Conversation.of({**row, "messages": messages[: i + 1]}), tokenizer)
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    trained = [
        text.ids[:first]
        for text in tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
        for first, _ in text.answer_spans
    ]
    return sorted(asked) == sorted(trained)


def test_answers_and_their_end_are_supervised_and_nothing_else(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    row = {
        "messages": [
            {"role": "system", "content": "你是助手"},
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "第一答"},
            {"role": "user", "content": "二"},
            {"role": "assistant", "content": "第二答"},
        ]
    }
    [text] = tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
    assert learned(row, tokenizer) == "第一答<|im_end|>第二答<|im_end|>"
    [everything] = tokenize_row(Conversation.of(row), tokenizer, mask_prompt=False)
    assert everything.ids == text.ids
    assert all(everything.supervised)
    assert asked_as_trained(row, tokenizer)


def test_plain_text_ends_with_an_end_token(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    [text] = tokenize_row(Conversation.of({"text": "一段文字"}), tokenizer, mask_prompt=True)
    assert text.ids[-1] == tokenizer.eos_token_id
    assert all(text.supervised)


def test_plain_text_ends_also_where_only_the_config_names_an_end(
    tiny: Path, tmp_path: Path
) -> None:
    folder = kinds.build("llama3-base", tiny, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    files.write_json(path, files.read_json(path) | {"eos_token": None})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id is None
    end = resolve_contract(folder, tokenizer, "auto").end
    [text] = tokenize_row(
        Conversation.of({"text": "一段文字"}), tokenizer, mask_prompt=True, end=end
    )
    assert tokenizer.convert_ids_to_tokens(text.ids[-1]) == "<|end_of_text|>"


def test_an_answer_may_be_all_that_a_template_writes(make: Make) -> None:
    """A template that drops questions, which is reported, and has an empty prompt."""
    tokenizer = make(
        "{%- for m in messages if m.role == 'assistant' -%}"
        "{{- '<|im_start|>' + m.content + '<|im_end|>' -}}{%- endfor -%}"
    )
    row = {"messages": QUESTIONS["messages"][:2]}
    assert learned(row, tokenizer) == "<|im_start|>第一答<|im_end|>"
    assert left_out(row, tokenizer) == "message 1, of the user"


def test_a_turn_that_is_written_otherwise_later_is_a_text_of_its_own(make: Make) -> None:
    tokenizer = make(QWEN3)
    thought = "<think>\n\n</think>\n\n"
    assert learned(QUESTIONS, tokenizer) == f"{thought}第一答<|im_end|> | {thought}第二答<|im_end|>"
    assert asked_as_trained(QUESTIONS, tokenizer)
    assert templates.find_expected_answer(Conversation.of(QUESTIONS), tokenizer) == "第二答"
    [everything] = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=False)
    assert all(everything.supervised)


def test_an_open_thought_is_closed_in_what_is_trained_on(make: Make) -> None:
    """With an empty one, or with the row's own; R1's template leaves it out."""
    tokenizer = make(R1)
    assert learned(QUESTIONS, tokenizer) == (
        "</think>\n\n第一答<|im_end|> | </think>\n\n第二答<|im_end|>"
    )
    assert asked_as_trained(QUESTIONS, tokenizer)
    assert templates.find_expected_answer(Conversation.of(QUESTIONS), tokenizer) == "第二答"
    question = {"role": "user", "content": "一"}
    for own in (
        {"content": "[THINK]想一想[/THINK]答"},
        {"content": "<think>\n想一想\n</think>\n\n答"},
        {"content": "想一想</think>答"},
        {"content": "答", "reasoning_content": "想一想"},
    ):
        row = {"messages": [question, {"role": "assistant", **own}]}
        assert learned(row, tokenizer) == "想一想\n</think>\n\n答<|im_end|>"
        assert asked_as_trained(row, tokenizer)
        assert templates.find_expected_answer(Conversation.of(row), tokenizer) == "答"


def test_an_answer_may_begin_as_a_thought_does(make: Make) -> None:
    """So that text and prompt part behind the < only."""
    tokenizer = make(R1)
    for content in ("<b>答</b>", "<think", " <"):
        answer = {"role": "assistant", "content": content}
        row = {"messages": [QUESTIONS["messages"][0], answer]}
        assert learned(row, tokenizer).split() == ["</think>", f"{content.strip()}<|im_end|>"]
        assert asked_as_trained(row, tokenizer)


def test_a_thought_that_the_prompt_has_closed_is_in_what_is_trained_on(make: Make) -> None:
    tokenizer = make(R1.replace("<think>\\n", "<think>\\n\\n</think>\\n\\n"))
    assert learned(QUESTIONS, tokenizer) == "第一答<|im_end|> | 第二答<|im_end|>"
    assert asked_as_trained(QUESTIONS, tokenizer)
    assert all(
        text.prompts_match
        for text in tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=True)
    )


def test_a_prompt_that_no_training_text_has_is_noticed(make: Make) -> None:
    tokenizer = make(R1.replace("<think>", "<mood>"))
    texts = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=True)
    assert not any(text.prompts_match for text in texts)
    assert not asked_as_trained(QUESTIONS, tokenizer)


def test_a_row_whose_only_answer_is_not_written_has_nothing_to_learn(make: Make) -> None:
    """Such a template asks with more than it writes, and leaves out an answer without a text."""
    tokenizer = make(
        R1.replace("{{- '<|im_start|>'", "{%- if said -%}{{- '<|im_start|>'", 1).replace(
            "'<|im_end|>\\n' -}}", "'<|im_end|>\\n' -}}{%- endif -%}", 1
        )
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"messages": [QUESTIONS["messages"][0], answer]}
    [tokens] = tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
    assert (tokens.answer_spans, any(tokens.supervised)) == ([], False)


def test_an_answer_that_shares_a_token_with_its_prompt_is_parted_from_it(make: Make) -> None:
    """A prompt that ends with a space, which is a token's first character where a word follows."""
    tokenizer = make(
        "{%- for m in messages -%}{{- m.role + ': ' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    )
    together = tokenizer.encode(": the", add_special_tokens=False)
    apart = [tokenizer.encode(text, add_special_tokens=False) for text in (": ", "the")]
    assert together != apart[0] + apart[1]
    question = QUESTIONS["messages"][0]
    row = {"messages": [question, {"role": "assistant", "content": "the end"}]}
    assert learned(row, tokenizer) == "the end<|im_end|>"
    assert asked_as_trained(row, tokenizer)
    row["messages"] *= 2  # the second question follows the first answer as it is read, not parted
    assert learned(row, tokenizer) == "the end<|im_end|> | the end<|im_end|>"
    assert asked_as_trained(row, tokenizer)
    assert all(
        text.prompts_match
        for text in tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
    )


def test_white_space_that_a_special_token_takes_is_no_part_of_the_answer(
    make: Make, tiny: Path, tmp_path: Path
) -> None:
    """As in Phi 3."""
    make(
        "{%- for m in messages -%}{{- '<|im_start|>' + m.content + '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>' -}}{%- endif -%}"
    )
    path = tmp_path / "model" / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for token in settings["added_tokens"]:
        token["rstrip"] = True
    path.write_text(json.dumps(settings), encoding="utf-8")
    path = path.with_name("tokenizer_config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["additional_special_tokens"]  # which would be made anew
    path.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "model")
    row = {"messages": [QUESTIONS["messages"][0], {"role": "assistant", "content": " \n答"}]}
    assert learned(row, tokenizer) == "答<|im_end|>"
    assert asked_as_trained(row, tokenizer)
    assert all(
        text.prompts_match
        for text in tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True)
    )


def test_the_templates_own_end_is_learned_and_stopped_at(make: Make, tiny: Path) -> None:
    """Qwen2.5's base models end texts with another token than their template ends turns."""
    usual = load_tokenizer(tiny)
    texts_end = usual.convert_tokens_to_ids("<|endoftext|>")
    tokenizer = make(eos_token="<|endoftext|>", eos_token_id=texts_end)
    assert tokenizer.eos_token_id == texts_end
    assert usual.convert_tokens_to_ids("<|im_end|>") in tokenizer.eos_token_ids
    assert learned(QUESTIONS, tokenizer) == "第一答<|im_end|>第二答<|im_end|>"


def test_a_turn_that_its_template_ends_with_nothing_gets_an_end(make: Make) -> None:
    """And does not reach into the next question."""
    template = (
        "{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}"
    )
    last = "{%- elif messages[-1].role == 'assistant' -%}{{- '<|im_end|>' -}}"
    for written in (template, template + last):
        tokenizer = make(written + "{%- endif -%}")
        assert learned(QUESTIONS, tokenizer) == "第一答\n<|im_end|> | 第二答\n<|im_end|>"
        assert asked_as_trained(QUESTIONS, tokenizer)


def test_an_answer_is_learned_with_its_end_or_not_at_all(make: Make) -> None:
    tokenizer = make()
    [tokens] = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=True)
    (first, behind), (second, _) = tokens.answer_spans
    whole = [True] * (behind - first)
    for length in (behind, second, second + 1, len(tokens) - 2):
        kept = tokens.truncate(length)
        assert len(kept) == length
        assert [s for s in kept.supervised if s] == whole
    assert not any(tokens.truncate(behind - 1).supervised)
    assert tokens.truncate(len(tokens)) == tokens
    [everything] = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=False)
    assert all(everything.truncate(behind - 1).supervised)


def test_another_end_is_learned_and_the_templates_is_read(make: Make) -> None:
    tokenizer = make()
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    [usual] = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=True)
    [tokens] = tokenize_row(Conversation.of(QUESTIONS), tokenizer, mask_prompt=True, end=other)
    assert (tokens.ids, tokens.supervised) == (usual.ids, usual.supervised)
    batch = pad_rows([tokens])
    assert batch.inputs.tolist() == [tokens.ids[:-1]]
    assert tokenizer.decode(batch.targets.tolist()) == "第一答<|endoftext|>第二答<|endoftext|>"
    cut = tokens.truncate(tokens.answer_spans[0][1])
    assert list(cut.replaced_targets.values()) == [other]


def test_an_answer_that_repeats_its_question_is_learned_once(make: Make) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "重复"},
            {"role": "assistant", "content": "重复"},
            {"role": "user", "content": "重复"},
            {"role": "assistant", "content": "重复"},
        ]
    }
    assert learned(row, make()) == "重复<|im_end|>重复<|im_end|>"


def test_rows_together_are_read_as_one_by_one(make: Make) -> None:
    """Among them one that the template refuses, plain text, several turns, a call of a tool."""
    single = {"messages": QUESTIONS["messages"][:2]}
    system = {"messages": [{"role": "system", "content": "短"}, *QUESTIONS["messages"][:2]]}
    written: list[dict[str, Any]] = [
        single,
        QUESTIONS,
        {"text": "一段文字"},
        system,
        single | {"tools": [{"name": "f"}]},
    ]
    rows = list(map(Conversation.of, written))
    no_system = "{%- if m.role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    strict = make(QWEN3.replace("{{- '<|im_start|>'", no_system + "{{- '<|im_start|>'", 1))
    refused = templates.render_rows(rows, strict)
    assert [isinstance(texts, Exception) for texts in refused] == [False, False, False, True, False]
    assert str(refused[3]) == "no system"
    tokenizer = make(QWEN3)
    rendered = templates.render_rows(rows, tokenizer)
    assert rendered == [templates.render_row(row, tokenizer) for row in rows]
    together = tokenize_rows(rows, tokenizer, True, 2048)
    alone = [
        (line, text)
        for line, row in enumerate(rows, 1)
        for text in tokenize_row(row, tokenizer, mask_prompt=True)
    ]
    assert together == [replace(text, line=line) for line, text in alone]


def left_out(row: dict[str, Any], tokenizer: Any) -> str | None:
    conversation = Conversation.of(row)
    rendered = templates.render_row(conversation, tokenizer)
    if thoughts := templates.find_dropped_thoughts(conversation, rendered):
        return f"the thought of message {thoughts[0]}"
    return templates.find_dropped_content(conversation, rendered, tokenizer)


def test_what_a_template_leaves_out_is_named(make: Make) -> None:
    """Even where its text stands elsewhere, and not where it is written as JSON."""
    asked, answered = QUESTIONS["messages"][:2]
    call = {"type": "function", "function": {"name": "f", "arguments": {"at": "noon"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": '{"hour": "12"}'}
    of_tools = {"messages": [asked, called, result, answered]}
    system = {"messages": [{"role": "system", "content": "a"}, asked, answered]}
    in_it = {"content": "<think>想一想</think>第一答"}
    thoughtful = [
        {"messages": [asked, answered | own]} for own in ({"reasoning_content": "想"}, in_it)
    ]
    plain = make()
    assert left_out(of_tools, plain) == "the call of a tool in message 2"
    assert left_out(thoughtful[0], plain) == "the thought of message 2"
    assert [left_out(row, plain) for row in (system, thoughtful[1], QUESTIONS)] == [None] * 3
    calls = "{%- for c in m.tool_calls or [] -%}{{- c.function | tojson -}}{%- endfor -%}"
    written = QWEN3.replace("{{- m.content", calls + "{{- m.content")
    assert left_out(of_tools, make(written)) is None
    as_json = written.replace("m.content +", "(m.content | tojson) +")
    assert left_out(of_tools, make(as_json)) is None
    for role, row, lost in (
        ("tool", of_tools, "message 3, of the tool"),
        ("system", system, "message 1, of the system"),
    ):
        without = written.replace("in messages -%}", f"in messages if m.role != '{role}' -%}}")
        assert left_out(row, make(without)) == lost


def test_an_earlier_thought_that_is_left_out_later_is_learned(make: Make) -> None:
    """By templates that look at reasoning_content alone, as GLM's."""
    thought = (
        "{%- if loop.last and m.reasoning_content -%}{{- m.reasoning_content + '|' -}}{%- endif -%}"
    )
    tokenizer = make(
        QWEN3.replace("'<think>\\n\\n</think>\\n\\n'", "''").replace(
            "{{- m.content", thought + "{{- m.content"
        )
    )
    asked, answered, *more = QUESTIONS["messages"]
    row = {"messages": [asked, answered | {"reasoning_content": "想一想"}, *more]}
    assert learned(row, tokenizer) == "想一想|第一答<|im_end|> | 第二答<|im_end|>"
    assert left_out(row, tokenizer) is None


def test_a_template_may_refuse_a_second_question(make: Make, tmp_path: Path) -> None:
    refuses = "{%- if messages | length > 3 -%}{{ raise_exception('only one') }}{%- endif -%}"
    tokenizer = make(refuses + QWEN3)
    report = {
        f.about: f.text for f in resolve_contract(tmp_path / "model", tokenizer, "auto").report
    }
    assert report["asked as trained"] == "yes, every answer"
    assert "only one" in str(templates.render_rows([Conversation.of(QUESTIONS)], tokenizer)[0])


def test_what_is_expected_is_the_last_answer_also_where_it_is_not_found(make: Make) -> None:
    prompt = "assistant' + ('\\n' if messages | length < 3 else '<mood>')"
    tokenizer = make(R1.replace("assistant\\n<think>\\n'", prompt))
    call = {"role": "assistant", "content": "", "tool_calls": []}
    row = {"messages": [*QUESTIONS["messages"][:3], call]}
    assert templates.find_expected_answer(Conversation.of(row), tokenizer) == ""


def test_a_call_of_a_tool_may_end_with_another_token_than_an_answer(make: Make) -> None:
    """As Llama 3.1's with <|eom_id|>; what answers end with instead takes the place of both."""
    tokenizer = make(
        QWEN3.replace("'<|im_end|>", "('<|endoftext|>' if m.tool_calls else '<|im_end|>') + '")
    )
    asked, answered = QUESTIONS["messages"][:2]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [asked, answered | {"tool_calls": [call]}]}
    usual, other = (tokenizer.convert_tokens_to_ids(end) for end in ("<|im_end|>", "<|endoftext|>"))
    for end, learned_ends in ((usual, [other]), (other, [other])):
        [text] = tokenize_row(Conversation.of(row), tokenizer, mask_prompt=True, end=end)
        assert text.targets()[text.answer_spans[0][1] - 1 :][:1] == learned_ends
    [text] = tokenize_row(
        Conversation.of({"messages": [asked, answered]}), tokenizer, True, end=other
    )
    assert list(text.replaced_targets.values()) == [other]


def test_a_template_without_answers_ends_them_with_nothing(make: Make) -> None:
    tokenizer = make(QWEN3.replace("in messages -%}", "in messages if m.role == 'user' -%}"))
    assert template_probes.find_turn_end(tokenizer) is None
    row = {"messages": QUESTIONS["messages"][:2]}
    assert left_out(row, tokenizer) == "message 2, of the assistant"


def test_an_end_inside_a_text_is_found_special_or_not(tiny: Path, tmp_path: Path) -> None:
    """It would end the answer there, and only half of that be learned."""
    folder = kinds.build("r1-distill-qwen", tiny, tmp_path / "model")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for token in settings["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(settings), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    files.write_json(path, files.read_json(path) | {"eos_token": None})
    expression = special_tokens(load_tokenizer(folder))
    assert expression is not None
    assert expression.findall("<think>答<｜end▁of▁sentence｜>") == ["<｜end▁of▁sentence｜>"]


def test_a_row_is_shown_as_it_is_learned(make: Make) -> None:
    pieces = mark_supervised(
        Conversation.of({"messages": QUESTIONS["messages"][:2]}), make(), mask_prompt=True
    )
    assert [text for text, learned in pieces if learned] == ["第一答<|im_end|>"]
    assert "".join(text for text, _ in pieces).endswith("第一答<|im_end|>\n")


def spoken(*texts: str) -> Conversation:
    """Turns that a user begins, or the assistant with >; a - before an answer that is context."""
    begins = texts[0].startswith((">", "-"))
    return Conversation(
        [
            Turn("assistant", text.lstrip(">-"), weight=0 if text.startswith("-") else 1)
            if (place + begins) % 2
            else Turn("user", text)
            for place, text in enumerate(texts)
        ]
    )


# Without a token that ends an earlier turn.
ENDLESS = QWEN3.replace(
    "'<|im_end|>\\n'", "('<|im_end|>' if loop.last or m.role == 'user' else '') + '\\n'"
)
# The prompt ends with a space, which may be a part of an answer's first token.
SPACED = QWEN3.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant '").replace(
    "m.role + '\\n'", "m.role + ' '"
)


@pytest.mark.parametrize("template", [None, QWEN3, R1, ENDLESS, SPACED])
@pytest.mark.parametrize(
    "texts",
    [
        ("one", "-wrong", "two", "right"),
        ("one", "right", "two", "-wrong", "three", "right"),
        ("one", "-wrong", "two", "-wrong", "three", "right"),
        ("-wrong", "one", "right", "two", "right"),
    ],
)
def test_an_answer_of_weight_0_is_read_and_not_learned(
    template: str | None, texts: tuple[str, ...], make: Make
) -> None:
    tokenizer, row = make(template), spoken(*texts)
    for mask_prompt in (True, False):
        learned = {True: "", False: ""}
        for text in tokenize_row(row, tokenizer, mask_prompt):
            assert text.prompts_match
            for id, is_supervised in zip(text.ids, text.supervised, strict=True):
                learned[is_supervised] += tokenizer.decode([id])
        assert "wrong" not in learned[True]
        assert "wrong" in learned[False]
        # Of a template that ends no earlier turn, the last answer alone is certain.
        if template != ENDLESS:
            assert ("one" in learned[True]) is not mask_prompt
            assert learned[True].count("right") == texts.count("right")


def test_context_of_a_cut_text_is_not_learned(make: Make) -> None:
    tokenizer, row = make(), spoken("one", "-wrong", "two", "right")
    [whole] = tokenize_row(row, tokenizer, mask_prompt=False)
    cut = whole.truncate(len(whole) - 3)
    assert any(cut.supervised)
    assert "wrong" not in tokenizer.decode(
        [id for id, learned in zip(cut.ids, cut.supervised, strict=True) if learned]
    )


THINKS = QWEN3.replace("'<think>\\n\\n</think>\\n\\n'", "'<think>' + (m.KEY or '') + '</think>'")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_written_under_the_key_that_the_template_reads(key: str, make: Make) -> None:
    tokenizer = make(THINKS.replace("KEY", key))
    row = Conversation([Turn("user", "8?"), Turn("assistant", "no", thought="two divides it")])
    [text] = tokenize_row(row, tokenizer, mask_prompt=True)
    assert "<think>two divides it</think>no" in tokenizer.decode(text.ids)
    assert templates.find_dropped_thoughts(row, templates.render_row(row, tokenizer)) == []


# Templates that can't ask for an answer before any question, but may write one.
LOOKS_AT_THE_FIRST = "{%- if messages[0].role == 'tool' -%}{%- endif -%}" + QWEN3
NEEDS_A_QUESTION = (
    "{%- if not messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{{ raise_exception('no question') }}{%- endif -%}" + QWEN3
)
USER_FIRST = (
    "{%- if messages[0].role == 'assistant' -%}{{ raise_exception('user first') }}{%- endif -%}"
    + QWEN3
)


@pytest.mark.parametrize("system", [[], [Turn("system", "Say Ahoy.")]])
@pytest.mark.parametrize("template", [None, QWEN3, LOOKS_AT_THE_FIRST, NEEDS_A_QUESTION])
def test_a_conversation_that_the_assistant_begins_is_learned(
    template: str | None, system: list[Turn], make: Make
) -> None:
    row = spoken(">Ahoy.", "Who?", ">The captain.")
    row.turns[:0] = system
    learned = mark_supervised(row, make(template), mask_prompt=True)
    answers = [
        text.removeprefix("<think>\n\n</think>\n\n") for text, is_learned in learned if is_learned
    ]
    assert answers == ["Ahoy.<|im_end|>", "The captain.<|im_end|>"]


def test_a_template_refuses_an_assistant_that_begins_in_its_own_words(make: Make) -> None:
    [refused] = templates.render_rows([spoken(">Ahoy.", "Who?", ">The captain.")], make(USER_FIRST))
    assert str(refused) == "user first"


WRITES_NAMES = "{%- for t in tools or [] -%}{{ (t.function or t).name }}{%- endfor -%}"


@pytest.mark.parametrize(
    ("written", "lost"),
    [
        ("", "the definitions of tools"),
        ("{{ tools | length if tools }}", "the definitions of tools"),
        (WRITES_NAMES, "the descriptions of tools"),
        (WRITES_NAMES.replace(".name", ".description"), "the definitions of tools"),
        (
            WRITES_NAMES.replace(".name", ".name + (t.function or t).description"),
            "the parameters of tools",
        ),
        ("{{ tools | tojson if tools }}", None),
        ("{{ (tools | map(attribute='function') | list) | tojson(indent=2) if tools }}", None),
    ],
)
def test_a_definition_is_missed_also_where_a_call_names_it(
    written: str, lost: str | None, make: Make
) -> None:
    function = {
        "name": "egg_timer",
        "description": "sets a timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}},
    }
    call = '<tool_call>{"name": "egg_timer", "arguments": {"minutes": 9}} sets a timer</tool_call>'
    row = chat(("user", "An egg"), ("assistant", call), tools=[{"function": function}])
    tokenizer = make(written + QWEN3)
    rendered = templates.render_row(row, tokenizer)
    assert templates.find_dropped_content(row, rendered, tokenizer) == lost
