"""GGUF files, read by the real llama.cpp: tokens, answers and stops are mlx-lm's."""

import re
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, TokenType
from mlx.utils import tree_map_with_path
from mlx_lm.utils import quantize_model, save_model
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from athanor import console, files
from athanor.chat.base import load_with_tokenizer
from athanor.chat.load import load_tokenizer
from athanor.compute import evaluation
from athanor.fuse.export_gguf import write_gguf
from athanor.model.gguf_architecture import architecture_fields
from athanor.model.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_fields
from support.llama import Llama
from support.prompts import PROMPTS
from support.refused import refused

TINY = Path("models/tiny")
CHATML = (TINY / "chat_template.jinja").read_text()
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Texts to learn tokenizers from, without special tokens, which llama.cpp knows by their texts.
LEARNED = [text for text in PROMPTS if "<|" not in text and "<s>" not in text] * 2
QUESTIONS = ["月亮哪天最圆", "谁是最帅的地球人？", "Hello, who are you?", "1 + 2 = ?", "def f(x):"]


STEPS = {
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "digits": pre_tokenizers.Digits(individual_digits=True),
}


def byte_level(folder: Path, name: str, special: list[str]) -> int:
    """Byte-level BPE that cuts words as llama.cpp's `name` does; returns the number of tokens.

    The first special token is put before a text, the last one ends an answer.
    """
    known = {name: way for way, name in PRE_TOKENIZERS.items()}
    steps, ignore_merges = known[name]
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [STEPS.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LEARNED, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    kind = "PreTrainedTokenizerFast"
    return save_tokenizer(tokenizer, folder, special[0], special[-1], CHATML, kind)


def sentence_piece(folder: Path, kind: str, bos: str, end: str, template: str) -> int:
    """BPE with bytes to fall back on, and a merge for each way to cut a token in two."""
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = BpeTrainer(vocab_size=1100, show_progress=False)
    trained.train_from_iterator(LEARNED, trainer)
    learned = sorted(
        trained.get_vocab(), key=lambda text: (len(text) == 1, trained.token_to_id(text))
    )
    special = ["<unk>", bos, end, "<pad>", "<start_of_turn>"]
    special += ["<eos>", "<mask>"] if kind == "GemmaTokenizer" else []
    texts = special + [f"<0x{byte:02X}>" for byte in range(256)]
    texts = list(dict.fromkeys([*texts, *learned, "▁▁", "▁▁▁"]))
    vocab = {text: id for id, text in enumerate(texts)}
    merges = [
        (text[:cut], text[cut:])
        for text in texts[len(special) + 256 :]
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    bpe = BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if kind == "PreTrainedTokenizerFast":  # as the first tokenizer.json of Llama 2
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return save_tokenizer(tokenizer, folder, bos, end, template, kind)


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, bos: str, end: str, template: str, kind: str
) -> int:
    start = (bos, tokenizer.token_to_id(bos))
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [start])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": bos, "eos_token": end, "legacy": False}
    files.write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab_size()


def tiny_tokenizer(folder: Path) -> int:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    return 6144


def llama3(folder: Path, pre: str = "llama-bpe") -> int:
    special = ["<|begin_of_text|>", "<|im_start|>", "<|end_of_text|>", "<|im_end|>"]
    return byte_level(folder, pre, special)


def tekken(folder: Path) -> int:
    return byte_level(folder, "tekken", ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])


def llama2(folder: Path) -> int:
    return sentence_piece(folder, "PreTrainedTokenizerFast", "<s>", "</s>", INST)


def metaspace(folder: Path) -> int:
    return sentence_piece(folder, "LlamaTokenizer", "<s>", "</s>", INST)


def gemma(folder: Path) -> int:
    return sentence_piece(folder, "GemmaTokenizer", "<bos>", "<end_of_turn>", TURNS)


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# model_type, tokenizer, what differs from SHAPE, rows beyond the tokenizer's
Case = tuple[str, Callable[[Path], int], dict[str, Any], int]
CASES: dict[str, Case] = {
    "llama3": ("llama", llama3, {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}, 0),
    "llama2": (
        "llama",
        llama2,
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        0,
    ),
    "metaspace": ("llama", metaspace, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 0),
    "mistral": ("mistral", tekken, {"head_dim": 32, "tie_word_embeddings": False}, 0),
    "qwen2": ("qwen2", tiny_tokenizer, {"rope_scaling": YARN, "tie_word_embeddings": False}, 0),
    "qwen3": ("qwen3", tiny_tokenizer, {"head_dim": 32, "tie_word_embeddings": True}, 13),
    "gemma": ("gemma", gemma, {"head_dim": 32}, 5),
    "gemma2": ("gemma2", gemma, {"head_dim": 32, "query_pre_attn_scalar": 32}, 0),
    "gemma3": (
        "gemma3_text",
        gemma,
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 6, "sliding_window": 16},
        0,
    ),
}
# llama.cpp's tekken does not know that these belong to the letter before them.
MARKS = re.compile("[\u0900-\u0903\u093a-\u094f\u0e31-\u0e4e]")
# Tokenizers whose spaces llama.cpp puts alike in chats only.
CHAT_ONLY = {"metaspace"}


def build(folder: Path, case: Case) -> None:
    """Make a folder with a model of random weights, of mlx-lm's own classes."""
    folder.mkdir()
    model_type, tokenizer, differs, beyond = case
    rows = tokenizer(folder) + beyond
    config = {"model_type": model_type, "vocab_size": rows, **SHAPE, **differs}
    module = import_module("mlx_lm.models." + {"mistral": "llama"}.get(model_type, model_type))
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type == "gemma3_text":
        model.sanitize({})  # its embeddings are its head, too

    def spread(path: str, weight: mx.array) -> mx.array:
        """Return norms and biases that are not ones and zeros, and maps that tell tokens apart."""
        noise = mx.random.normal(weight.shape)
        if weight.ndim == 1:
            return weight + 0.3 * noise
        return noise * (0.3 if "embed" in path else 2.0 / weight.shape[-1] ** 0.5)

    model.update(tree_map_with_path(spread, model.parameters()))
    save_model(folder, model)
    ends = stops(folder)
    files.write_json(folder / "config.json", config | {"eos_token_id": ends})
    files.write_json(folder / "generation_config.json", {"eos_token_id": ends})


def stops(folder: Path) -> list[int]:
    """Two stops: the tokenizer's end and one more special token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = files.read_json(folder / "tokenizer_config.json")["eos_token"]
    more = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<pad>"]
    ids = map(tokenizer.token_to_id, dict.fromkeys([end, *more]))
    return [id for id in ids if id is not None][:2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Llama]]:
    """Return the folder of a case (or `tiny`), and llama.cpp on its export in f32."""
    folder = tmp_path_factory.mktemp("gguf")
    models: dict[str, tuple[Path, Llama]] = {}

    def of(name: str) -> tuple[Path, Llama]:
        if name not in models:
            model = TINY if name == "tiny" else folder / name
            if name != "tiny":
                build(model, CASES[name])
            path = folder / f"{name}.gguf"
            write_gguf(model, path, "f32")
            models[name] = (model, Llama(path))
        return models[name]

    return of


def prompt(question: str, tokenizer: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    )


@pytest.mark.parametrize("name", ["tiny", *CASES])
def test_tokens_are_the_tokenizers_own(name: str, exported: Any) -> None:
    model, llama = exported(name)
    tokenizer = load_tokenizer(model)
    for text in PROMPTS:
        if name == "mistral" and MARKS.search(text):
            continue
        chat = prompt(text, tokenizer)
        assert llama.ids(chat, False) == tokenizer.encode(chat, add_special_tokens=False)
        if name not in CHAT_ONLY:
            assert llama.ids(text, False) == tokenizer.encode(text, add_special_tokens=False)
            assert llama.ids(text, True) == tokenizer.encode(text)


@pytest.mark.parametrize("pre", ["smaug-bpe", "gpt-2", "smollm"])
def test_text_is_cut_into_words_alike(tmp_path: Path, pre: str) -> None:
    """By the pre-tokenizers that no case above has."""
    model = tmp_path / "model"
    build(model, ("llama", partial(llama3, pre=pre), {}, 0))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, "f16")
    assert read(path)["tokenizer.ggml.pre"] == pre
    tokenizer, llama = load_tokenizer(model), Llama(path)
    for text in PROMPTS:
        assert llama.ids(text, True) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["tiny", "llama2", "gemma"])
def test_the_chat_template_is_rendered_alike(name: str, exported: Any) -> None:
    model, llama = exported(name)
    tokenizer = load_tokenizer(model)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = llama.post("/apply-template", messages=messages)["prompt"]
        # The first token is left to the tokenizer, where it puts one first.
        ours = tokenizer.encode(prompt(question, tokenizer), add_special_tokens=False)
        assert llama.ids(text, True) == ours


def logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Return the logits for each next token, float32 [tokens, vocabulary]."""
    return np.array(model(mx.array([ids])).astype(mx.float32))[0]


def assert_same_answers(model: Any, tokenizer: Any, llama: Llama, questions: list[str]) -> None:
    """Greedy answers are equal, up to where mlx-lm's two best tokens are nearly tied.

    From a tie of less than 0.02 (in logits) on, either token is right and the texts go their ways;
    nine of ten tokens have to come before one.
    """
    prompts = [tokenizer.encode(prompt(q, tokenizer), add_special_tokens=False) for q in questions]
    ours = evaluation.generate_answers(model, tokenizer, prompts, max_tokens=24, batch_size=1)
    total = same = 0
    for ids, our in zip(prompts, ours, strict=True):
        their = llama.answer(ids, 24)
        pairs = list(zip(our.ids, their.ids, strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total, same = total + len(our.ids) + our.stopped, same + first
        if our == their:
            same += our.stopped
            continue
        best = np.sort(logits(model, ids + our.ids[:first])[-1])
        assert best[-1] - best[-2] < 0.02, (our, their)
    assert same >= 0.9 * total


@pytest.mark.parametrize("name", ["tiny", *CASES])
def test_answers_are_mlx_lms(name: str, exported: Any) -> None:
    folder, llama = exported(name)
    model, tokenizer = load_with_tokenizer(folder)
    compared = 0
    for question in QUESTIONS:
        ids = tokenizer.encode(prompt(question * 8, tokenizer), add_special_tokens=False)
        ours = logits(model, ids)[-1]
        for id, theirs in llama.logprobs(ids, 50).items():
            assert ours[id] - np.logaddexp.reduce(ours) == pytest.approx(theirs, abs=0.02)
            compared += 1
    assert compared >= 50
    assert_same_answers(model, tokenizer, llama, QUESTIONS)


def test_it_stops_at_each_stop_token_and_at_no_other(exported: Any) -> None:
    """A bias makes each of the stops the likeliest token, then one that is special but no stop."""
    for name in ("tiny", "llama3", "llama2", "gemma3"):
        folder, llama = exported(name)
        tokenizer = load_tokenizer(folder)
        ends = files.read_json(folder / "generation_config.json")["eos_token_id"]
        assert len(ends) == 2
        ids = tokenizer.encode("你好", add_special_tokens=False)
        for end in ends:
            assert llama.answer(ids, 3, logit_bias=[[end, 1000]]) == evaluation.Answer([], True)
        start = tokenizer.convert_tokens_to_ids(
            "<|im_start|>" if name in ("tiny", "llama3") else "<start_of_turn>"
        )
        forced = llama.answer(ids, 3, logit_bias=[[start, 1000]])
        assert forced == evaluation.Answer([start] * 3, False)


def test_three_ordinary_tokens_can_be_stops_beside_one_known_by_its_text(tmp_path: Path) -> None:
    """The model reaches some of them by itself, and is made to reach each."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    tokenizer = load_tokenizer(TINY)
    first, *others = (tokenizer.encode(text)[0] for text in ("，", "我", "？"))
    ends = [first, 6143, *others]
    for name in ("config.json", "generation_config.json"):
        files.write_json(folder / name, files.read_json(folder / name) | {"eos_token_id": ends})
    settings = files.read_json(folder / "tokenizer_config.json")
    files.write_json(folder / "tokenizer_config.json", settings | {"eos_token": "，"})
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, "f32")
    model, tokenizer = load_with_tokenizer(folder)
    llama = Llama(path)
    prompts = [tokenizer.encode(prompt(question, tokenizer)) for question in QUESTIONS]
    ours = evaluation.generate_answers(model, tokenizer, prompts, max_tokens=24, batch_size=1)
    assert [llama.answer(ids, 24) for ids in prompts] == ours
    assert len({len(our.ids) for our in ours if our.stopped}) > 1
    for end in ends:
        forced = llama.answer(prompts[0], 3, logit_bias=[[end, 1000]])
        assert forced == evaluation.Answer([], True)


def test_more_stops_than_llama_cpp_has_keys_for_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    for name in ("config.json", "generation_config.json"):
        ends = {"eos_token_id": [6143, 10, 11, 12]}
        files.write_json(folder / name, files.read_json(folder / name) | ends)
    with refused("fuse.gguf_unsupported", model=folder) as caught:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert caught.value.facts["error"].code == "model.gguf_stops"
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("dtype", "stored"), [("f16", 1), ("bf16", 30), ("q8_0", 8)])
def test_smaller_files_answer_too(tmp_path: Path, dtype: str, stored: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(TINY, path, dtype)
    model, tokenizer = load_with_tokenizer(TINY)
    assert_same_answers(model, tokenizer, Llama(path), QUESTIONS[:2])
    kinds = {(len(tensor.shape), int(tensor.tensor_type)) for tensor in GGUFReader(path).tensors}
    assert kinds == {(1, 0), (2, stored)}


def test_rows_that_are_no_multiple_of_32_stay_f16_in_q8_0(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build(model, ("llama", llama3, {"intermediate_size": 100}, 0))
    path = tmp_path / "model.gguf"
    write_gguf(model, path, "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert Llama(path).answer([1, 2, 3], 4).ids


def test_weights_that_mlx_quantized_are_dequantized(tmp_path: Path) -> None:
    """Also a matrix with settings of its own."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model, _ = load_with_tokenizer(TINY)

    def bits(path: str, module: Any) -> bool | dict[str, int]:
        fewer = {"group_size": 32, "bits": 6} if "down_proj" in path else True
        return hasattr(module, "to_quantized") and fewer

    model, config = quantize_model(
        model, files.read_json(TINY / "config.json"), 64, 8, quant_predicate=bits
    )
    save_model(folder, model)
    files.write_json(folder / "config.json", config)
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, "f32")
    model, tokenizer = load_with_tokenizer(folder)
    assert_same_answers(model, tokenizer, Llama(path), QUESTIONS[:2])


@cache
def read(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_the_fields_of_tiny(tmp_path: Path) -> None:
    path = tmp_path / "my-model.gguf"
    write_gguf(TINY, path, "bf16")
    fields = read(path)
    expected = {
        "general.architecture": "qwen2",
        "general.name": "my-model",
        "general.file_type": 32,
        "qwen2.context_length": 2048,
        "qwen2.embedding_length": 192,
        "qwen2.block_count": 6,
        "qwen2.feed_forward_length": 384,
        "qwen2.attention.head_count": 6,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 32,
        "qwen2.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 6143,
        "tokenizer.ggml.eot_token_id": 6141,
        "tokenizer.ggml.eos_token_ids": [6143, 6141],
        "tokenizer.ggml.padding_token_id": 6141,
        "tokenizer.chat_template": CHATML,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["tokenizer.ggml.tokens"][6143] == "<|im_end|>"
    assert fields["tokenizer.ggml.token_type"][6143] == TokenType.CONTROL
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(path).tensors}
    assert [file.name for file in tmp_path.iterdir()] == ["my-model.gguf"]


def test_the_fields_of_other_families(exported: Any) -> None:
    def of(name: str) -> dict[str, Any]:
        return read(exported(name)[0].with_suffix(".gguf"))

    llama = of("llama3")
    assert llama["tokenizer.ggml.pre"] == "llama-bpe"
    assert llama["tokenizer.ggml.add_bos_token"] is True
    assert of("mistral")["general.architecture"] == "llama"
    assert of("mistral")["tokenizer.ggml.pre"] == "tekken"
    assert of("qwen2")["qwen2.rope.scaling.original_context_length"] == 64
    qwen3 = of("qwen3")
    assert len(qwen3["tokenizer.ggml.tokens"]) == 6144 + 13
    assert set(qwen3["tokenizer.ggml.token_type"][6144:]) == {TokenType.UNUSED}
    assert of("gemma2")["gemma2.attn_logit_softcapping"] == 50
    assert of("gemma3")["gemma3.attention.sliding_window"] == 16
    for name, spaces in {"llama2": True, "metaspace": False, "gemma": False}.items():
        fields = of(name)
        assert fields["tokenizer.ggml.model"] == "llama"
        assert fields["tokenizer.ggml.add_space_prefix"] is spaces
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        assert types[tokens.index("<unk>")] == TokenType.CONTROL
        assert types[tokens.index("<0x0A>")] == TokenType.BYTE


TINY_CONFIG = files.read_json(TINY / "config.json")
GEMMA2 = {**SHAPE, "model_type": "gemma2", "vocab_size": 9, "head_dim": 16}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (TINY_CONFIG, None),
        ({"model_type": "qwen2_moe"}, "gguf_architecture"),
        ({}, "gguf_architecture"),
        ({"model_type": "llama"}, "config_misfits_architecture"),
        (TINY_CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "gguf_rope_scaling"),
        (TINY_CONFIG | {"rope_scaling": LLAMA3_ROPE}, "gguf_rope_scaling"),
        (TINY_CONFIG | {"rope_scaling": YARN | {"beta_fast": 16}}, "gguf_yarn"),
        (TINY_CONFIG | {"rope_traditional": True}, "gguf_rope_traditional"),
        (TINY_CONFIG | {"max_position_embeddings": None}, "gguf_context"),
        (TINY_CONFIG | {"max_position_embeddings": -1}, "gguf_context"),
        (TINY_CONFIG | {"rope_theta": None}, "config_misfits_architecture"),
        (TINY_CONFIG | {"rope_scaling": {"type": "linear"}}, "config_misfits_architecture"),
        (TINY_CONFIG | {"rope_scaling": YARN | {"factor": "2x"}}, "config_misfits_architecture"),
        (
            {**SHAPE, "model_type": "mistral", "vocab_size": 9}
            | {"layer_types": ["sliding_attention"] * 2},
            "gguf_sliding_windows",
        ),
        (GEMMA2 | {"query_pre_attn_scalar": 16}, None),
        (GEMMA2 | {"query_pre_attn_scalar": 24}, "gguf_fixed_setting"),
    ],
)
def test_an_unsupported_architecture_is_known_before_training(
    config: dict[str, Any], code: str | None
) -> None:
    with nullcontext() if code is None else refused(f"model.{code}"):
        architecture_fields(config)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda data: None, None),
        (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0), "gguf_pre_tokenizer"),
        (lambda data: data.update(normalizer={"type": "NFKC"}), "gguf_normalizer"),
        (lambda data: data["model"].update(ignore_merges=False), None),
        (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(1), "gguf_pre_tokenizer"),
        (lambda data: data["model"].update(byte_fallback=True), "gguf_spaces"),
        (lambda data: data["added_tokens"][1].update(lstrip=True), "gguf_stripping_token"),
    ],
)
def test_a_tokenizer_without_an_equivalent_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], code: str | None
) -> None:
    folder = tmp_path / "model"
    build(folder, CASES["llama3"])
    data = files.read_json(folder / "tokenizer.json")
    change(data)
    files.write_json(folder / "tokenizer.json", data)
    if code is None:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
        return
    with refused("fuse.gguf_unsupported", model=folder) as caught:
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert caught.value.facts["error"].code == f"model.{code}"


def test_merges_that_are_not_sentence_pieces_are_refused(tmp_path: Path) -> None:
    """One way less to make a token: llama.cpp could not know that it is not to be taken."""
    llama2(tmp_path)
    data = files.read_json(tmp_path / "tokenizer.json")
    left, right = data["model"]["merges"].pop()
    files.write_json(tmp_path / "tokenizer.json", data)
    config = {**SHAPE, "model_type": "llama", "vocab_size": 2000}
    files.write_json(tmp_path / "config.json", config)
    with refused("model.gguf_merge_missing", left=left, right=right):
        tokenizer_fields(load_tokenizer(tmp_path), config, [2])


def test_a_tensor_without_a_name_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = mx.load(str(TINY / "model.safetensors"))
    assert isinstance(weights, dict)
    more = weights | {"model.layers.0.self_attn.sinks.weight": mx.zeros((4,))}
    mx.save_safetensors(str(folder / "model.safetensors"), more)
    with refused("fuse.gguf_unknown_tensor", name="model.layers.0.self_attn.sinks.weight"):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_weights_that_f16_cant_hold_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = mx.load(str(TINY / "model.safetensors"))
    assert isinstance(weights, dict)
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name] = weights[name].astype(mx.bfloat16) * 1e6
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with refused("fuse.gguf_f16_overflow", name="blk.3.ffn_up.weight"):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_a_full_disk_is_reported_as_such(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            write_gguf(TINY, tmp_path / "model.gguf", "f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno in console.DISK_FULL
    assert not list(tmp_path.iterdir())
