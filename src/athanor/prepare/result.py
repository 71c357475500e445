"""The output of `prepare` for later stages: the base model, its contract, and rows as tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from athanor import files
from athanor.chat.base import load_with_tokenizer
from athanor.chat.contract import Contract
from athanor.chat.conversation import Conversation, read_line
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

# Prefixes of the keys that `prepare` depends on: its params in dvc.yaml.
DECIDED_BY = ("model.", "data.", "train.max_seq_length", "train.mask_prompt", "train.end_token")


@dataclass(frozen=True)
class Prepared:
    """The base model, its folder, and the contract that ends its answers."""

    source: Source
    contract: Contract
    folder: Path
    workspace: Workspace

    @classmethod
    def read(cls, cfg: Config, workspace: Workspace) -> "Prepared":
        """Read the record of `prepare`, and find the model's folder.

        Raises:
            UserError: where it is of another model, or this one can't be trained with this config.
        """
        source = Source.read(workspace.prepared / "model.json")
        if (source.path, source.revision) != (cfg.model.path, cfg.model.revision):
            raise UserError(
                "prepare.other_model",
                prepared=source.path,
                prepared_revision=source.revision,
                model=cfg.model.path,
                revision=cfg.model.revision,
            )
        folder = source.folder()
        contract = Contract.read(workspace.prepared / "chat.json")
        refuse_model_misfits(cfg, folder, contract.rendering)
        return cls(source, contract, folder, workspace)

    def load(self) -> "tuple[nn.Module, TokenizerWrapper]":
        """Load the base model and its tokenizer."""
        return load_with_tokenizer(self.folder, self.contract.rendering)

    def tokens(
        self, rows: list[Conversation], tokenizer: "TokenizerWrapper", cfg: Config
    ) -> list[TokenizedText]:
        """Return rows as tokens, without those that have none to learn."""
        train = cfg.train
        return tokenize_rows(
            rows, tokenizer, train.mask_prompt, train.max_seq_length, self.contract.end
        )


def read_rows(workspace: Workspace, splits: Iterable[str]) -> dict[str, list[Conversation]]:
    """Return the prepared rows of these splits."""
    return {split: files.read_jsonl(workspace.rows(split), read_line) for split in splits}
