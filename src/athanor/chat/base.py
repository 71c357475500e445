"""Base models with their tokenizers."""

from pathlib import Path
from typing import TYPE_CHECKING

from athanor.chat.load import load_tokenizer
from athanor.chat.rendering import Rendering
from athanor.model.load import load_model

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load_with_tokenizer(
    folder: Path, rendering: Rendering | None = None
) -> "tuple[nn.Module, TokenizerWrapper]":
    """Load a model and its tokenizer, ready to compute on this machine."""
    return load_model(folder), load_tokenizer(folder, rendering)
