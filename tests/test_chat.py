"""Which tokens are learned, for templates of the kinds that models come with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor import chat, models, supervision

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
        return models.load_tokenizer(folder)

    return build


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    found = supervision.tokenize(row, tokenizer, mask_prompt=True)
    ids = [i for i, s in zip(found.ids, found.supervised, strict=True) if s]
    return str(tokenizer.decode(ids))


def asked_as_trained(row: dict[str, Any], tokenizer: Any) -> bool:
    rendered = chat.render(row, tokenizer)
    encoding = supervision.encode([rendered], tokenizer)[0]
    return supervision.asks_as_trained(rendered, encoding, encoding.ids, tokenizer)


def test_answers_and_their_end_are_supervised_and_nothing_else(tiny: Path) -> None:
    tokenizer = models.load_tokenizer(tiny)
    row = {
        "messages": [
            {"role": "system", "content": "你是助手"},
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "第一答"},
            {"role": "user", "content": "二"},
            {"role": "assistant", "content": "第二答"},
        ]
    }
    found = supervision.tokenize(row, tokenizer, mask_prompt=True)
    learned = [i for i, s in zip(found.ids, found.supervised, strict=True) if s]
    assert tokenizer.decode(learned) == "第一答<|im_end|>第二答<|im_end|>"
    everything = supervision.tokenize(row, tokenizer, mask_prompt=False)
    assert everything.ids == found.ids
    assert all(everything.supervised)
    assert asked_as_trained(row, tokenizer)


def test_plain_text_ends_with_an_end_token(tiny: Path) -> None:
    tokenizer = models.load_tokenizer(tiny)
    found = supervision.tokenize({"text": "一段文字"}, tokenizer, mask_prompt=True)
    assert found.ids[-1] == tokenizer.eos_token_id
    assert all(found.supervised)


def test_every_turn_is_learned_where_earlier_ones_are_written_otherwise(make: Make) -> None:
    tokenizer = make(QWEN3)
    assert learned(QUESTIONS, tokenizer) == (
        "第一答<|im_end|><think>\n\n</think>\n\n第二答<|im_end|>"
    )
    assert supervision.tokenize(QUESTIONS, tokenizer, mask_prompt=True).answers == 2
    assert asked_as_trained(QUESTIONS, tokenizer)
    assert chat.expected_answer(QUESTIONS, tokenizer) == "<think>\n\n</think>\n\n第二答"


def test_a_prompt_that_no_training_text_has_is_noticed(make: Make) -> None:
    tokenizer = make(R1)
    assert learned(QUESTIONS, tokenizer) == "第一答<|im_end|>第二答<|im_end|>"
    assert not asked_as_trained(QUESTIONS, tokenizer)
    assert chat.expected_answer(QUESTIONS, tokenizer) == "第二答"


def test_the_templates_own_end_is_learned_and_stopped_at(make: Make, tiny: Path) -> None:
    """Qwen2.5's base models end texts with another token than their template ends turns."""
    usual = models.load_tokenizer(tiny)
    texts_end = usual.convert_tokens_to_ids("<|endoftext|>")
    tokenizer = make(eos_token="<|endoftext|>", eos_token_id=texts_end)
    assert tokenizer.eos_token_id == texts_end
    assert usual.convert_tokens_to_ids("<|im_end|>") in tokenizer.eos_token_ids
    assert learned(QUESTIONS, tokenizer) == "第一答<|im_end|>第二答<|im_end|>"


def test_a_turn_without_an_end_does_not_reach_into_the_next(make: Make) -> None:
    """A template that ends the last turn alone: earlier answers are counted as not learned."""
    template = (
        "{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}"
        "{%- elif messages[-1].role == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    )
    tokenizer = make(template)
    assert learned(QUESTIONS, tokenizer) == "第二答\n<|im_end|>"
    assert supervision.tokenize(QUESTIONS, tokenizer, mask_prompt=True).answers == 1


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
    rows: list[dict[str, Any]] = [
        single,
        QUESTIONS,
        {"text": "一段文字"},
        system,
        single | {"tools": [{"name": "f"}]},
    ]
    no_system = "{%- if m.role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    strict = make(QWEN3.replace("{{- '<|im_start|>'", no_system + "{{- '<|im_start|>'", 1))
    refused = chat.render_all(rows, strict)
    assert [isinstance(one, Exception) for one in refused] == [False, False, False, True, False]
    assert str(refused[3]) == "no system"
    tokenizer = make(QWEN3)
    rendered = chat.render_all(rows, tokenizer)
    assert rendered == [chat.render(row, tokenizer) for row in rows]
    together = supervision.encode(
        [one for one in rendered if isinstance(one, chat.Rendered)], tokenizer
    )
    for row, one, encoding in zip(rows, rendered, together, strict=True):
        assert isinstance(one, chat.Rendered)
        alone = supervision.tokenize(row, tokenizer, mask_prompt=True)
        assert supervision.supervise(one, encoding, tokenizer, mask_prompt=True) == alone


def test_a_row_is_shown_as_it_is_learned(make: Make) -> None:
    pieces = supervision.marked({"messages": QUESTIONS["messages"][:2]}, make(), mask_prompt=True)
    assert [text for text, learned in pieces if learned] == ["第一答<|im_end|>"]
    assert "".join(text for text, _ in pieces).endswith("第一答<|im_end|>\n")
