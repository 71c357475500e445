"""The trial of a chat template in a process with limits, before it writes anything in this one.

A template is a program of the model's author. The sandbox keeps it from files and from code, but
not from running for ever, or from a text that fills the memory; such a process can be ended.
"""

import json
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor.chat import trial_process
from athanor.chat.template_probes import ANSWER, QUESTION, probe_conversations
from athanor.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The longest templates of published models have 60,000 characters.
LONGEST_TEMPLATE = 1_000_000
# Of the trial: characters that it may write of a conversation, bytes of memory, seconds of a
# processor, and seconds that pass. A usual template takes 50 MB and 0.2 s.
LONGEST_TEXT, MEMORY, CPU, WALL = 1_000_000, 512 * 1024**2, 3, 60


def refuse_faulty_template(folder: Path, tokenizer: "TokenizerWrapper") -> None:
    """Try the chat template of a tokenizer, once for each template in this process.

    Raises:
        UserError: where it does not compile, does not end, writes too much, or refuses a question
            with its answer.
    """
    template = tokenizer.chat_template
    if template is None:
        return
    templates = template if isinstance(template, dict) else {"default": template}
    own = folder / "chat_template.jinja"
    fault = _find_fault_once(json.dumps([templates, tokenizer.special_tokens_map], default=str))
    if fault is not None:
        path = own if own.is_file() else folder / "tokenizer_config.json"
        raise UserError("chat.template_faulty", path=path, fault=fault)


@lru_cache(maxsize=8)
def _find_fault_once(described: str) -> str | None:
    return find_fault(*json.loads(described))


def find_fault(templates: dict[str, Any], variables: dict[str, Any]) -> str | None:
    """Return the fault of templates by name, rendered with a tokenizer's special tokens."""
    if not all(isinstance(text, str) for text in templates.values()):
        return "it is not a text"
    length = sum(map(len, templates.values()))
    if length > LONGEST_TEMPLATE:
        return f"it has {length:,} characters; at most {LONGEST_TEMPLATE:,} are read"
    script = Path(trial_process.__file__)
    try:
        done = subprocess.run(
            [sys.executable, "-P", script],
            input=json.dumps(describe_trial(templates, variables)),
            capture_output=True,
            text=True,
            timeout=WALL,
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {WALL} seconds"
    return _read_verdict(done)


def describe_trial(templates: dict[str, str], variables: dict[str, Any]) -> dict[str, Any]:
    """Return the input of the process that tries templates."""
    return {
        "templates": templates,
        "variables": variables,
        "calls": probe_conversations(),
        "marks": [QUESTION, ANSWER],
        "longest": LONGEST_TEXT,
        "memory": MEMORY,
        "cpu": CPU,
    }


def _read_verdict(done: "subprocess.CompletedProcess[str]") -> str | None:
    """Return the fault that a trial's process printed, or that its end shows."""
    if done.returncode == 0:
        verdict: Any = json.loads(done.stdout)
        return None if verdict is None else str(verdict)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it does not end within {CPU} seconds of computing"
    if done.returncode == trial_process.OUT_OF_MEMORY:
        return f"it takes more than {MEMORY // 1024**2} MB of memory for a short text"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the process that tried it ended with {done.returncode}: {last:.200}"
