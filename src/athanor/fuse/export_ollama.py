"""A fused model's Modelfile, which `ollama create NAME -f Modelfile` reads.

Reads a fused folder's config.json, generation_config.json, tokenizer and chat template; writes
nothing. The Modelfile works with a GGUF beside it and with the folder itself, of which Ollama turns
the architectures in SAFETENSORS into a GGUF.

Ollama's TEMPLATE is in Go's text/template, a model's own template in Jinja: the first is written
from the fixed pieces of the second (template_pieces.py, go_template.py). The data of a TEMPLATE and
the quoting of a Modelfile are from Ollama's template/template.go, thinking/template.go and
parser/parser.go (0.33, commit fb30760).

Ollama since 0.30 takes the Jinja template inside a GGUF instead where that one can do more, which
mostly means tools. The TEMPLATE is for all other models, for folders and for earlier versions.

Limits: a system message comes first or not at all; messages of one role in a row are joined by
Ollama, with an empty line; the last message is a question, so an answer that a program wants to be
continued is ended; of contents that the Jinja template trims, ASCII's white space is trimmed.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import files
from athanor.chat.load import load_tokenizer
from athanor.chat.rendering import Rendering, choose_date, rendering_of
from athanor.errors import UserError
from athanor.fuse.go_template import lost_characters, write_go_template
from athanor.fuse.template_pieces import Pieces, derive_pieces, puts_bos, render
from athanor.model.folder import stated_stop_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The models that mlx-lm trains and Ollama imports from a folder of safetensors, from its
# convert/convert.go. Qwen3 and Mistral 7B are not among them: they need the GGUF.
SAFETENSORS = {
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "MixtralForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Ministral3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo3ForCausalLM",
    "CohereForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "NemotronHForCausalLM",
}

# transformers' names in generation_config.json, and Ollama's.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}

# The largest context that is set: it takes memory from the start, and models state up to a million.
LONGEST = 8192


def build_modelfile(
    model: Path, source: str, *, system: str | None = None, rendering: Rendering | None = None
) -> str:
    """Return the text of a Modelfile for a fused folder.

    `source` is what FROM names, as seen from the Modelfile: "./model-f16.gguf", or "." for the
    folder itself. The TEMPLATE writes conversations as `rendering` does. Stops and sampling
    parameters are generation_config.json's, where `do_sample: false` is temperature 0.

    Raises:
        UserError: where no TEMPLATE writes what the chat template writes, and where the template
            has no place for the system message or a Modelfile cannot hold it.
    """
    if rendering is not None and system is None:  # a person's own system messages stay apart
        rendering = replace(rendering, merge_system=False)
    tokenizer = load_tokenizer(model, rendering)
    generation: dict[str, Any] = files.read_json(model / "generation_config.json")
    config: dict[str, Any] = files.read_json(model / "config.json")
    notes = ["ollama create NAME -f Modelfile && ollama run NAME"]

    architecture = (config.get("architectures") or ["?"])[0]
    if not source.endswith(".gguf") and architecture not in SAFETENSORS:
        notes.append(
            f"Ollama 0.33 imports no {architecture} from safetensors: let FROM name the GGUF."
        )

    if tokenizer.has_chat_template:
        pieces = derive_pieces(tokenizer, str(model))
        notes += _notes(tokenizer, pieces)
        if system is not None and pieces.system is None:
            raise UserError("fuse.template_without_system", model=model, system=system)
        template = write_go_template(pieces)
    else:
        notes.append("The model has no chat template: it continues the text of the prompt.")
        template = "{{ .Prompt }}"

    lines = [f"# {note}" for note in notes]
    lines += [f"FROM {source}", f"TEMPLATE {_quoted(template)}"]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    for name, value in (_sampling(generation) | {"num_ctx": _context(config)}).items():
        lines.append(f"PARAMETER {name} {json.dumps(value)}")
    for token in stated_stop_ids(generation):
        stop = tokenizer.decode([token], skip_special_tokens=False)
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    return "\n".join(lines) + "\n"


def _notes(tokenizer: "TokenizerWrapper", pieces: Pieces) -> list[str]:
    """Return the comments about what the TEMPLATE leaves out."""
    notes = []
    question = [{"role": "user", "content": "?"}]
    usual = render(question, tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    if render(question, tokenizer, tools=[tool]) != usual:
        notes.append("The model's chat template knows tools; this TEMPLATE does not.")
    if pieces.system is None:
        notes.append(
            "The model's chat template has no place for a system message: none is written."
        )
    if day := rendering_of(tokenizer).date or choose_date(tokenizer, None):
        notes.append(f"The model's chat template writes the date; here it stays {day}.")
    if puts_bos(tokenizer):
        bos = str(tokenizer.bos_token)
        written = str(tokenizer.apply_chat_template(question, tokenize=False)).startswith(bos)
        put = f"{bos} is not in the TEMPLATE: the tokenizer puts it before every prompt"
        notes.append(put + ("." if written else ", which the chat template does not."))
    return notes


def _sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """Return Ollama's sampling parameters, as transformers reads generation_config.json.

    Two defaults differ: Ollama samples where `do_sample` is false, at a temperature of 0.8, and
    before 0.32.10 it punished repetition by 1.1, which breaks answers that were learned by heart.
    """
    stated = {SAMPLING[key]: generation[key] for key in SAMPLING if generation.get(key) is not None}
    penalty = {"repeat_penalty": stated.get("repeat_penalty", 1.0)}
    return ({"temperature": 0} if generation.get("do_sample") is False else stated) | penalty


def _context(config: dict[str, Any]) -> int:
    """Return the number of tokens of context to reserve."""
    stated = config.get("text_config", config).get("max_position_embeddings", LONGEST)
    return min(int(stated), LONGEST)


def _quoted(text: str) -> str:
    """Return a text as the value of an instruction.

    Raises:
        UserError: where Ollama's parser would read a different text.
    """
    if lost := lost_characters(text):
        raise UserError("fuse.modelfile_loses_characters", text=text, characters=lost)
    if re.search(r'"""\s', text):
        raise UserError("fuse.modelfile_ends_text", text=text)
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
