"""A fused model's Modelfile: what `ollama create NAME -f Modelfile` reads.

Reads a fused folder's config.json, generation_config.json, tokenizer and chat template; writes
nothing. The Modelfile works with a GGUF beside it and with the folder itself, of which Ollama turns
the architectures in SAFETENSORS into a GGUF.

Ollama's TEMPLATE is in Go's text/template, a model's own template in Jinja. Here the second is
asked about conversations of known texts, the fixed pieces between these texts become the first, and
both have to write the same for other conversations, or there is no Modelfile. What Ollama passes to
a TEMPLATE, and how a Modelfile is quoted, is from its template/template.go, thinking/template.go
and parser/parser.go (0.33, commit fb30760).

Ollama since 0.30 takes the Jinja template inside a GGUF instead where that one can do more, which
mostly means tools. The TEMPLATE is for all other models, for folders and for earlier versions.

Limits: a system message comes first or not at all; messages of one role in a row are joined by
Ollama, with an empty line; the last message is a question, so an answer that a program wants to be
continued is ended; of contents that the Jinja template trims, ASCII's white space is trimmed.
"""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from athanor import files
from athanor.chat.load import load_tokenizer
from athanor.errors import UserError
from athanor.model.source import stated_stop_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Message = dict[str, str]

# What Ollama imports from a folder of safetensors among the models that mlx-lm trains, from its
# convert/convert.go. Qwen3 and Mistral 7B are not in it: they need the GGUF.
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

# Tokens of context that are asked for at most: a context takes memory from the start, and models
# state up to a million.
LONGEST = 8192

# Go's templates have no function that trims, but they count, compare and cut.
TRIM = (
    '{{ define "trim" }}{{ $t := . }}'
    '{{ range len $t }}{{ if eq (slice $t 0 1) " " "\\n" "\\t" "\\r" }}{{ $t = slice $t 1 }}'
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ range len $t }}{{ $n := len (slice $t 1) }}"
    '{{ if eq (slice $t $n) " " "\\n" "\\t" "\\r" }}{{ $t = slice $t 0 $n }}'
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ $t }}{{ end }}"
)


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around contents: before and after, by role.

    A system message has a turn of its own, opens the first question, or opens the last (`place`);
    in the second case `before` holds what opens that question. None: the template drops it.
    """

    start: str
    no_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str
    system: tuple[str, str] | None = None
    place: Literal["turn", "first", "last"] = "turn"
    trimmed: frozenset[str] = field(default=frozenset())
    # Earlier answers are written without their thoughts: what is before "</think>" is cut.
    cuts_thoughts: bool = False
    # What closes the thought at once, where the template can be told not to think.
    no_thought: str = ""


def modelfile(
    model: Path,
    source: str,
    *,
    system: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> str:
    """The text of a Modelfile for a fused folder.

    `source` is what FROM names, as seen from the Modelfile: "./model-f16.gguf", or "." for the
    folder itself. The stops are generation_config.json's; so are the sampling parameters, where
    `do_sample: false` is temperature 0. `parameters` adds to them or takes their place, under
    Ollama's names.

    Raises:
        UserError: when no TEMPLATE writes what the chat template writes; when a system message
            is given to a template that has no place for one, or can't stand in a Modelfile.
    """
    tokenizer = load_tokenizer(model)
    generation: dict[str, Any] = files.read_json(model / "generation_config.json")
    config: dict[str, Any] = files.read_json(model / "config.json")
    notes = ["ollama create NAME -f Modelfile && ollama run NAME"]

    architecture = (config.get("architectures") or ["?"])[0]
    if not source.endswith(".gguf") and architecture not in SAFETENSORS:
        notes.append(
            f"Ollama 0.33 imports no {architecture} from safetensors: let FROM name the GGUF."
        )

    if tokenizer.has_chat_template:
        pieces = derive(tokenizer, str(model))
        notes += _notes(tokenizer, pieces)
        if system is not None and pieces.system is None:
            raise UserError(
                f"{model}: its chat template writes no system message, so SYSTEM {system!r} would "
                "have no effect: leave it out"
            )
        template = go_template(pieces)
    else:
        notes.append("The model has no chat template: it goes on with the text that it is given.")
        template = "{{ .Prompt }}"

    values = _sampling(generation) | {"num_ctx": _context(config)}
    values["stop"] = _stops(generation, tokenizer)
    values |= parameters or {}

    lines = [f"# {note}" for note in notes]
    lines += [f"FROM {source}", f"TEMPLATE {_quoted(template)}"]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {_value(one)}")
    return "\n".join(lines) + "\n"


def derive(tokenizer: "TokenizerWrapper", name: str) -> Pieces:
    """The pieces of a tokenizer's chat template, checked against the template itself.

    Raises:
        UserError: naming the conversation that the pieces write in another way.
    """
    pieces = _pieces(tokenizer, name)
    for messages in conversations(pieces):
        expected = rendered(messages, tokenizer)
        if expected is None:
            continue  # the template refuses it, which Ollama's can't
        found = put_together(pieces, messages)
        if found != expected:
            raise UserError(
                f"{name}: no TEMPLATE for Ollama: of the conversation "
                f"{json.dumps(messages, ensure_ascii=False)} the model's chat template makes "
                f"{expected!r}, and a TEMPLATE from its pieces would make {found!r}; leave the "
                "Modelfile out and run the GGUF with llama.cpp, which has the chat template"
            )
    return pieces


def rendered(messages: list[Message], tokenizer: "TokenizerWrapper", **said: Any) -> str | None:
    """What the chat template writes to ask for the next answer, less what the tokenizer adds.

    A first token that the tokenizer puts before every text is not to be in a TEMPLATE too. None
    where the template refuses the conversation.
    """
    said = {"add_generation_prompt": True} | said
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **said))
    except Exception:  # chat templates raise what they like
        return None
    return text.removeprefix(str(tokenizer.bos_token)) if _puts_bos(tokenizer) else text


def put_together(pieces: Pieces, messages: list[Message]) -> str:
    """What go_template's template writes; a system message is the first or there is none."""
    said = {"system": pieces.system, "user": pieces.user, "assistant": pieces.assistant}
    has_system = messages[0]["role"] == "system"
    text = pieces.start + ("" if has_system else pieces.no_system)
    for place, message in enumerate(messages):
        role = message["role"]
        before, after = said[role] or ("", "")
        if role == "system" and (pieces.system is None or pieces.place == "last"):
            continue
        if role == "user" and pieces.system and has_system:
            if pieces.place == "first" and place == 1:
                before = ""
            if pieces.place == "last" and message is messages[-1]:
                opens, closes = pieces.system
                before += opens + _content(messages[0], pieces) + closes
        text += before + _content(message, pieces) + after
    return text + pieces.ask


def go_template(pieces: Pieces) -> str:
    """The pieces as a template in Go's text/template, over what Ollama passes to it."""
    has_system = '(eq (index $.Messages 0).Role "system")'

    def content(role: str, of: str = ".Content") -> str:
        return f'{{{{ template "trim" {of} }}}}' if role in pieces.trimmed else f"{{{{ {of} }}}}"

    opens = _literal(pieces.user[0])
    branches = []
    if pieces.system is not None:
        before, after = map(_literal, pieces.system)
        if pieces.place == "last":
            first = content("system", "(index $.Messages 0).Content")
            is_last = "(eq (len (slice $.Messages $i)) 1)"
            opens += f"{{{{ if and {is_last} {has_system} }}}}{before}{first}{after}{{{{ end }}}}"
        else:
            branches.append(("system", before + content("system") + after))
        if pieces.place == "first":
            opens = f"{{{{ if not (and (eq $i 1) {has_system}) }}}}{opens}{{{{ end }}}}"
    branches.append(("user", opens + content("user") + _literal(pieces.user[1])))
    before, after = map(_literal, pieces.assistant)
    # Never written, but where Ollama finds the tags by which it takes thoughts out of answers.
    tags = "{{ if false }}<think>{{ .Thinking }}</think>{{ end }}" if pieces.cuts_thoughts else ""
    branches.append(("assistant", before + tags + content("assistant") + after))

    text = TRIM if pieces.trimmed else ""
    text += _literal(pieces.start) + "{{ range $i, $_ := .Messages }}"
    if pieces.no_system:
        without = _literal(pieces.no_system)
        text += f"{{{{ if and (eq $i 0) (not {has_system}) }}}}{without}{{{{ end }}}}"
    for number, (role, turn) in enumerate(branches):
        text += f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{turn}'
    text += "{{ end }}{{ end }}" + _literal(pieces.ask)
    if pieces.no_thought:
        silent = _literal(pieces.no_thought)
        text += f"{{{{ if and .IsThinkSet (not .Think) }}}}{silent}{{{{ end }}}}"
    return text


def conversations(pieces: Pieces) -> list[list[Message]]:
    """Conversations that the template and its pieces have to write alike; a question is last.

    Ollama takes thoughts out of answers before a TEMPLATE sees them; here that is the chat
    template's work, on answers as a program other than Ollama keeps them.
    """
    texts = [
        "Hello",
        "月亮哪天最圆？\n请回答。",
        " \n leading and trailing \n\n",
        'say "no", \'yes\', """this""" and {{ .Content }} {% if %} {"a": {"b": 1}}}',
        "line one\r\n\tline two",
        "<b>x</b> & <|x|> [INST] </s> 🙂",
    ]
    found = []
    for i, text in enumerate(texts):
        other, last = texts[(i + 1) % len(texts)], texts[(i + 2) % len(texts)]
        answer = f"<think>{other}</think>{last}" if pieces.cuts_thoughts else last
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": other},
            {"role": "user", "content": last},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": text},
        ]
        system = [{"role": "system", "content": text}]
        for count in (1, 3, 5):
            found += [turns[:count], *([system + turns[:count]] if pieces.system else [])]
    if pieces.system and pieces.place == "turn":
        found.append([{"role": "system", "content": "alone"}])
    return found


def _pieces(tokenizer: "TokenizerWrapper", name: str) -> Pieces:
    """Finds the pieces from what the template writes around texts that it can't know."""
    texts = ["uno1dos", "ans1wer", "uno2dos", "ans2wer", "uno3dos"]
    roles = ["user", "assistant"] * 3
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    parts = _parts(rendered(turns, tokenizer), texts)
    if parts is None:
        raise UserError(
            f"{name}: no TEMPLATE for Ollama: its chat template refuses questions and answers in "
            "turn, or does not write each of them once"
        )
    opening, answered, asked, *_, end = parts
    asked_alone = _tail(turns[:1], tokenizer)
    after_user = _shared(asked_alone, answered, end)
    after_assistant = _shared(_tail(turns[:2], tokenizer), asked)
    # Read backwards: what opens the first question too, where that comes after the first token.
    before_user = _shared(asked[len(after_assistant) :][::-1], opening[::-1])[::-1]
    after_assistant = asked.removesuffix(before_user)
    start = opening.removesuffix(before_user)
    bos = str(tokenizer.bos_token or "")
    bos = bos if start.startswith(bos) else ""
    pieces = Pieces(
        start=bos,
        no_system=start.removeprefix(bos),
        user=(before_user, after_user),
        assistant=(answered[len(after_user) :], after_assistant),
        ask=end[len(after_user) :],
    )
    pieces = _with_system(pieces, turns, tokenizer)

    silent = rendered(turns[:1], tokenizer, enable_thinking=False) or ""
    usual = put_together(pieces, turns[:1])
    if silent.startswith(usual):
        pieces = replace(pieces, no_thought=silent.removeprefix(usual))

    thought = [turns[0], turns[1] | {"content": "<think>tho1ught</think>ans1wer"}, turns[2]]
    if rendered(thought, tokenizer) == put_together(pieces, turns[:3]):
        pieces = replace(pieces, cuts_thoughts=True)

    for role in ("system", "user", "assistant"):
        first = [{"role": "system", "content": "sys1tem"}] if pieces.system else []
        padded = [
            m | {"content": f" \n {m['content']} \n "} if m["role"] == role else m
            for m in first + turns[:3]
        ]
        trims = replace(pieces, trimmed=pieces.trimmed | {role})
        if put_together(trims, padded) == rendered(padded, tokenizer):
            pieces = trims
    return pieces


def _with_system(pieces: Pieces, turns: list[Message], tokenizer: "TokenizerWrapper") -> Pieces:
    """The pieces with those of a system message, wherever the template puts it."""
    system = {"role": "system", "content": "sys1tem"}
    text = rendered([system, *turns], tokenizer)
    texts = [m["content"] for m in turns]
    if parts := _parts(text, ["sys1tem", *texts]):
        before, after = parts[0].removeprefix(pieces.start), parts[1]
        opens = pieces.user[0]
        if after.endswith(opens):
            return replace(pieces, system=(before, after.removesuffix(opens)))
        return replace(pieces, system=(before, after), place="first")
    if parts := _parts(text, [*texts[:-1], "sys1tem", texts[-1]]):
        before = parts[-3].removeprefix(pieces.assistant[1] + pieces.user[0])
        return replace(pieces, system=(before, parts[-2]), place="last")
    return pieces


def _parts(text: str | None, marks: list[str]) -> list[str] | None:
    """The text around the marks; None where they are not there, each once and in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _shared(*texts: str) -> str:
    """The longest start that texts have in common."""
    columns = zip(*texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns))


def _tail(messages: list[Message], tokenizer: "TokenizerWrapper") -> str:
    """What the template writes after the last content when nothing is asked."""
    text = rendered(messages, tokenizer, add_generation_prompt=False) or ""
    return text.rpartition(messages[-1]["content"])[2]


def _content(message: Message, pieces: Pieces) -> str:
    content = message["content"]
    if message["role"] == "assistant" and pieces.cuts_thoughts:
        content = content.rpartition("</think>")[2]
    return content.strip(" \n\t\r") if message["role"] in pieces.trimmed else content


def _puts_bos(tokenizer: "TokenizerWrapper") -> bool:
    """Whether the tokenizer puts its first token before a text by itself, as the runtime will."""
    ids = tokenizer.encode("x")
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _notes(tokenizer: "TokenizerWrapper", pieces: Pieces) -> list[str]:
    """What a person has to know about this TEMPLATE."""
    notes = []
    question = [{"role": "user", "content": "?"}]
    usual = rendered(question, tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    if rendered(question, tokenizer, tools=[tool]) != usual:
        notes.append("The model's chat template knows tools; this TEMPLATE does not.")
    if pieces.system is None:
        notes.append(
            "The model's chat template has no place for a system message: none is written."
        )
    if rendered(question, tokenizer, strftime_now=lambda _: "another day") != usual:
        notes.append("The model's chat template writes the date; here it stays the day of export.")
    if _puts_bos(tokenizer):
        bos = str(tokenizer.bos_token)
        written = str(tokenizer.apply_chat_template(question, tokenize=False)).startswith(bos)
        put = f"{bos} is not in the TEMPLATE: the tokenizer puts it before every prompt"
        notes.append(put + ("." if written else ", which the chat template does not."))
    return notes


def _sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """Ollama's sampling parameters, as transformers reads generation_config.json.

    Two defaults differ: Ollama samples where `do_sample` is false, at a temperature of 0.8, and
    before 0.32.10 it punished repetition by 1.1, which breaks answers that were learned by heart.
    """
    said = {SAMPLING[key]: generation[key] for key in SAMPLING if generation.get(key) is not None}
    penalty = {"repeat_penalty": said.get("repeat_penalty", 1.0)}
    return ({"temperature": 0} if generation.get("do_sample") is False else said) | penalty


def _context(config: dict[str, Any]) -> int:
    stated = config.get("text_config", config).get("max_position_embeddings", LONGEST)
    return min(int(stated), LONGEST)


def _stops(generation: dict[str, Any], tokenizer: "TokenizerWrapper") -> list[str]:
    ids = stated_stop_ids(generation)
    return [str(tokenizer.decode([i], skip_special_tokens=False)) for i in ids]


def _literal(text: str) -> str:
    """Text in a Go template: what would open an action, or be lost in a Modelfile, as a string.

    A Modelfile ends a text at three quotation marks.
    """

    def escaped(found: re.Match[str]) -> str:
        return '{{ "' + "".join(f"\\U{ord(character):08x}" for character in found[0]) + '" }}'

    lost = "".join(f"|{re.escape(c)}" for c in _lost(text))
    return re.sub(r'\{+|"{3,}' + lost, escaped, text)


def _lost(text: str) -> list[str]:
    """The characters that Ollama's parser of Modelfiles leaves out: strconv.IsPrint's others."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\t"})


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    """A text as the value of an instruction.

    Raises:
        UserError: when Ollama's parser would read another text.
    """
    lost = _lost(text)
    if lost or re.search(r'"""\s', text):
        what = f"the characters {lost} are lost there" if lost else 'it has """ before a blank'
        raise UserError(f"the text {text!r} can't stand in a Modelfile: {what}; change it")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
