"""GGUF's fields: everything of a model that llama.cpp reads beside its weights.

The tokenizer that is written is the one that transformers makes of the folder, not tokenizer.json
as such: transformers replaces parts of it for some classes, and it is what the model was trained
with. Architectures and tokenizers that llama.cpp has no equivalent for are refused. These
differences remain:

- llama.cpp does not compose characters (NFC): text with separate accents gives other tokens.
- Its pattern of `tekken` has no case beyond A to Z and no marks on letters (Hindi, Thai).
- Some tokenizers of the SentencePiece kind put a space before text only at its start, or only where
  there is none (Metaspace's `first` and `always`): llama.cpp is told what holds in the template.
- It ends generation at some tokens by their text alone (`<|endoftext|>`, `</s>`, `<|fim_pad|>` …),
  whether generation_config.json has them or not, and reads them in prompts as special tokens: in
  Qwen's vocabulary `</s>` is none.
"""

from typing import TYPE_CHECKING, Any

from athanor.model.gguf_architecture import Fields, architecture_fields
from athanor.model.gguf_tokenizer import tokenizer_fields

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def gguf_fields(config: dict[str, Any], tokenizer: "TokenizerWrapper", stops: list[int]) -> Fields:
    """Return llama.cpp's keys for a config.json and a tokenizer that ends answers at `stops`.

    Raises:
        UserError: where llama.cpp has no equivalent.
    """
    return architecture_fields(config) | tokenizer_fields(tokenizer, config, stops)
