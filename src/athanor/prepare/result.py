"""What `prepare` left, as trainings and tests read it: a base model, a contract, rows as tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import files
from athanor.chat.contract import Contract
from athanor.chat.load import load_with_tokenizer
from athanor.chat.model_check import refuse_model_misfits
from athanor.chat.tokens import tokenize_rows
from athanor.compute.arrays import TokenizedText
from athanor.config.schema import Config
from athanor.errors import UserError
from athanor.model.source import Source
from athanor.paths import Workspace

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Row = dict[str, Any]

# What its keys begin with on which `prepare` depends: its params in dvc.yaml.
DECIDED_BY = ("model.", "data.", "train.max_seq_length", "train.mask_prompt", "train.end_token")


@dataclass(frozen=True)
class Prepared:
    """The base model that was found, and what ends its answers."""

    source: Source
    contract: Contract
    folder: Path
    workspace: Workspace

    @classmethod
    def read(cls, cfg: Config, workspace: Workspace) -> "Prepared":
        """Reads what `prepare` recorded, and finds the model's folder.

        Raises:
            UserError: where it was run for another model, or this one can't be trained as is asked.
        """
        source = Source.read(workspace.prepared / "model.json")
        if (source.path, source.revision) != (cfg.model.path, cfg.model.revision):
            raise UserError(
                f"prepare was run for {source.path} at {source.revision}, and now the model is "
                f"{cfg.model.path} at {cfg.model.revision}: `uv run dvc repro prepare`"
            )
        folder = source.folder()
        refuse_model_misfits(cfg, folder)
        return cls(source, Contract.read(workspace.prepared / "chat.json"), folder, workspace)

    def load(self) -> "tuple[nn.Module, TokenizerWrapper]":
        """Loads the base model."""
        return load_with_tokenizer(self.folder)

    def tokens(
        self, rows: list[Row], tokenizer: "TokenizerWrapper", cfg: Config
    ) -> list[TokenizedText]:
        """The rows as tokens, those without one to learn left out."""
        train = cfg.train
        return tokenize_rows(
            rows, tokenizer, train.mask_prompt, train.max_seq_length, self.contract.end
        )


def read_rows(workspace: Workspace, splits: Iterable[str]) -> dict[str, list[Row]]:
    """The prepared rows of some splits."""
    return {split: files.read_jsonl(workspace.rows(split)) for split in splits}
