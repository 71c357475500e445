"""GGUF's fields for a tokenizer, its chat template and the tokens that end an answer.

What the keys mean follows llama.cpp's loader (src/llama-vocab.cpp) and its converter (conversion/).
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

import json
import re
from typing import TYPE_CHECKING, Any

from athanor.errors import UserError
from athanor.model.gguf_architecture import Fields, model_arguments

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# A byte as tokenizers of the SentencePiece kind write it.
BYTE = re.compile("<0x[0-9A-F]{2}>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}|" + _REST
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}|" + _REST

# llama.cpp's names for the ways in which byte-level BPE cuts text into words, by the steps in
# tokenizer.json and by ignore_merges (a word that is a token stays whole), which a name implies.
PRE_TOKENIZERS = {
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_TEKKEN, "bytes"), True): "tekken",
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
}

# Tokens that llama.cpp ends at by their text; later versions know more of them.
ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}


def tokenizer_fields(
    tokenizer: "TokenizerWrapper", config: dict[str, Any], stops: list[int]
) -> Fields:
    """Return llama.cpp's keys for a tokenizer, its chat template and the tokens that end an answer.

    Ids that the model has and the tokenizer has not become unused tokens; those that only the
    tokenizer has (Gemma 3's image token) are left out, as no model can read them.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"].get("type")
    if kind != "BPE":
        raise UserError("model.gguf_tokenizer_kind", kind=kind)
    added = {token["content"]: token for token in data["added_tokens"]}
    stripping = [text for text, token in added.items() if token["lstrip"] or token["rstrip"]]
    if stripping:
        raise UserError("model.gguf_stripping_token", token=stripping[0])
    rows = int(model_arguments(config).vocab_size)
    known = {id: text for text, id in tokenizer.get_vocab().items() if id < rows}
    texts = [known.get(id, f"[PAD{id}]") for id in range(rows)]
    spm = bool(data["model"].get("byte_fallback"))
    fields = _sentence_piece_fields(data, texts, tokenizer) if spm else _byte_level_fields(data)
    return {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": _token_types(known, rows, added, spm),
        **fields,
        **_stop_fields(stops, tokenizer),
        **_special_fields(tokenizer, config, stops[0]),
        **_template_fields(tokenizer),
    }


def _byte_level_fields(data: dict[str, Any]) -> Fields:
    """Return the keys of byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    normalizer = (data["normalizer"] or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise UserError("model.gguf_normalizer", normalizer=normalizer)
    steps = _pre_tokenizer_steps(data["pre_tokenizer"])
    whole = bool(data["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, whole))
    if name is None:
        raise UserError("model.gguf_pre_tokenizer", ignore_merges=whole, steps=steps)
    merges = data["model"]["merges"]
    return {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ],
    }


def _pre_tokenizer_steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer: patterns or names, in JSON those that have none."""
    if pre_tokenizer is None:
        return ("nothing",)
    if pre_tokenizer["type"] == "Sequence":
        return tuple(
            step for part in pre_tokenizer["pretokenizers"] for step in _pre_tokenizer_steps(part)
        )
    match pre_tokenizer:
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return ("gpt2" if use_regex else "bytes",)
    return (json.dumps(pre_tokenizer, ensure_ascii=False),)


def _sentence_piece_fields(
    data: dict[str, Any], texts: list[str], tokenizer: "TokenizerWrapper"
) -> Fields:
    """Return the keys of BPE over characters, bytes as a fallback, as Llama 2 and Gemma have it.

    llama.cpp joins any two neighbours whose text is a token, the one with the highest score first.
    That is what the merges say if there is one for each way to cut a token in two, as there is in
    what was converted from SentencePiece: a token's score is then the place of its first merge.
    """
    space = _space_prefix(data, tokenizer)
    vocab = data["model"]["vocab"]
    for byte in range(256):
        # Gemma has a tab instead of its byte; llama.cpp takes either.
        if f"<0x{byte:02X}>" not in vocab and (byte > 127 or chr(byte) not in vocab):
            raise UserError("model.gguf_byte_missing", byte=byte)
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in data["model"]["merges"]
    ]
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    special = {token["content"] for token in data["added_tokens"]}
    known_merges = set(merges)
    for text in vocab.keys() - special:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in known_merges:
                raise UserError("model.gguf_merge_missing", left=left, right=right)
    return {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(places.get(text, 0)) for text in texts],
        "tokenizer.ggml.add_space_prefix": space,
    }


def _space_prefix(data: dict[str, Any], tokenizer: "TokenizerWrapper") -> bool:
    """Return true if text at the start and after a special token gets a space before it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    match data["normalizer"], data["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": steps}, None if steps == [prepend, replace]:
            return True
        # Gemma's split at spaces finds none after this.
        case step, None | {"type": "Split", "pattern": {"String": " "}} if step == replace:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False} as spaces:
            return spaces["prepend_scheme"] != "never" and _puts_space_in_chat(tokenizer)
    raise UserError(
        "model.gguf_spaces",
        normalizer=json.dumps(data["normalizer"], ensure_ascii=False),
        pre_tokenizer=json.dumps(data["pre_tokenizer"], ensure_ascii=False),
    )


def _puts_space_in_chat(tokenizer: "TokenizerWrapper") -> bool:
    """Return true if the tokenizer adds a space before the first text of the template's prompt."""
    if not tokenizer.has_chat_template:
        return True
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
    )
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    special = tokenizer.added_tokens_decoder
    for id, token, (start, _) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
        if id not in special:
            return bool(token.startswith("▁") and text[start] != " ")
    return True


def _token_types(known: dict[int, str], rows: int, added: dict[str, Any], spm: bool) -> list[int]:
    """Return llama.cpp's type of each token, by which it reads prompts and writes answers."""
    from gguf import TokenType

    def kind(text: str | None) -> TokenType:
        if text is None:
            return TokenType.UNUSED
        if text in added:
            if added[text]["special"]:
                return TokenType.CONTROL
            # Gemma's runs of spaces: merges make them, and only a normal token's ▁ is a space.
            return TokenType.NORMAL if spm and "▁" in text else TokenType.USER_DEFINED
        return TokenType.BYTE if spm and BYTE.fullmatch(text) else TokenType.NORMAL

    return [int(kind(known.get(id))) for id in range(rows)]


def _special_fields(tokenizer: "TokenizerWrapper", config: dict[str, Any], end: int) -> Fields:
    """Return the ids of special tokens beside the stops, and which the tokenizer adds to a text."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a"))
    bos = tokenizer.bos_token_id
    add_bos = full[:1] == [bos] and plain[:1] != [bos]
    add_eos = full[-1:] == [end] and plain[-1:] != [end]
    if full != [bos] * add_bos + plain + [end] * add_eos:
        raise UserError("model.gguf_added_tokens", end=end, full=full, plain=plain)
    if bos is None:
        bos = config.get("bos_token_id")
    ids = {"bos": bos, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    return {
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_eos_token": add_eos,
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None},
    }


def _template_fields(tokenizer: "TokenizerWrapper") -> Fields:
    """Return the chat templates: that named default, and further ones under their names."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return {} if templates is None else {"tokenizer.chat_template": templates}
    return {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text
        for name, text in templates.items()
    }


def _stop_fields(stops: list[int], tokenizer: "TokenizerWrapper") -> Fields:
    """Return the keys by which llama.cpp ends an answer at each of these ids.

    It has three that can name any token: eos, eot (end of turn) and eom (end of message); beyond
    these it ends at some by their text. Ollama's own engine reads the list.

    Raises:
        UserError: where more stops than llama.cpp has keys for are none that it knows by text.
    """
    if not stops:
        raise UserError("model.gguf_no_stop")
    by_text = {id for id in stops if tokenizer.convert_ids_to_tokens(id) in ENDS}
    first, *others = dict.fromkeys(stops)
    others.sort(key=lambda id: id in by_text)
    if beyond := [id for id in others[2:] if id not in by_text]:
        tokens = [f"{tokenizer.convert_ids_to_tokens(id)} ({id})" for id in beyond]
        raise UserError("model.gguf_stops", tokens=tokens)
    fields: Fields = {
        "tokenizer.ggml.eos_token_id": first,
        "tokenizer.ggml.eos_token_ids": [first, *others],
    }
    names = ("eot", "eom")
    return fields | {
        f"tokenizer.ggml.{name}_token_id": id for name, id in zip(names, others, strict=False)
    }
