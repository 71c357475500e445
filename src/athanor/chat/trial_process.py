"""The process that a chat template is tried in, as a script: it imports jinja2 and nothing of ours.

Reads a JSON object from standard input: `templates`, texts by name; `variables`, which every
conversation is rendered with; `calls`, the variables of each conversation; `marks`, of which the
first text has to have one; `longest`, the characters of the longest text; `memory`, in bytes;
`cpu`, in seconds. Prints a JSON string with the fault of the templates, or null.

The environment is that of transformers, whose own import takes seconds: a sandbox without files,
the tag `generation`, and a few functions.
"""

import json
import os
import resource
import sys
import threading
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The exit status of a process that took more memory than it may.
OUT_OF_MEMORY = 97


class Generation(jinja2.ext.Extension):
    """The tag around what a model generates, which writes what is inside it."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def build_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def find_fault(task: dict[str, Any]) -> str | None:
    """Return what is wrong with one of the templates; None where nothing is.

    A template may refuse conversations, but not the first one of the calls.
    """
    environment = build_environment()
    for name, text in task["templates"].items():
        of_name = "" if len(task["templates"]) == 1 else f"the template {name}: "
        try:
            template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            return f"{of_name}line {error.lineno}: {error.message}"
        except Exception as error:  # such as a RecursionError
            return f"{of_name}it cannot be compiled: {_name(error)}"
        written = []
        for number, call in enumerate(task["calls"]):
            try:
                written.append(template.render(task["variables"] | call))
                if len(written[-1]) > task["longest"]:
                    return f"{of_name}it writes {len(written[-1]):,} characters of a short text"
                written[-1].encode()
            except UnicodeEncodeError:
                return f"{of_name}it writes a lone surrogate, which is half a character"
            except MemoryError:
                raise
            except Exception as error:  # a template may raise any
                if number == 0:
                    return f"{of_name}{_describe(error)}"
        folded = written[0].casefold()  # as of a template that writes capitals
        if not any(mark.casefold() in folded for mark in task["marks"]):
            return f"{of_name}it writes neither the question nor the answer of a conversation"
    return None


def _describe(error: Exception) -> str:
    is_own = isinstance(error, jinja2.TemplateError)
    reason = " ".join(str(error).split()) if is_own else _name(error)
    return f"it refuses a question with its answer: {reason:.200}"


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _limit(memory: int, cpu: int) -> None:
    """Let this process end where it takes more than `memory` bytes or `cpu` seconds."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    else:  # macOS does not hold a process to that
        threading.Thread(target=_watch_memory, args=(memory,), daemon=True).start()


def _watch_memory(memory: int) -> None:
    unit = 1024 if sys.platform == "linux" else 1
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < memory:
        time.sleep(0.02)
    os._exit(OUT_OF_MEMORY)


def main() -> None:
    task = json.load(sys.stdin)
    _limit(task["memory"], task["cpu"])
    try:
        print(json.dumps(find_fault(task)))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
