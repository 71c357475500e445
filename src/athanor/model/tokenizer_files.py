"""Files of a tokenizer: their form, and the ids of their tokens against the embedding's rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec

from athanor.errors import UserError
from athanor.model.json_files import read_object, read_struct, refuse_value

# Keys of tokenizer_config.json whose tokens are written into every text or end it.
WRITTEN = ("bos_token", "eos_token")

# Instead of an id that an entry does not have.
MISSING = -1
Id = Annotated[int, msgspec.Meta(ge=0)]


class AddedToken(msgspec.Struct):
    """A token beside the vocabulary, in tokenizer.json and tokenizer_config.json."""

    content: str
    special: bool = False
    id: Id = MISSING


class Vocabulary(msgspec.Struct):
    """The section `model` of tokenizer.json: ids by their texts, or a list of texts and scores."""

    vocab: dict[str, Id] | list[tuple[str, float]] = {}


class Tokenizer(msgspec.Struct):
    """The parts of tokenizer.json that have ids."""

    model: Vocabulary
    added_tokens: list[AddedToken] = []


def check_tokenizer(
    files: dict[str, Path], rows: int | None, ends: list[int], folder: Path
) -> dict[str, int]:
    """Check the tokenizer's files, and their ids against the `rows` of the embedding.

    Some published models have special tokens without a row, such as a placeholder of images, which
    no text needs; return their ids by their texts, and refuse any other.

    Args:
        files: the folder's files by name.
        rows: None where they are unknown.
        ends: the ids that end an answer.
        folder: the model's, for the message.

    Raises:
        UserError: for a broken file, or for tokens that the embedding has no rows for.
    """
    settings = _read(files, "tokenizer_config.json")
    written = {_token_text(files, settings, key) for key in WRITTEN}
    _read(files, "special_tokens_map.json")
    path = files.get("tokenizer.json")
    tokenizer = read_struct(path, Tokenizer) if path else None
    vocabularies = list(_read_vocabularies(files, tokenizer))
    added = list(_read_added(files, tokenizer, settings))
    if rows is None:
        return {}
    special = {token.content: token.id for token in added if token.special and token.id >= rows}
    plain = {token.content: token.id for token in added if not token.special and token.id >= rows}
    for vocabulary in vocabularies:
        if max(vocabulary.values(), default=0) >= rows:
            plain |= {text: id for text, id in vocabulary.items() if id >= rows}
    template = _template(files, settings) if special else ""
    for text, id in special.items():
        if id in ends or text in written or text in template:
            plain[text] = id
    if plain:
        token = min(plain, key=plain.__getitem__)
        raise UserError(
            "model.tokens_beyond_rows",
            folder=folder,
            rows=rows,
            count=len(plain),
            token=token[:60],
            id=plain[token],
            largest=max(plain.values()),
        )
    return special


def refuse_missing_tokenizer(folder: Path) -> None:
    """Raise UserError where a folder has no tokenizer: transformers would make an empty one."""
    names = {path.name for path in folder.iterdir()}
    if names & {"tokenizer.json", "vocab.txt"} or {"vocab.json", "merges.txt"} <= names:
        return
    if not any(name.endswith((".model", ".tiktoken")) for name in names):
        raise UserError("model.no_tokenizer", folder=folder, files=sorted(names)[:12])


def _token_text(files: dict[str, Path], settings: dict[str, Any], key: str) -> str | None:
    """Return the text of a token that tokenizer_config.json names, as a text or an object."""
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) and token is not None:
        refuse_value(files["tokenizer_config.json"], key, token, "a token's text")
    return text


def _read(files: dict[str, Path], name: str) -> dict[str, Any]:
    return read_object(files[name]) if name in files else {}


def _read_vocabularies(
    files: dict[str, Path], tokenizer: Tokenizer | None
) -> Iterator[dict[str, int]]:
    """Yield ids by their texts, from each file that has plain tokens."""
    if tokenizer is not None:
        vocabulary = tokenizer.model.vocab
        if isinstance(vocabulary, dict):
            yield vocabulary
        else:
            yield {text: id for id, (text, _) in enumerate(vocabulary)}
    elif path := files.get("vocab.json"):
        yield read_struct(path, dict[str, Id])
    if path := files.get("added_tokens.json"):
        yield read_struct(path, dict[str, Id])


def _read_added(
    files: dict[str, Path], tokenizer: Tokenizer | None, settings: dict[str, Any]
) -> Iterator[AddedToken]:
    """Yield tokens that stand beside the vocabulary, each with an id."""
    if tokenizer is not None:
        for token in tokenizer.added_tokens:
            if token.id == MISSING:
                name = f"the id of {token.content[:60]!r} in added_tokens"
                refuse_value(files["tokenizer.json"], name, None, "a whole number")
            yield token
    if path := files.get("tokenizer_config.json"):
        try:
            decoder = msgspec.convert(
                settings.get("added_tokens_decoder") or {}, dict[str, AddedToken]
            )
            for id, token in decoder.items():
                yield AddedToken(token.content, token.special, int(id))
        except (msgspec.ValidationError, ValueError) as error:
            raise UserError("model.other_form", path=path, error=error) from error


def _template(files: dict[str, Path], settings: dict[str, Any]) -> str:
    """Return the text of the chat template, or of all of them."""
    path = files.get("chat_template.jinja")
    of_file = path.read_text(encoding="utf-8", errors="replace") if path else ""
    return of_file + str(settings.get("chat_template", ""))
