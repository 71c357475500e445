"""The check of a configuration against the files of its model."""

from pathlib import Path

from athanor.config.check import ConfigError, training_misfits
from athanor.config.schema import Config
from athanor.errors import problem
from athanor.model.source import read_config


def refuse_model_misfits(config: Config, folder: Path) -> None:
    """Raise where the model cannot be trained, or not exported, with this configuration.

    Raises:
        ConfigError: with all problems.
    """
    from athanor.chat.load import load_tokenizer
    from athanor.model.gguf_fields import explain_unsupported

    model = read_config(folder)
    problems = list(training_misfits(model, config.train))
    if config.fuse.gguf is not None and (
        reason := explain_unsupported(model, load_tokenizer(folder))
    ):
        problems.append(problem("chat.no_gguf", "fuse.gguf", reason=reason))
    if problems:
        raise ConfigError(problems)
