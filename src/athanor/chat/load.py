"""Tokenizers with the stop tokens of their model and template."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from athanor.chat.rendering import Rendering, choose_date, install_renderer
from athanor.chat.template_probes import find_turn_end
from athanor.chat.template_trial import refuse_faulty_template
from athanor.config.rules import MERGE
from athanor.errors import UserError, one_line
from athanor.model.folder import inspect_folder
from athanor.model.tokenizer_files import refuse_missing_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


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
        if tokenizer.is_fast:  # a tokenizer.json may cut and pad as it did in a training
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
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
    """Raise UserError where each text gets a token that the embedding has no row for."""
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
