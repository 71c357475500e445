"""The check of a configuration against the files of its model."""

from pathlib import Path

from athanor.chat.rendering import Rendering
from athanor.config.rules import ConfigError, training_misfits
from athanor.config.schema import Config
from athanor.errors import Problem, UserError
from athanor.model.folder import read_config


def refuse_model_misfits(config: Config, folder: Path, rendering: Rendering | None = None) -> None:
    """Raise where the model cannot be trained, or not exported, with this configuration.

    Raises:
        ConfigError: with all problems.
    """
    from athanor.chat.load import load_tokenizer
    from athanor.model.gguf_architecture import architecture_fields
    from athanor.model.gguf_tokenizer import tokenizer_fields

    model = read_config(folder)
    problems = list(training_misfits(model, config.train))
    if config.fuse.gguf is not None:
        tokenizer = load_tokenizer(folder, rendering)
        try:
            architecture_fields(model)
            tokenizer_fields(tokenizer, model, sorted(tokenizer.eos_token_ids))
        except UserError as error:
            problems.append(Problem("chat.no_gguf", "fuse.gguf", reason=error))
    if problems:
        raise ConfigError(problems)
