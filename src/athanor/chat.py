"""From rows to tokens: which tokens a model reads, and which of them it has to learn to say.

A token is supervised when it belongs to an assistant's turn: from the end of the prompt that asks
for the turn up to and including the token that ends it. What the template writes after that token
(a line break, mostly) is read, never learned.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Tokens:
    """One row: `ids[i]` is a token, `supervised[i]` whether the loss asks for it. Equal lengths."""

    ids: list[int]
    supervised: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> "Tokens":
        """At most the first `length` tokens."""
        return Tokens(self.ids[:length], self.supervised[:length])


def prompt_ids(row: dict[str, Any], tokenizer: "TokenizerWrapper") -> list[int]:
    """The tokens that ask for a row's last answer."""
    return _template(row["messages"][:-1], row, tokenizer, add_generation_prompt=True)


def tokenize(row: dict[str, Any], tokenizer: "TokenizerWrapper", mask_prompt: bool) -> Tokens:
    """The tokens of a row in the one form of rows.py.

    With `mask_prompt` every assistant's turn is supervised and nothing else; without it, and for
    plain text, every token is.
    """
    if "text" in row:
        ids = list(tokenizer.encode(row["text"]))
        if not ids or ids[-1] not in tokenizer.eos_token_ids:
            ids.append(tokenizer.eos_token_id)
        return Tokens(ids, [True] * len(ids))
    messages = row["messages"]
    ids = _template(messages, row, tokenizer)
    if not mask_prompt:
        return Tokens(ids, [True] * len(ids))
    supervised = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _template(messages[:turn], row, tokenizer, add_generation_prompt=True)
        answered = _template(messages[: turn + 1], row, tokenizer)
        start, stop = _common(asked, ids), _common(answered, ids)
        ends = [i for i in range(start, stop) if ids[i] in tokenizer.eos_token_ids]
        stop = ends[-1] + 1 if ends else stop
        supervised[start:stop] = [True] * (stop - start)
    return Tokens(ids, supervised)


def tokenize_all(
    rows: list[dict[str, Any]],
    tokenizer: "TokenizerWrapper",
    mask_prompt: bool,
    max_seq_length: int,
) -> list[Tokens]:
    """Rows as tokens, cut to a length; rows with no supervised token left are left out.

    The first token of a row is never predicted, so it does not count.
    """
    cut = (tokenize(row, tokenizer, mask_prompt).cut(max_seq_length) for row in rows)
    return [row for row in cut if any(row.supervised[1:])]


def asks_as_trained(row: dict[str, Any], tokenizer: "TokenizerWrapper") -> bool:
    """Whether what the model is asked with is a prefix of what it is trained on."""
    if "text" in row:
        return True
    asked = prompt_ids(row, tokenizer)
    return _common(asked, _template(row["messages"], row, tokenizer)) == len(asked)


def answer_text(ids: list[int], tokenizer: "TokenizerWrapper") -> str:
    """The text of generated tokens, special tokens included, so that a stray one is seen."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _template(
    messages: list[dict[str, Any]],
    row: dict[str, Any],
    tokenizer: "TokenizerWrapper",
    add_generation_prompt: bool = False,
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), add_generation_prompt=add_generation_prompt
    )
    return list(ids)


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
