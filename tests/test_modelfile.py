"""Modelfiles for chat templates of the kinds that models come with, against the templates."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import go_template
from athanor import models
from athanor.console import UserError
from athanor.export import modelfile

# Templates that write what the published ones of these families write, tools left out.
CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

QWEN25 = """{%- if tools -%}{{ 'Tools: ' + tools | tojson }}{%- endif -%}
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful "assistant".<|im_end|>\\n' -}}
{%- endif -%}""" + CHATML

QWEN3 = """{%- set last = namespace(question=0) -%}
{%- for m in messages if m.role == 'user' -%}{% set last.question = loop.index0 %}{%- endfor -%}
{%- for m in messages -%}
{%- set said = m.content -%}
{%- if m.role == 'assistant' and '</think>' in said -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}{%- endif -%}"""

R1 = """{{- bos_token -}}
{%- for m in messages if m.role == 'system' -%}{{ m.content }}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' -%}
{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"""

LLAMA3 = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim -}}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

# As of 3.1 a system turn is always there, with dates; 3.2's second one is today's.
LLAMA32 = """{%- set about = 'Knowledge: December 2023\\nToday: ' + strftime_now('%d %b %Y') -%}
{%- set rest, said = messages, '' -%}
{%- if messages[0].role == 'system' -%}
{%- set rest, said = messages[1:], messages[0].content | trim -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' + about + '\\n\\n' + said -}}
{{- '<|eot_id|>' -}}
{%- for m in rest -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim -}}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

LLAMA2 = """{%- set rest, said = messages, '' -%}
{%- if messages[0].role == 'system' -%}
{%- set rest = messages[1:] -%}
{%- set said = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{{- bos_token + '[INST] ' + (said if loop.first else '') + m.content.strip() + ' [/INST]' -}}
{%- else -%}{{- ' ' + m.content.strip() + ' </s>' -}}{%- endif -%}
{%- endfor -%}"""

GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

GEMMA3 = """{{- bos_token -}}
{%- set rest, said = messages, '' -%}
{%- if messages[0].role == 'system' -%}
{%- set rest, said = messages[1:], messages[0].content + '\\n\\n' -%}
{%- endif -%}
{%- for m in rest -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + (said if loop.first else '') -}}
{{- m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

# Mistral's third: the system message stands in the last question.
MISTRAL = """{{- bos_token -}}
{%- set rest, said = messages, '' -%}
{%- if messages[0].role == 'system' -%}
{%- set rest, said = messages[1:], messages[0].content + '\\n\\n' -%}
{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + (said if loop.last else '') + m.content + '[/INST]' -}}
{%- else -%}{{- ' ' + m.content + '</s>' -}}{%- endif -%}
{%- endfor -%}"""

KINDS = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "r1": R1,
    "llama3": LLAMA3,
    "llama3.2": LLAMA32,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    # Braces, three quotation marks and a hard blank, which neither Go nor a Modelfile takes as such.
    "odd": CHATML.replace("+ m.role", "+ '{{x}} {' + m.role + '\"\"\" \\u00a0{'"),
}

Make = Callable[..., Path]


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    """A model's folder: the tiny model's with another template and other settings.

    With `bos` its tokenizer puts <|endoftext|> before every text, as Llama's and Gemma's do.
    """

    def build(template: str | None, *, bos: bool = False, **settings: Any) -> Path:
        folder = Path(shutil.copytree(tiny, tmp_path / "model", dirs_exist_ok=True))
        chat = folder / "chat_template.jinja"
        chat.unlink() if template is None else chat.write_text(template, encoding="utf-8")
        edit(folder / "tokenizer_config.json", bos_token="<|endoftext|>")
        if bos:
            token = {"id": "<|endoftext|>", "ids": [6141], "tokens": ["<|endoftext|>"]}
            pieces = [{"SpecialToken": {"id": token["id"], "type_id": 0}}]
            text = {"Sequence": {"id": "A", "type_id": 0}}
            second = {"Sequence": {"id": "B", "type_id": 1}}
            processor = {
                "type": "TemplateProcessing",
                "single": [*pieces, text],
                "pair": [*pieces, text, *pieces, second],
                "special_tokens": {token["id"]: token},
            }
            edit(folder / "tokenizer.json", post_processor=processor)
            edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        for file, values in settings.items():
            edit(folder / f"{file}.json", **values)
        return folder

    return build


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


def template_of(text: str) -> str:
    """The TEMPLATE of a Modelfile: `read` finds the same in the tests below."""
    return str(read(text)["TEMPLATE"][0])


def read(text: str) -> dict[str, list[str]]:
    """A Modelfile's instructions, after parser/parser.go: what it drops and where a value ends."""
    found: dict[str, list[str]] = {}
    lines = [line for line in text.splitlines(keepends=True)]
    while lines:
        line = lines.pop(0)
        if line.startswith("#") or not line.strip():
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            parameter, _, value = value.partition(" ")
            name = f"PARAMETER {parameter}"
        quotes = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        while quotes and not (
            value.strip().endswith(quotes) and len(value.strip()) >= 2 * len(quotes)
        ):
            value += lines.pop(0)
        value = "".join(c for c in value.strip() if c.isprintable() or c in "\t\r\n")
        inside = value[len(quotes) : len(value) - len(quotes)]
        found.setdefault(name, []).append(inside)
    return found


def as_ollama_passes(messages: list[dict[str, str]], **think: bool) -> dict[str, Any]:
    """The data of template.go's Execute for a chat, an answer's thought taken out by then."""
    passed = []
    for message in messages:
        thought, _, content = message["content"].rpartition("</think>")
        thoughtful = message["role"] == "assistant" and thought
        text = content if thoughtful else message["content"]
        passed.append({"Role": message["role"], "Content": text, "Thinking": thought})
    system = [m["content"] for m in messages if m["role"] == "system"]
    thinking: dict[str, Any] = {"Think": True, "IsThinkSet": True} | think
    return {"System": "\n\n".join(system), "Messages": passed, "Response": "", **thinking}


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_template_in_go_writes_what_the_jinja_template_writes(
    make: Make, kind: str, bos: bool
) -> None:
    folder = make(KINDS[kind], bos=bos)
    tokenizer = models.load_tokenizer(folder)
    template = template_of(modelfile.modelfile(folder, "./model-f16.gguf"))
    pieces = modelfile.derive(tokenizer, kind)
    assert (pieces.system is None) == (kind == "gemma")
    checked = 0
    for messages in modelfile.conversations(pieces):
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        if bos:  # every kind of these but the ChatML ones writes it
            expected = expected.removeprefix("<|endoftext|>")
        assert go_template.execute(template, as_ollama_passes(messages)) == expected
        checked += 1
    assert checked >= 18
