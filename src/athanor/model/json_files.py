"""JSON of a model's folder, read with limits of size and depth: others wrote these files."""

import json
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import msgspec

from athanor.errors import UserError

MB = 10**6
# In bytes: configurations have some KB, with settings of quantization some MB; vocabularies 35 MB.
LARGEST, LARGEST_TOKENIZER = 32 * MB, 256 * MB
# Objects and lists within each other. Settings of models have 6 at most, tokenizers 8.
DEEPEST = 64

Form = TypeVar("Form")

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def refuse_irregular(path: Path) -> None:
    """Raise unless a path is a regular file that can be read, or a link to one; never open it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            target = path.readlink()
            raise UserError("model.dangling_link", path=path, target=target) from error
        raise UserError("model.no_file", path=path) from error
    except OSError as error:
        raise UserError("model.unreadable", path=path, error=error.strerror) from error
    if not stat.S_ISREG(mode):
        raise UserError(
            "model.irregular_file", path=path, kind=KINDS.get(stat.S_IFMT(mode), "special")
        )


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file to read its bytes; raise UserError where that is not permitted."""
    refuse_irregular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError("model.unreadable", path=path, error=error.strerror) from error


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: where it is no regular file, can't be read, is too large, or is no model's file.
    """
    refuse_irregular(path)
    size = path.stat().st_size
    if size > limit:
        raise UserError("model.too_large", path=path, size=size / MB, limit=limit / MB)
    with open_file(path) as file:
        content = file.read()
    explain_kind(path, content[:512])
    return content


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        UserError: as read_bytes does, and where it holds no such text.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError("model.not_utf8", path=path, byte=error.start) from error


def read_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: as read_text does, and where it is no JSON, no object, nested too deep, or has a
            key twice and they must be `unique`.
    """
    text = read_text(path)
    try:
        value = parse_unique(text) if unique else json.loads(text)
    except RecursionError as error:
        raise UserError("model.too_deep", path=path, limit=DEEPEST) from error
    except ValueError as error:
        raise UserError("model.not_json", path=path, error=error) from error
    if not isinstance(value, dict):
        raise UserError("model.no_object", path=path, value=describe(value))
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return value
    raise UserError("model.too_deep", path=path, limit=DEEPEST)


def read_struct(path: Path, form: type[Form]) -> Form:
    """Return the JSON in a large file, such as a vocabulary, as a msgspec type; skip the rest.

    Raises:
        UserError: as read_bytes does, and where it is no JSON of this form.
    """
    try:
        return msgspec.json.decode(read_bytes(path, LARGEST_TOKENIZER), type=form)
    except RecursionError as error:
        raise UserError("model.too_deep", path=path, limit=DEEPEST) from error
    except msgspec.ValidationError as error:
        raise UserError("model.other_form", path=path, error=error) from error
    except ValueError as error:
        raise UserError("model.not_json", path=path, error=error) from error


def parse_unique(text: str | bytes) -> Any:
    """Return the value of a JSON text; raise ValueError where an object has a key twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name[:200]!r} stands in it twice")
    return values


def explain_kind(path: Path, start: bytes) -> None:
    """Raise where the first bytes of a file show that it is no model's file at all."""
    if not start:
        raise UserError("model.empty_file", path=path)
    if start.startswith(b"version https://git-lfs"):
        raise UserError("model.lfs_pointer", path=path, folder=path.parent)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("model.web_page", path=path)
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError("model.byte_order_mark", path=path)
    if not start.strip(b"\0"):
        raise UserError("model.zeros", path=path)


def refuse_value(path: Path, key: str, value: Any, expected: str) -> NoReturn:
    """Raise the error of a key whose value is not what its readers expect."""
    raise UserError(
        "model.wrong_value", path=path, key=key, value=describe(value), expected=expected
    )


def describe(value: Any) -> str:
    """Return a value of JSON in a few words, however long it is."""
    if isinstance(value, dict) and len(value) > 3:
        return f"an object of {len(value)} keys"
    if isinstance(value, list) and len(value) > 4:
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a whole number of {value.bit_length()} bits"
