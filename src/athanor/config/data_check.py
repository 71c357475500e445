"""Values of conf/data: checks and their actions, formats, templates, cleaning steps.

What can be wrong with rows, under a name each, and what is done about it.

`stop` ends the stage with every fault named, `skip` puts the row into rejected.jsonl and goes on,
`fix` mends it, `warn` says it and keeps the row, `ignore` does not look. conf/data/default.yaml
chooses one for each name.
"""

from collections.abc import Iterator
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from athanor.config.schema import DataConfig

# In the order in which they are done.
CLEANING = ("html", "control", "full_width", "whitespace")

STOP, SKIP, FIX, WARN, IGNORE = "stop", "skip", "fix", "warn", "ignore"


# What each check means, and which actions it may have.
CHECKS: dict[str, tuple[str, str]] = {
    "unknown_file": ("a file of a kind that is not read", "stop warn"),
    "shared_out": ("a file without a split's name beside files that have one", "stop warn"),
    "unreadable_file": ("a file that is not what its name says", "stop warn"),
    "byte_order_mark": ("a byte order mark at the start of a file", "stop fix"),
    "invalid_utf8": ("bytes that are no UTF-8", "stop skip"),
    "invalid_json": ("not JSON", "stop skip"),
    "several_objects": ("several JSON objects on a line", "stop skip fix"),
    "split_object": ("one JSON object over several lines", "stop skip fix"),
    "duplicate_key": ("the same key twice in a JSON object", "stop skip"),
    "not_a_number": ("NaN or an infinite number, which JSON does not have", "stop skip"),
    "half_character": ("half a character (a lone surrogate, as of a cut emoji)", "stop skip fix"),
    "wrong_columns": ("a CSV line that does not fit the header", "stop skip"),
    "not_an_object": ("JSON, but no object", "stop skip"),
    "image": ("a row with images, which language models do not read", "stop skip"),
    "missing_key": ("a row without the keys of any format, or of its file's", "stop skip"),
    "wrong_type": ("a value of another type than its key needs", "stop skip"),
    "empty_prompt": ("a question without a text", "stop skip"),
    "empty_completion": ("an answer without a text", "stop skip"),
    "empty_text": ("a text without a character", "stop skip"),
    "mixed_formats": ("a row of another format than its file's first", "stop skip warn"),
    "unknown_role": ("a message of nobody known", "stop skip"),
    "no_question": ("an answer that nothing comes before", "stop skip"),
    "no_answer": ("a conversation that does not end with an answer", "stop skip fix"),
    "malformed_tool_call": ("a tool, or a call of one, that can't be read", "stop skip"),
    "unknown_label": ("a label that data.labels does not have", "stop skip"),
    "special_token": ("a special token of the model inside a text", "stop skip fix warn"),
    "template_refuses": ("a row that the model's chat template refuses", "stop skip"),
    "left_out_by_template": ("what the chat template leaves out", "stop skip warn"),
    "low_quality": ("a quality_score below data.min_quality", "stop skip"),
    "nothing_to_learn": ("no supervised token within train.max_seq_length", "stop skip"),
    "too_long": ("longer than train.max_seq_length: cut", "stop skip warn"),
    "end_cut": ("cut before an answer's end: that answer is not learned", "stop skip warn"),
    "answer_not_found": ("an answer that the template writes otherwise", "stop skip warn"),
    "asked_otherwise": ("asked in other tokens than it is trained on", "stop skip warn"),
    "spelled_characters": ("many characters that take several tokens each", "stop skip warn"),
    "other_script": ("in another script than almost all other rows", "stop skip warn"),
    "duplicate": ("the same row twice in a split", "stop skip warn"),
    "leak": ("a row that a held-out split has, too", "stop skip warn"),
    "near_leak": ("almost a row that a held-out split has", "stop skip warn ignore"),
    "question_leak": ("a question that a held-out split asks, too", "stop skip warn"),
    "imbalance": ("almost all rows have one label, or one source", "stop warn"),
    "too_few_rows": ("a split without rows", "stop"),
}


def check_misfits(actions: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, what was expected) for what data.checks can't say."""
    for name, action in actions.items():
        if name not in CHECKS:
            yield name, "no such check; there are " + ", ".join(CHECKS)
        elif action not in CHECKS[name][1].split():
            yield name, f"expected one of {CHECKS[name][1].replace(' ', ', ')}, found {action!r}"
    for name in CHECKS:
        if name not in actions:
            yield name, "missing; conf/ gives it no action"


AUTO = "auto"


FORMATS = (
    "chat",
    "completions",
    "instruction",
    "classification",
    "text",
    "template",
    "article",
)


def compiled(text: str) -> Template:
    """A Jinja template that can touch nothing but the values of a row.

    Raises:
        jinja2.TemplateSyntaxError: where it is none.
    """
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text)


def format_misfits(config: DataConfig) -> list[tuple[str, str]]:
    """(key, what was expected) for each format and template that makes no sense."""
    found = []
    for pattern, name in {"format": config.format, **config.formats}.items():
        key = "format" if pattern == "format" else f"formats.{pattern}"
        if name not in (AUTO, *FORMATS):
            found.append((key, f"expected one of {', '.join((AUTO, *FORMATS))}, found {name!r}"))
    template = dict(config.template)
    known = ("system", "prompt", "completion", "text")
    found += _syntax("label_prompt", config.label_prompt)
    for key, text in template.items():
        if key not in known:
            found.append((f"template.{key}", f"no such key; there are {', '.join(known)}"))
        elif text is not None:
            found += _syntax(f"template.{key}", text)
    has = {key for key, text in template.items() if text is not None}
    uses = "template" in (config.format, *config.formats.values())
    if uses and not ({"prompt", "completion"} <= has or "text" in has):
        found.append(("template", "expected a prompt and a completion, or a text"))
    return found


def _syntax(key: str, text: Any) -> list[tuple[str, str]]:
    try:
        compiled(str(text))
    except TemplateError as error:
        return [(key, f"expected a Jinja template: {error.message}")]
    return []
