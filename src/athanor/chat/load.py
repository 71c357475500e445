"""Tokenizers with the stop tokens of their model and template, and models beside them."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from athanor.chat.rendering import Rendering, choose_date, install_renderer
from athanor.chat.template_probes import find_turn_end
from athanor.chat.template_trial import refuse_faulty_template
from athanor.config.rules import MERGE
from athanor.errors import UserError
from athanor.model.folder import inspect_folder
from athanor.model.load import load_model, one_line
from athanor.model.tokenizer_files import refuse_missing_tokenizer

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load_with_tokenizer(
    folder: Path, rendering: Rendering | None = None
) -> "tuple[nn.Module, TokenizerWrapper]":
    """Load a model and its tokenizer, ready to compute on this machine."""
    return load_model(folder), load_tokenizer(folder, rendering)


def load_tokenizer(folder: Path, rendering: Rendering | None = None) -> "TokenizerWrapper":
    """Load a model's tokenizer, whose end tokens are those of the model and the chat template.

    Its template renders as `prepare` recorded. Without a record, it is tried first.

    Raises:
        UserError: where its files or its template are broken.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_with_ends

    rows = inspect_folder(folder).rows
    refuse_missing_tokenizer(folder)
    try:
        tokenizer = load_with_ends(folder, eos_token_ids=load_config(folder).get("eos_token_id"))
        _refuse_added_beyond(rows, folder, tokenizer)
        if rendering is None:
            refuse_faulty_template(folder, tokenizer)
        install_renderer(tokenizer, rendering or Rendering())
        end = find_turn_end(tokenizer)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # tokenizers, even their panics, and templates may raise any
        raise UserError(
            "chat.tokenizer_not_loaded", folder=folder, error=one_line(error)
        ) from error
    if end is not None:
        tokenizer.eos_token_ids = tokenizer.eos_token_ids | {end}
    return tokenizer


def _refuse_added_beyond(rows: int | None, folder: Path, tokenizer: "TokenizerWrapper") -> None:
    """Raise UserError where each text gets a token that the embedding has no row for.

    From then on it neither cuts nor pads texts, as its tokenizer.json may say from a training.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    beyond = [id for id in tokenizer.encode("a") if rows is not None and id >= rows]
    if beyond:
        raise UserError(
            "model.tokens_beyond_rows",
            folder=folder,
            rows=rows,
            count=len(beyond),
            token=str(tokenizer.convert_ids_to_tokens(beyond[0])),
            id=beyond[0],
            largest=max(beyond),
        )


def load_configured_tokenizer(folder: Path, date: str | None, system: str) -> "TokenizerWrapper":
    """Load a model's tokenizer, which renders as `date` (data.date) and `system` (data.system) say.

    Raises:
        UserError: as load_tokenizer does.
    """
    tokenizer = load_tokenizer(folder)
    rendering = Rendering(merge_system=system == MERGE)
    install_renderer(tokenizer, rendering)
    install_renderer(tokenizer, replace(rendering, date=choose_date(tokenizer, date)))
    return tokenizer
