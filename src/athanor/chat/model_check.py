"""Configurations: conf/ composed by Hydra, or params.yaml read again, and all that is wrong there.

Hydra stops at the first mistake. Here a tree is composed without its types first, with overrides
forced in, so that every typo, wrong type and impossible value is found, each with file and line.
"""

from pathlib import Path

from athanor.config.check import ConfigError, training_misfits
from athanor.config.schema import Config
from athanor.model.source import read_config


def refuse_model_misfits(config: Config, folder: Path) -> None:
    """Stops before a training whose model can't be trained so, or not exported as is asked.

    Raises:
        ConfigError: with every problem.
    """
    from athanor.chat.load import load_tokenizer
    from athanor.model.gguf_fields import explain_unsupported

    model = read_config(folder)
    problems = [f"{key}: {text}" for key, text in training_misfits(model, config.train)]
    if config.fuse.gguf is not None and (why := explain_unsupported(model, load_tokenizer(folder))):
        problems.append(f"fuse.gguf: {why}; fuse.gguf=null goes without")
    if problems:
        raise ConfigError(problems)
