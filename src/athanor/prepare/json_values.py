"""Values of JSON, without what only Python takes for JSON."""

import json
import math
from typing import Any

from athanor.prepare.checks import Fault

# No row is meant to be deeper.
DEEPEST = 100


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        text = f"duplicate key {twice!r}; JSON parsers keep only its last value"
        raise Fault("duplicate_key", text)
    return value


def _constant(text: str) -> None:
    raise Fault("not_a_number", f"{text} is not a JSON number; write null, or remove the key")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Fault("not_a_number", f"{text} is too large for a 64-bit float")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        inside
        for item in level
        if isinstance(item, dict | list)
        for inside in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
    return depth


def parse(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that starts at `start`, and the position behind it.

    Raises:
        json.JSONDecodeError: where there is none.
        Fault: for values that only Python takes for JSON.
    """
    too_deep = Fault("invalid_json", f"nested more than {DEEPEST} levels deep")
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        raise too_deep from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise Fault("invalid_json", str(error)) from None
    # Python's own limit depends on the depth of the caller: later steps could fail where this
    # did not.
    opened = text.count("[", start, end) + text.count("{", start, end)
    if opened > DEEPEST and _depth(value) > DEEPEST:
        raise too_deep
    return value, end
