"""Files of a tokenizer: their form, and the ids of their tokens against the embedding's rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.errors import UserError
from athanor.model.json_files import LARGEST_TOKENIZER, read_object, refuse_value

# Keys of tokenizer_config.json whose tokens are written into every text or end it.
WRITTEN = ("bos_token", "eos_token")


@dataclass(frozen=True)
class TokenId:
    """A token's text and id, and whether only the tokenizer's special tokens have it."""

    text: str
    id: int
    special: bool


def check_tokenizer(
    files: dict[str, Path], rows: int | None, ends: list[int], embedding: Path
) -> dict[str, int]:
    """Check the tokenizer's files, and their ids against the `rows` of the embedding.

    Some published models have special tokens without a row, such as a placeholder of images, which
    no text needs; return their ids by their texts, and refuse any other.

    Args:
        files: the folder's files by name.
        rows: None where they are unknown.
        ends: the ids that end an answer.
        embedding: the folder or the file that has the rows, for the message.

    Raises:
        UserError: for a broken file, or for tokens that the embedding has no rows for.
    """
    settings = _read(files, "tokenizer_config.json")
    _read(files, "special_tokens_map.json")
    tokens = list(_iterate_tokens(files, settings))
    if rows is None:
        return {}
    beyond = {token.id: token for token in tokens if token.id >= rows}
    if not beyond:
        return {}
    named = [settings.get(key) for key in WRITTEN]
    written = {text["content"] if isinstance(text, dict) else text for text in named if text}
    template = _template(files, settings)
    needed = [
        token
        for token in beyond.values()
        if not token.special or token.id in ends or token.text in written or token.text in template
    ]
    if needed:
        raise UserError(
            "model.tokens_beyond_rows",
            folder=embedding,
            rows=rows,
            count=len(beyond),
            token=needed[0].text[:60],
            id=needed[0].id,
            largest=max(beyond),
        )
    return {token.text: token.id for token in beyond.values()}


def refuse_missing_tokenizer(folder: Path) -> None:
    """Raise UserError where a folder has no tokenizer: transformers would make an empty one."""
    names = {path.name for path in folder.iterdir()}
    if names & {"tokenizer.json", "vocab.txt"} or {"vocab.json", "merges.txt"} <= names:
        return
    if not any(name.endswith((".model", ".tiktoken")) for name in names):
        raise UserError("model.no_tokenizer", folder=folder, files=sorted(names)[:12])


def _read(files: dict[str, Path], name: str) -> dict[str, Any]:
    limit = LARGEST_TOKENIZER if name in ("tokenizer.json", "vocab.json") else None
    if name not in files:
        return {}
    return read_object(files[name], limit) if limit else read_object(files[name])


def _iterate_tokens(files: dict[str, Path], settings: dict[str, Any]) -> Iterator[TokenId]:
    """Yield the tokens of all files, some of them more than once."""
    if path := files.get("tokenizer.json"):
        tokenizer = _read(files, "tokenizer.json")
        model = tokenizer.get("model")
        if not isinstance(model, dict):
            refuse_value(path, "model", model, "an object")
        yield from _iterate_vocabulary(path, "model.vocab", model.get("vocab"))
        added = tokenizer.get("added_tokens") or []
        if not isinstance(added, list):
            refuse_value(path, "added_tokens", added, "a list")
        for entry in added:
            if not isinstance(entry, dict):
                refuse_value(path, "added_tokens", entry, "a list of objects")
            yield _added(path, "added_tokens", entry.get("id"), entry)
    elif path := files.get("vocab.json"):
        yield from _iterate_vocabulary(path, "", _read(files, "vocab.json"))
    if path := files.get("added_tokens.json"):
        yield from _iterate_vocabulary(path, "", _read(files, "added_tokens.json"))
    if path := files.get("tokenizer_config.json"):
        decoder = settings.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            refuse_value(path, "added_tokens_decoder", decoder, "an object")
        for number, entry in decoder.items():
            id = int(number) if number.isascii() and number.isdigit() else number
            if not isinstance(entry, dict):
                refuse_value(path, f"added_tokens_decoder.{number}", entry, "an object")
            yield _added(path, "added_tokens_decoder", id, entry)


def _iterate_vocabulary(path: Path, key: str, vocabulary: Any) -> Iterator[TokenId]:
    if isinstance(vocabulary, list):  # of pairs of a text and its score
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in vocabulary):
            refuse_value(path, key, vocabulary, "a list of pairs")
        vocabulary = {str(text): id for id, (text, _) in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        refuse_value(path, key, vocabulary, "tokens with their ids")
    for text, id in vocabulary.items():
        if type(id) is not int or id < 0:
            refuse_value(path, f"{key}.{text}"[:80].lstrip("."), id, "a token's id")
        yield TokenId(text, id, False)


def _added(path: Path, key: str, id: Any, entry: dict[str, Any]) -> TokenId:
    text = entry.get("content")
    if type(id) is not int or id < 0:
        refuse_value(path, key, id, "a token's id")
    if not isinstance(text, str):
        refuse_value(path, key, text, "a token's text as content")
    return TokenId(text, id, entry.get("special") is True)


def _template(files: dict[str, Path], settings: dict[str, Any]) -> str:
    """Return the text of the chat template, or of all of them."""
    path = files.get("chat_template.jinja")
    of_file = path.read_text(encoding="utf-8", errors="replace") if path else ""
    return of_file + str(settings.get("chat_template", ""))
