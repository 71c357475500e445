"""Headers of safetensors, parsed and held against the length of their file."""

import math
from pathlib import Path
from typing import Any, TypeGuard

from athanor.errors import UserError
from athanor.model.json_files import describe, explain_kind, open_file, parse_unique
from athanor.model.weight_files import LARGEST, StoredWeight

# Bits of a value, by the format's names of dtypes.
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# The format's own limit, in bytes.
LONGEST_HEADER = 100_000_000


def read_header(path: Path) -> dict[str, StoredWeight]:
    """Return the weights of a safetensors file by name; only its header is read.

    Raises:
        UserError: where the header is damaged or does not describe exactly the bytes that follow.
    """
    size = path.stat().st_size
    with open_file(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 0 < length <= min(size - 8, LONGEST_HEADER):
            explain_kind(path, start + file.read(504))
            raise _damaged(path, f"it has {size} bytes, too few for the header that it announces")
        text = file.read(length)
    try:
        header = parse_unique(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is {describe(header)} instead of an object")
    texts = header.pop("__metadata__", None) or {}
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _damaged(path, f"its __metadata__ is {describe(texts)} instead of texts by name")
    spans: list[tuple[int, int, str]] = []
    weights = {}
    for name, entry in header.items():
        try:
            weights[name], begin, end = _read_entry(path, entry)
        except ValueError as error:
            raise _damaged(path, f"of the weight {name[:200]!r} {error}") from error
        spans.append((begin, end, name))
    _refuse_gaps(path, sorted(spans), size - 8 - length)
    return weights


def _read_entry(path: Path, entry: Any) -> tuple[StoredWeight, int, int]:
    """Return a weight with the first and the last byte of its values.

    Raises:
        ValueError: with the fault, as the end of a sentence.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"the header has {describe(entry)} instead of an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"the dtype is {describe(dtype)}, which the format does not have")
    if not _is_sizes(shape) or max(shape, default=0) > LARGEST:
        raise ValueError(f"the shape is {describe(shape)} instead of a list of whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the offsets are {describe(offsets)} instead of a beginning and an end")
    stored, needed = offsets[1] - offsets[0], math.prod(shape) * BITS[dtype]
    if stored * 8 != needed:
        raise ValueError(
            f"{stored} bytes are stored, and {dtype} of the shape {describe(shape)} "
            f"takes {needed // 8}"
        )
    return StoredWeight(path, dtype, tuple(shape)), offsets[0], offsets[1]


def _is_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse_gaps(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Raise unless the weights follow each other and fill the `size` bytes after the header."""
    position = 0
    for begin, end, name in spans:
        if end > size:
            missing = end - size
            raise _damaged(path, f"it ends {missing} bytes before the end of {name[:200]!r}")
        if begin != position:
            what = "overlaps the one before it" if begin < position else "follows a gap"
            raise _damaged(path, f"the weight {name[:200]!r} {what}")
        position = end
    if position != size:
        raise _damaged(path, f"{size - position} bytes follow its last weight")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError("model.weights_damaged", path=path, reason=reason)
