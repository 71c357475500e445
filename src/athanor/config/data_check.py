"""Values of conf/data: checks and their actions, formats, templates, cleaning steps.

Each check has a name, and each fault of a row is its check's. conf/data/default.yaml chooses an
action for each: `stop` ends the stage after all faults are listed, `skip` moves the row to
rejected.jsonl, `fix` mends it, `warn` reports it and keeps the row, `ignore` turns the check off.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment
from omegaconf import OmegaConf

from athanor.config.schema import DataConfig
from athanor.errors import Problem, nearest

# Steps in their order.
CLEANING = ("html", "control", "full_width", "whitespace")

STOP, SKIP, FIX, WARN, IGNORE = "stop", "skip", "fix", "warn", "ignore"

# The description of each check, and the actions that it may have.
CHECKS: dict[str, tuple[str, str]] = {
    "unknown_file": ("a file of an unsupported type, or a link out of the folder", "stop warn"),
    "demo_rows": ("the demo's files beside files of your own", "stop warn"),
    "shared_out": ("a file without a split's name beside files with one", "stop warn"),
    "unreadable_file": ("a file that does not have the format of its name", "stop warn"),
    "encoding": ("a text file in another encoding than UTF-8", "stop fix"),
    "delimiter": ("a CSV file whose columns are not separated by commas", "stop fix"),
    "byte_order_mark": ("a byte order mark at the start of a file", "stop fix"),
    "invalid_utf8": ("bytes that are not UTF-8", "stop skip"),
    "invalid_json": ("invalid JSON", "stop skip"),
    "several_objects": ("several JSON objects on one line", "stop skip fix"),
    "split_object": ("one JSON object over several lines", "stop skip fix"),
    "duplicate_key": ("the same key twice in a JSON object", "stop skip"),
    "not_a_number": ("NaN or infinity, which JSON does not have", "stop skip"),
    "half_character": ("a lone surrogate: half a character, as of a cut emoji", "stop skip fix"),
    "wrong_columns": ("a CSV line that does not match the header", "stop skip"),
    "too_large": ("a row of more than data.max_row_bytes, or 1,000 messages", "stop skip"),
    "not_an_object": ("JSON that is not an object", "stop skip"),
    "unknown_columns": ("a file whose columns have no known names", "stop skip"),
    "image": ("a row with images, which language models do not read", "stop skip"),
    "missing_key": ("a row without the keys of any format, or of its file's", "stop skip"),
    "wrong_type": ("a value of another type than its key needs", "stop skip"),
    "empty_prompt": ("a question without text", "stop skip"),
    "empty_completion": ("an answer without text", "stop skip"),
    "empty_text": ("a text without characters", "stop skip"),
    "mixed_formats": ("a row of another format than the first of its file", "stop skip warn"),
    "unknown_role": ("a message with an unknown role", "stop skip"),
    "unknown_key": ("a key that is not read", "stop warn ignore"),
    "preference": ("preference data: an answer that is not to be learned", "stop fix"),
    "no_question": ("a conversation with an answer but no question", "stop skip"),
    "no_answer": ("a conversation that does not end with an answer", "stop skip fix"),
    "empty_system": ("a system message without text", "stop skip fix"),
    "unlearned_end": ("messages after the last answer that is learned", "stop skip fix"),
    "malformed_tool_call": ("a malformed tool, or call of one", "stop skip"),
    "unknown_label": ("a label that is not in data.labels", "stop skip"),
    "mixed_text": ("a text that is only partly in the form of a chat", "stop skip warn"),
    "special_token": ("a special token of the model inside a text", "stop skip fix warn"),
    "template_refuses": ("a row that the model's chat template refuses", "stop skip"),
    "left_out_by_template": ("content that the chat template leaves out", "stop skip warn"),
    "thought_left_out": ("a thought that the chat template has no place for", "stop skip warn"),
    "low_quality": ("a quality_score below data.min_quality", "stop skip"),
    "nothing_to_learn": ("no supervised token within train.max_seq_length", "stop skip"),
    "too_long": ("longer than train.max_seq_length, and cut", "stop skip warn"),
    "end_cut": ("cut before an answer's end, so that it is not learned", "stop skip warn"),
    "answer_not_found": ("an answer that the chat template rewrites", "stop skip warn"),
    "asked_otherwise": ("prompts that differ from the trained text", "stop skip warn"),
    "spelled_characters": ("many characters that take several tokens each", "stop skip warn"),
    "other_script": ("in another script than almost all rows", "stop skip warn"),
    "duplicate": ("the same row twice in a split", "stop skip warn"),
    "leak": ("a row that a held-out split has as well", "stop skip warn"),
    "near_leak": ("nearly a row of a held-out split", "stop skip warn ignore"),
    "question_leak": ("a question that a held-out split has as well", "stop skip warn"),
    "imbalance": ("almost all rows have the same label or source", "stop warn"),
    "too_few_rows": ("a split without rows", "stop"),
}


# The meanings of columns, and the roles of messages.
MEANINGS = (
    *("question", "answer", "context", "history", "system", "thought", "chat", "text", "label"),
    *("tools", "role", "content"),
)
ROLES = ("system", "user", "assistant", "tool", "call")


def data_misfits(config: DataConfig) -> Iterator[Problem]:
    """Yield a problem for each column, check, format, template, step that is impossible."""
    yield from _check_misfits(dict(config.checks))
    yield from _column_misfits(OmegaConf.to_container(config.columns))
    yield from _format_misfits(config)
    for step in config.clean:
        if step not in CLEANING:
            key = f"data.clean.{step}"
            yield Problem("config.unknown_key", key, candidates=nearest(step, CLEANING))
    for word, synonyms in config.synonyms.items():
        if not word or not synonyms:
            yield Problem("config.no_synonyms", f"data.synonyms.{word}")


def _check_misfits(actions: dict[str, Any]) -> Iterator[Problem]:
    for name, action in actions.items():
        key = f"data.checks.{name}"
        if name not in CHECKS:
            yield Problem("config.unknown_key", key, candidates=nearest(name, CHECKS))
        elif action not in CHECKS[name][1].split():
            options = CHECKS[name][1].split()
            yield Problem("config.not_an_option", key, options=options, value=action)
    for name in CHECKS:
        if name not in actions:
            yield Problem("config.missing_key", f"data.checks.{name}")


def _column_misfits(columns: Any) -> Iterator[Problem]:
    roles = columns.pop("roles", {})
    parts = [("data.columns", columns, MEANINGS), ("data.columns.roles", roles, ROLES)]
    for place, names, known in parts:
        for key, value in names.items() if isinstance(names, dict) else [("", names)]:
            is_texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
            if key not in known and key:
                yield Problem(
                    "config.unknown_key", f"{place}.{key}", candidates=nearest(str(key), known)
                )
            elif not is_texts:
                name = f"{place}.{key}".rstrip(".")
                yield Problem("config.wrong_type", name, expected="a list of texts", value=value)


AUTO = "auto"
FORMATS = ("chat", "completions", "instruction", "classification", "text", "template", "article")


@lru_cache(maxsize=64)
def compile_template(text: str) -> Template:
    """Return a Jinja template that can read nothing but the values of a row.

    Raises:
        jinja2.TemplateSyntaxError: where the text is none.
    """
    environment = SandboxedEnvironment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        optimized=False,  # else it computes what is constant, such as 9**9**9, without an end
    )
    return environment.from_string(text)


def variables(text: str) -> set[str]:
    """Return the names of the values that a Jinja template reads."""
    return meta.find_undeclared_variables(SandboxedEnvironment().parse(text))


def _format_misfits(config: DataConfig) -> Iterator[Problem]:
    names = {f"data.formats.{pattern}": name for pattern, name in config.formats.items()}
    for key, name in {"data.format": config.format, **names}.items():
        if name not in (AUTO, *FORMATS):
            yield Problem("config.not_an_option", key, options=[AUTO, *FORMATS], value=name)
    template = dict(config.template)
    known = ["system", "prompt", "completion", "text"]
    yield from _syntax("data.label_prompt", config.label_prompt)
    for part, text in template.items():
        key = f"data.template.{part}"
        if part not in known:
            yield Problem("config.unknown_key", key, candidates=nearest(part, known))
        elif text is not None:
            yield from _syntax(key, text)
    filled = {part for part, text in template.items() if text is not None}
    used = "template" in (config.format, *config.formats.values())
    if used and not ({"prompt", "completion"} <= filled or "text" in filled):
        yield Problem("config.empty_template", "data.template")


def _syntax(key: str, text: Any) -> Iterator[Problem]:
    try:
        compile_template(str(text))
    except TemplateError as error:
        yield Problem("config.no_template", key, error=error.message)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:  # of Python's compiler
        yield Problem("config.no_template", key, error=type(error).__name__)
