"""Modelfiles for chat templates of the kinds that models come with, against the templates."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.chat.load import load_tokenizer
from athanor.fuse.export_ollama import build_modelfile
from athanor.fuse.template_pieces import derive_pieces, sample_conversations
from support import go_template
from support.refused import refused

# Templates that write what the published ones of these families write, tools left out.
CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

QWEN25 = (
    """{%- if tools -%}{{ 'Tools: ' + tools | tojson }}{%- endif -%}
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful "assistant".<|im_end|>\\n' -}}
{%- endif -%}"""
    + CHATML
)

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
    # Braces, three quotation marks and a hard blank: neither Go nor a Modelfile takes them as such.
    "odd": CHATML.replace("+ m.role", "+ '{{x}} {' + m.role + '\"\"\" \\u00a0{'"),
}

Make = Callable[..., Path]


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    """Make a copy of the tiny model's folder with a different template and settings.

    With `bos` its tokenizer puts <|endoftext|> before every text, as Llama's and Gemma's do; with
    `thinks` it has tokens for thoughts, by which mlx-lm knows models that think.
    """

    def build(
        template: str | None, *, bos: bool = False, thinks: bool = False, **settings: Any
    ) -> Path:
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
        if thinks:
            added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
            thoughts = [
                added[0] | {"content": token, "id": 6144 + i, "special": False}
                for i, token in enumerate(("<think>", "</think>"))
            ]
            edit(folder / "tokenizer.json", added_tokens=added + thoughts)
            (folder / "model.safetensors").unlink()  # it has no rows for them
        for file, values in settings.items():
            edit(folder / f"{file}.json", **values)
        return folder

    return build


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


def template_of(text: str) -> str:
    """Return the TEMPLATE of a Modelfile."""
    return str(read(text)["TEMPLATE"][0])


def read(text: str) -> dict[str, list[str]]:
    """Return a Modelfile's instructions, as Ollama's parser/parser.go reads them."""
    instructions: dict[str, list[str]] = {}
    lines = text.splitlines(keepends=True)
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
        instructions.setdefault(name, []).append(inside)
    return instructions


def as_ollama_passes(messages: list[dict[str, str]], **think: bool) -> dict[str, Any]:
    """Return the data of template.go's Execute for a chat, without the thoughts of answers."""
    passed = []
    for message in messages:
        thought, _, content = message["content"].rpartition("</think>")
        thoughtful = message["role"] == "assistant" and thought
        text = content if thoughtful else message["content"]
        passed.append({"Role": message["role"], "Content": text, "Thinking": thought})
    system = [m["content"] for m in messages if m["role"] == "system"]
    thinking: dict[str, Any] = {"Think": True, "IsThinkSet": True} | think
    return {"System": "\n\n".join(system), "Messages": passed, "Response": "", **thinking}


Case = tuple[dict[str, Any], str]


def cases(folder: Path, *, bos: bool, **options: bool) -> list[Case]:
    """Return Ollama's data for conversations, and the prompts that the chat template writes."""
    tokenizer = load_tokenizer(folder)
    samples = []
    for messages in sample_conversations(derive_pieces(tokenizer, str(folder))):
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **options
        )
        think = {"Think": options["enable_thinking"]} if options else {}
        expected = text.removeprefix("<|endoftext|>") if bos else text
        samples.append((as_ollama_passes(messages, **think), expected))
    assert len(samples) >= 18
    return samples


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_template_in_go_writes_what_the_jinja_template_writes(
    make: Make, kind: str, bos: bool
) -> None:
    folder = make(KINDS[kind], bos=bos)
    template = template_of(build_modelfile(folder, "./model-f16.gguf"))
    for data, expected in cases(folder, bos=bos):
        assert go_template.execute(template, data) == expected


GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

func main() {
	var templates []struct { Template string; Data []map[string]any }
	if err := json.NewDecoder(os.Stdin).Decode(&templates); err != nil { panic(err) }
	var out [][]string
	for _, one := range templates {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		var texts []string
		for _, data := range one.Data {
			var b strings.Builder
			if err := t.Execute(&b, data); err != nil { panic(err) }
			texts = append(texts, b.String())
		}
		out = append(out, texts)
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="go is not on the PATH")
def test_go_itself_writes_what_the_jinja_templates_write(make: Make, tmp_path: Path) -> None:
    asked, expected = [], []
    for bos in (False, True):
        for kind in KINDS.values():
            folder = make(kind, bos=bos)
            template = template_of(build_modelfile(folder, "."))
            samples = cases(folder, bos=bos)
            asked.append({"Template": template, "Data": [data for data, _ in samples]})
            expected.append([text for _, text in samples])
    (tmp_path / "x.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "x.go"], cwd=tmp_path, input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_model_that_thinks_can_be_told_not_to(make: Make) -> None:
    folder = make(QWEN3, thinks=True)
    template = template_of(build_modelfile(folder, "."))
    for on in (True, False):
        asked = cases(folder, bos=False, enable_thinking=on)
        for data, expected in asked:
            assert expected.endswith("</think>\n\n") == (not on)
            assert go_template.execute(template, data) == expected


@pytest.mark.parametrize(("kind", "named"), [(QWEN3, True), (R1, True), (CHATML, False)])
def test_the_tags_of_thoughts_stand_where_ollama_looks_for_them(
    make: Make, kind: str, named: bool
) -> None:
    """By thinking/template.go: the texts around .Thinking in a range over .Messages."""
    template = template_of(build_modelfile(make(kind), "."))
    assert ("}}<think>{{ .Thinking }}</think>{{" in template) == named


def test_a_whole_modelfile(make: Make) -> None:
    folder = make(None)
    shutil.copyfile(Path(__file__).parents[2] / "models/tiny/chat_template.jinja", folder / "x")
    (folder / "x").rename(folder / "chat_template.jinja")
    text = build_modelfile(folder, "./model-f16.gguf", system="你是助手")
    assert (
        text
        == """\
# ollama create NAME -f Modelfile && ollama run NAME
FROM ./model-f16.gguf
TEMPLATE \"""{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
\"""
SYSTEM "你是助手"
PARAMETER temperature 0
PARAMETER repeat_penalty 1.0
PARAMETER num_ctx 2048
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
"""
    )


def test_parameters_are_the_generations_and_the_configs(make: Make) -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    folder = make(
        CHATML,
        generation_config=sampling | {"eos_token_id": 6143},
        config={"max_position_embeddings": 131072},
    )
    instructions = read(build_modelfile(folder, "."))
    parameters = {name: values for name, values in instructions.items() if name.startswith("PARAM")}
    assert parameters == {
        "PARAMETER temperature": ["0.6"],
        "PARAMETER repeat_penalty": ["1.05"],
        "PARAMETER num_ctx": ["8192"],
        "PARAMETER top_p": ["0.95"],
        "PARAMETER stop": ["<|im_end|>"],
    }


@pytest.mark.parametrize(
    ("kind", "bos", "note"),
    [
        (QWEN25, False, "knows tools; this TEMPLATE does not"),
        (LLAMA32, False, "writes the date; here it stays 2"),
        (GEMMA, False, "no place for a system message"),
        (GEMMA, True, "<|endoftext|> is not in the TEMPLATE: the tokenizer puts it"),
        (CHATML, True, "before every prompt, which the chat template does not"),
        (None, False, "has no chat template"),
    ],
)
def test_comments_say_what_a_template_leaves_out(
    make: Make, kind: str | None, bos: bool, note: str
) -> None:
    notes = [
        line
        for line in build_modelfile(make(kind, bos=bos), ".").splitlines()
        if line.startswith("#") and note in line
    ]
    assert len(notes) == 1
    plain = build_modelfile(make(CHATML), ".")
    assert note not in plain or kind == CHATML


@pytest.mark.parametrize("source", [".", "./model-f16.gguf"])
def test_a_folder_that_ollama_does_not_import_is_named(make: Make, source: str) -> None:
    folder = make(CHATML, config={"architectures": ["Qwen3ForCausalLM"]})
    said = "imports no Qwen3ForCausalLM" in build_modelfile(folder, source)
    assert said == (source == ".")


NUMBERED = CHATML.replace("'<|im_start|>' +", "'<|im_start|>' ~ loop.index ~")
SHOUTED = CHATML.replace("m.content", "m.content | upper")
SINGLE = "{% if messages | length > 2 %}{{ raise_exception('closed') }}{% endif %}" + CHATML
LEFT = CHATML.replace("m.content", "m.content.lstrip()")


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (NUMBERED, "template_without_pieces"),
        (LEFT, "template_without_pieces"),
        (SHOUTED, "template_hides_turns"),
        (SINGLE, "template_hides_turns"),
    ],
)
def test_a_template_that_go_cannot_write_is_refused(make: Make, template: str, code: str) -> None:
    with refused(f"fuse.{code}"):
        build_modelfile(make(template), ".")


@pytest.mark.parametrize(
    ("template", "system", "code", "facts"),
    [
        (GEMMA, "Be kind.", "template_without_system", {"system": "Be kind."}),
        (CHATML, "a\u3000b", "modelfile_loses_characters", {"characters": ["\u3000"]}),
        (CHATML, 'x\n""" y', "modelfile_ends_text", {"text": 'x\n""" y'}),
    ],
)
def test_a_system_message_that_would_be_lost_is_refused(
    make: Make, template: str, system: str, code: str, facts: dict[str, Any]
) -> None:
    with refused(f"fuse.{code}", **facts):
        build_modelfile(make(template), ".", system=system)


@pytest.mark.parametrize("system", ['Say "yes"', '"', "a\n b ", ' """', "{{ .no }}", "x" * 999])
def test_a_system_message_is_read_as_it_was_written(make: Make, system: str) -> None:
    assert read(build_modelfile(make(CHATML), ".", system=system))["SYSTEM"] == [system]
