"""Overrides of a command line: read by Hydra's grammar, in any script, and sorted.

Hydra's grammar has ASCII letters only outside of quotes. A text that it refuses is read again with
every other character replaced by a word of ASCII, and gets its characters back afterwards; so
`data.prompt_feature=问题` and `data.synonyms.高兴=[快乐, 开心]` mean what they say.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from athanor.config import schema
from athanor.errors import Problem, nearest

COMMAND_LINE = "command line"

# The errors of Hydra's parser: of its grammar, of numbers with thousands of digits, of depth.
REFUSED = (HydraException, ValueError, RecursionError, AttributeError, TypeError)

OTHER_SCRIPT = re.compile(r"[^\x00-\x7f]")
ENCODED = re.compile(r"zZu([0-9a-f]{6})uZz")


@dataclass
class Overrides:
    """The overrides of a command, sorted.

    Attributes:
        values: new values by dotted key, and `texts` their overrides as typed.
        options: selections of options of groups, by group; None deselects it.
        problems: those that are no override, or none that conf/ can follow.
    """

    values: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    options: dict[str, str | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def places(self) -> dict[str, str]:
        """The places of the values, which the command line gives."""
        return {key: f"{COMMAND_LINE}: {text}" for key, text in self.texts.items()}


def parse_override(text: str) -> Override:
    """Return an override; its `input_line` is one that Hydra itself can read, where there is one.

    Raises:
        HydraException: where it is none.
    """
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except REFUSED as error:
        if not OTHER_SCRIPT.search(text):
            raise HydraException(str(error).splitlines()[0]) from error
    try:
        encoded = OTHER_SCRIPT.sub(lambda found: f"zZu{ord(found[0]):06x}uZz", text)
        override = parser.parse_override(encoded)
    except REFUSED as error:
        reason = ENCODED.sub(_character, str(error).splitlines()[0])
        raise HydraException(reason) from error
    override.key_or_group = ENCODED.sub(_character, override.key_or_group)
    override._value = _decode(override._value)
    override.input_line = text
    if override.is_choice_sweep():
        values = ",".join(override.sweep_string_iterator())
        override.input_line = f"{override.get_key_element()}={values}"
    elif override.value_type is not None and not override.is_sweep_override():
        override.input_line = f"{override.get_key_element()}={override.get_value_element_as_str()}"
    return override


def _character(found: re.Match[str]) -> str:
    return chr(int(found[1], 16))


def _decode(value: Any) -> Any:
    """Return a parsed value with its characters; texts that had others than ASCII are quoted."""
    if isinstance(value, QuotedString):
        return QuotedString(ENCODED.sub(_character, value.text), value.quote)
    if isinstance(value, str):
        text = ENCODED.sub(_character, value)
        return QuotedString(text, Quote.single) if text != value else value
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return {ENCODED.sub(_character, f"{k}"): _decode(v) for k, v in value.items()}
    if isinstance(value, ChoiceSweep):
        value.list = _decode(value.list)
    return value


def unreadable_override(text: str, error: HydraException) -> Problem:
    """Return the problem of an override that Hydra cannot parse."""
    if text.startswith("-"):
        return Problem("config.unknown_flag", text, place=COMMAND_LINE)
    reason = str(error).splitlines()[0]
    return Problem("config.no_override", text, place=COMMAND_LINE, error=reason)


def unknown_option(
    text: str, group: str, option: str, options: list[str], place: str = COMMAND_LINE
) -> Problem:
    """Return the problem of a selection of an option that its group does not have."""
    return Problem(
        "config.unknown_option",
        text,
        place=place,
        group=group,
        option=option,
        candidates=nearest(option, options),
    )


def sort_overrides(
    texts: list[str], groups: Mapping[str, list[str]], *, selectable: bool = True
) -> Overrides:
    """Sort overrides; `selectable` tells if options of the groups may be selected here."""
    overrides = Overrides()
    for text in texts:
        try:
            override = parse_override(text)
        except HydraException as error:
            overrides.problems.append(unreadable_override(text, error))
            continue
        problem = _misuse(text, override, groups, selectable)
        key = override.key_or_group
        if problem is not None:
            problem.place = problem.place or COMMAND_LINE
            overrides.problems.append(problem)
        elif key in groups:
            option = None if override.is_delete() else override.value()
            overrides.options[key] = None if option is None else str(option)
        else:
            overrides.values[key] = override.value()
            overrides.texts[key] = text
    return overrides


def _misuse(
    text: str, override: Override, groups: Mapping[str, list[str]], selectable: bool
) -> Problem | None:
    """Return the problem of an override that nothing can be done with, if it is one."""
    key, value = override.key_or_group, override.value()

    if not key:
        return Problem("config.no_override", text, error="a key is missing")
    if override.is_sweep_override():
        return Problem("config.several_values", text, command=shlex.quote(text))
    if override.package is not None:
        return Problem("config.changed_package", text)
    if re.match(r"hydra([./]|$)", key):
        return Problem("config.only_in_a_sweep", text)
    section = key.partition(".")[0]
    required = section in (*schema.SECTIONS, "seed")
    if (override.is_delete() or (value is None and key in groups)) and (
        required or key not in groups
    ):
        return Problem("config.no_deletion", text)
    if key in groups:
        if not selectable:
            return Problem("config.option_of_section", text, text=text)
        if override.is_delete() and override.value_type is not None:
            return Problem("config.not_selected", text, group=key)
        if value is not None and str(value) not in groups[key]:
            return unknown_option(text, key, str(value), groups[key])
        return None
    if key in schema.SECTIONS:
        if isinstance(value, dict):
            return None
        return Problem("config.option_of_section", text, text=text)
    base = ".".join(key.split(".")[:2])
    known = [name for name in schema.all_keys() if name.startswith(f"{section}.")]
    if base in (*known, "seed") and (key == base or schema.holds_names(base)):
        return None
    candidates = nearest(base, known or [*schema.SECTIONS, "seed"])
    return Problem(
        "config.unknown_key", key, place=f"{COMMAND_LINE}: {text}", candidates=candidates
    )
