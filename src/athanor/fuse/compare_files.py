"""A fused folder's tokenizer, chat template, stop tokens and config.json against the base's."""

from collections.abc import Iterator
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor import files
from athanor.chat import templates
from athanor.chat.conversation import Conversation
from athanor.chat.load import load_tokenizer
from athanor.chat.rendering import rendering_of
from athanor.chat.template_probes import common_length
from athanor.errors import UserError
from athanor.model.folder import read_config, stated_stop_ids

# At most so many tokens of a plain text are a question.
TEXT = 64


def find_file_differences(
    base: Path, folder: Path, rows: list[Conversation], tokenizer: TokenizerWrapper
) -> Iterator[UserError]:
    """Yield an error for each difference of a fused folder, read by `tokenizer`, from its base."""
    own = load_tokenizer(base, rendering_of(tokenizer))
    questions = zip(tokenize_questions(rows, own), tokenize_questions(rows, tokenizer), strict=True)
    for row, (expected, ids) in zip(rows, questions, strict=True):
        if ids != expected:
            same = own.chat_template == tokenizer.chat_template
            at = common_length(expected, ids)
            yield UserError(
                "fuse.questions_read_differently",
                part="tokenizer" if same else "chat template",
                question=describe_question(row),
                position=at,
                text=templates.decode_answer(ids[at : at + 8], own),
                expected=templates.decode_answer(expected[at : at + 8], own),
            )
    ends = {
        name: set(stated_stop_ids(files.read_json(folder / name)))
        for name in ("config.json", "generation_config.json")
    }
    for name, stops in (ends | {"the tokenizer": tokenizer.eos_token_ids}).items():
        if stops != own.eos_token_ids:
            yield UserError("fuse.stops_differ", part=name, stops=stops, expected=own.eos_token_ids)
    before, after = read_config(base), read_config(folder)
    keys = {key for key in before | after if before.get(key) != after.get(key)}
    keys -= {"eos_token_id", "quantization", "quantization_config"}  # those that fusing changes
    if keys:
        yield UserError("fuse.config_differs", keys=sorted(keys))


def tokenize_questions(
    rows: list[Conversation], tokenizer: TokenizerWrapper
) -> Iterator[list[int]]:
    """Yield each question's tokens, TEXT of plain text; none where the template refuses."""
    for row in rows:
        try:
            if row.text is not None:
                yield list(tokenizer.encode(row.text))[:TEXT]
            else:
                yield templates.encode_prompt(row, tokenizer)
        except Exception:  # a chat template may raise any
            yield []


def describe_question(row: Conversation) -> str:
    """Return a question in words, for people."""
    if row.text is not None:
        return row.text[:40]
    asked = [turn.content for turn in row.turns if turn.role == "user"]
    return asked[-1][:40] if asked else ""
