"""GGUF: a model's folder as the one file that llama.cpp, and what is built on it, reads.

Reads a folder in Hugging Face's format as mlx-lm writes it (safetensors, also quantized by mlx);
writes a `.gguf` with weights, tokenizer, chat template and stop tokens. What the keys mean and
which tensors are turned about follows llama.cpp's loader (src/llama-vocab.cpp, src/models/) and
its converter (conversion/); names of tensors come from the `gguf` package, which is llama.cpp's.

The tokenizer that is written is the one that transformers makes of the folder, not tokenizer.json
as such: transformers replaces parts of it for some classes, and it is what the model was trained
with. What llama.cpp can't do alike is refused. These remain:

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
from importlib import import_module
from typing import TYPE_CHECKING, Any

from athanor.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


Fields = dict[str, Any]


# How a tokenizer of the SentencePiece kind writes a byte.
BYTE = re.compile("<0x[0-9A-F]{2}>")


# llama.cpp's name for each architecture, by config.json's model_type.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


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


# llama.cpp's names for how byte-level BPE cuts text into words, by the steps of tokenizer.json and
# by whether a word that is a token is taken whole (ignore_merges), which a name implies as well.
PRE_TOKENIZERS = {
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_TEKKEN, "bytes"), True): "tekken",
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
}


# Texts of tokens that llama.cpp ends at by itself; later versions know more of them.
ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}


def unsupported(config: dict[str, Any], tokenizer: "TokenizerWrapper | None") -> str | None:
    """Why a model of this config.json can't become a GGUF; None if it can.

    It needs no weights, so that it can be asked before a training. Without a `tokenizer` only the
    architecture is checked.
    """
    try:
        hyperparameters(config)
        if tokenizer is not None:
            tokenizer_fields(tokenizer, config, sorted(tokenizer.eos_token_ids))
    except UserError as error:
        return str(error)
    return None


def model_arguments(config: dict[str, Any]) -> Any:
    """mlx-lm's ModelArgs of a config.json: what it leaves out has mlx-lm's defaults."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"the architecture {model_type!r} is none of those that are exported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    module = "llama" if model_type == "mistral" else model_type
    try:
        return import_module(f"mlx_lm.models.{module}").ModelArgs.from_dict(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json is no {model_type}'s for mlx-lm: {error}") from error


def hyperparameters(config: dict[str, Any]) -> Fields:
    """llama.cpp's keys for a config.json."""
    args = model_arguments(config)
    arch = ARCHITECTURES[config["model_type"]]
    context = config.get("max_position_embeddings")
    if context is None:
        raise UserError("config.json has no max_position_embeddings, which llama.cpp has to know")
    if "sliding_attention" in (getattr(args, "layer_types", None) or []):
        raise UserError(f"llama.cpp has no sliding windows for {arch}")
    heads = args.num_attention_heads
    head_dim = head_dimension(args)
    fields = {
        "vocab_size": args.vocab_size,
        "context_length": context,
        "embedding_length": args.hidden_size,
        "block_count": args.num_hidden_layers,
        "feed_forward_length": args.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": args.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
    }
    fields |= _rope(args, arch, head_dim)
    if arch in ("gemma2", "gemma3"):
        fields |= _later_gemma(args, config, arch, head_dim)
    return {f"{arch}.{key}": value for key, value in fields.items()}


def head_dimension(args: Any) -> int:
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)


def rope_scaling(args: Any) -> tuple[str, dict[str, Any]]:
    """The kind of scaling, under the names that mlx-lm looks for it, and its settings."""
    scaling = getattr(args, "rope_scaling", None) or {}
    return scaling.get("type") or scaling.get("rope_type", "default"), scaling


def _rope(args: Any, arch: str, head_dim: int) -> Fields:
    if getattr(args, "rope_traditional", False):
        raise UserError("rope_traditional: llama.cpp rotates this architecture the other way")
    fields: Fields = {"rope.dimension_count": head_dim, "rope.freq_base": float(args.rope_theta)}
    kind, scaling = rope_scaling(args)
    if kind == "linear":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    elif kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
        other = [key for key, value in usual.items() if scaling.get(key, value) != value]
        if other:
            raise UserError(f"rope_scaling: yarn with another {', '.join(other)} than usual")
        fields |= {
            "rope.scaling.type": kind,
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling.get(
                "original_max_position_embeddings", 4096
            ),
        }
    elif kind != "default" and not (kind == "llama3" and arch == "llama"):
        raise UserError(f"rope_scaling: llama.cpp has no {kind!r} for {arch}")
    return fields


def _later_gemma(args: Any, config: dict[str, Any], arch: str, head_dim: int) -> Fields:
    """What Gemma 2 and 3 have besides; llama.cpp fixes some of it by the number of layers."""
    largest = args.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[arch]
    scalar = args.hidden_size // args.num_attention_heads if largest else head_dim
    expected = {"query_pre_attn_scalar": scalar}
    if arch == "gemma3":
        expected |= {"rope_local_base_freq": 10000, "sliding_window_pattern": 6}
    for key, value in expected.items():
        if getattr(args, key) != value:
            raise UserError(f"llama.cpp's {arch} has {key} {value}, config.json {config.get(key)}")
    if arch == "gemma3":
        return {"attention.sliding_window": args.sliding_window}
    fields = {
        "attn_logit_softcapping": float(args.attn_logit_softcapping),
        "final_logit_softcapping": float(args.final_logit_softcapping),
    }
    if "sliding_window" in config:
        # mlx-lm attends to everything here; the two differ beyond this many tokens.
        fields["attention.sliding_window"] = config["sliding_window"]
    return fields


def tokenizer_fields(
    tokenizer: "TokenizerWrapper", config: dict[str, Any], ends: list[int]
) -> Fields:
    """llama.cpp's keys for a tokenizer, its chat template and the tokens that end an answer.

    Ids that the model has and the tokenizer has not become unused tokens; those that only the
    tokenizer has (Gemma 3's image token) are left out, as no model can be given them.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"].get("type")
    if kind != "BPE":
        raise UserError(f"llama.cpp reads tokenizers of BPE here, this one is of {kind}")
    added = {token["content"]: token for token in data["added_tokens"]}
    stripping = [text for text, token in added.items() if token["lstrip"] or token["rstrip"]]
    if stripping:
        raise UserError(f"the token {stripping[0]!r} takes the spaces beside it, llama.cpp can't")
    rows = int(model_arguments(config).vocab_size)
    known = {id: text for text, id in tokenizer.get_vocab().items() if id < rows}
    texts = [known.get(id, f"[PAD{id}]") for id in range(rows)]
    spm = bool(data["model"].get("byte_fallback"))
    fields = _sentence_piece(data, texts, tokenizer) if spm else _byte_level(data)
    return {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": _types(known, rows, added, spm),
        **fields,
        **stop_ids(ends, tokenizer),
        **_special(tokenizer, config, ends[0]),
        **_templates(tokenizer),
    }


def _byte_level(data: dict[str, Any]) -> Fields:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    normalizer = (data["normalizer"] or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise UserError(f"llama.cpp does not normalize text, this tokenizer does: {normalizer}")
    steps = _steps(data["pre_tokenizer"])
    whole = bool(data["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, whole))
    if name is None:
        raise UserError(
            "the tokenizer cuts text into words in a way that is not known here to be one of "
            f"llama.cpp's (ignore_merges {whole}): {' then '.join(steps)}"
        )
    merges = data["model"]["merges"]
    return {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ],
    }


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer: a pattern, or a name; in JSON what has none."""
    if pre_tokenizer is None:
        return ("nothing",)
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
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


def _sentence_piece(
    data: dict[str, Any], texts: list[str], tokenizer: "TokenizerWrapper"
) -> Fields:
    """BPE over characters with bytes for what it does not know, as Llama 2 and Gemma have it.

    llama.cpp joins any two neighbours whose text is a token, the one with the highest score first.
    That is what the merges say if there is one for each way to cut a token in two, as there is in
    what was converted from SentencePiece: a token's score is then the place of its first merge.
    """
    space = _space_prefix(data, tokenizer)
    vocab = data["model"]["vocab"]
    for byte in range(256):
        # Gemma has a tab instead of its byte; llama.cpp takes either.
        if f"<0x{byte:02X}>" not in vocab and (byte > 127 or chr(byte) not in vocab):
            raise UserError(f"llama.cpp needs a token for each byte, <0x{byte:02X}> is not there")
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in data["model"]["merges"]
    ]
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        places.setdefault(left + right, place)
    special = {token["content"] for token in data["added_tokens"]}
    there = set(merges)
    for text in vocab.keys() - special:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in there:
                raise UserError(
                    f"llama.cpp would join {left!r} and {right!r}, the tokenizer has no such "
                    "merge: it was not made from SentencePiece's"
                )
    return {
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(places.get(text, 0)) for text in texts],
        "tokenizer.ggml.add_space_prefix": space,
    }


def _space_prefix(data: dict[str, Any], tokenizer: "TokenizerWrapper") -> bool:
    """Whether text at the start and after a special token is given a space before it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    match data["normalizer"], data["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": steps}, None if steps == [prepend, replace]:
            return True
        # Gemma's split at spaces finds none after this.
        case step, None | {"type": "Split", "pattern": {"String": " "}} if step == replace:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False} as spaces:
            return spaces["prepend_scheme"] != "never" and _spaced_in_chat(tokenizer)
    raise UserError(
        "the tokenizer treats spaces in a way that is not known here to be llama.cpp's: "
        f"normalizer {json.dumps(data['normalizer'], ensure_ascii=False)}, pre_tokenizer "
        f"{json.dumps(data['pre_tokenizer'], ensure_ascii=False)}"
    )


def _spaced_in_chat(tokenizer: "TokenizerWrapper") -> bool:
    """Whether the tokenizer adds a space before the first text in the chat template's prompt."""
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


def _types(known: dict[int, str], rows: int, added: dict[str, Any], spm: bool) -> list[int]:
    """llama.cpp's type of each token: how it is found in a prompt and written in an answer."""
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


def _special(tokenizer: "TokenizerWrapper", config: dict[str, Any], end: int) -> Fields:
    """The ids of the other special tokens, and which the tokenizer itself adds to a text."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a"))
    bos = tokenizer.bos_token_id
    add_bos = full[:1] == [bos] and plain[:1] != [bos]
    add_eos = full[-1:] == [end] and plain[-1:] != [end]
    if full != [bos] * add_bos + plain + [end] * add_eos:
        raise UserError(
            f"llama.cpp adds a start and the first stop token ({end}) to a text, or neither; "
            f"this tokenizer makes {full} of {plain}"
        )
    if bos is None:
        bos = config.get("bos_token_id")
    ids = {"bos": bos, "padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    return {
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_eos_token": add_eos,
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None},
    }


def _templates(tokenizer: "TokenizerWrapper") -> Fields:
    """The chat template; those with other names beside the one named default under theirs."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return {} if templates is None else {"tokenizer.chat_template": templates}
    return {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text
        for name, text in templates.items()
    }


def stop_ids(ends: list[int], tokenizer: "TokenizerWrapper") -> Fields:
    """The keys by which llama.cpp ends an answer at each of these ids.

    It has three that can name any token: eos, eot (end of turn) and eom (end of message); beyond
    these it ends at some by their text. Ollama's own engine reads the list.

    Raises:
        UserError: where more stops than llama.cpp has keys for are none that it knows by text.
    """
    if not ends:
        raise UserError("no stop token: llama.cpp would take one of its own; name one as eos")
    by_text = {id for id in ends if tokenizer.convert_ids_to_tokens(id) in ENDS}
    first, *others = dict.fromkeys(ends)
    others.sort(key=lambda id: id in by_text)
    if beyond := [id for id in others[2:] if id not in by_text]:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)} ({id})" for id in beyond)
        raise UserError(
            f"llama.cpp has no key for so many stop tokens; it would not end at {named}"
        )
    fields: Fields = {
        "tokenizer.ggml.eos_token_id": first,
        "tokenizer.ggml.eos_token_ids": [first, *others],
    }
    names = ("eot", "eom")
    return fields | {
        f"tokenizer.ggml.{name}_token_id": id for name, id in zip(names, others, strict=False)
    }
