"""The look at a model's folder: what is damaged, swapped or foreign is named by its file."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from athanor.chat.load import load_tokenizer
from athanor.chat.templates import RenderedText
from athanor.chat.tokens import encode_texts
from athanor.errors import UserError
from athanor.model import folder as looks
from athanor.model.folder import inspect_folder, read_config
from athanor.model.load import load_model
from athanor.model.source import find_model, resolve_source
from support.model_folders import (
    Change,
    copy_model,
    header,
    kind,
    put,
    setting,
    shards,
    together,
    weights,
)
from support.refused import refused

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
EMBEDDING = "model.embed_tokens.weight"
FILES = (CONFIG, "generation_config.json", WEIGHTS, TOKENIZER, "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"


def edit(**changes: Any) -> Change:
    """Change the header's entry of the embedding."""
    return header(lambda entries: entries[EMBEDDING].update(changes))


def swap(entries: dict[str, Any]) -> None:
    """Give two weights of one size the same bytes."""
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    entries[first]["data_offsets"] = entries[second]["data_offsets"]


def added(**token: Any) -> Change:
    """Add a token to tokenizer.json."""

    def change(folder: Path) -> None:
        tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        usual = tokenizer["added_tokens"][-1]
        tokenizer["added_tokens"].append(usual | token)
        put(TOKENIZER, json.dumps(tokenizer))(folder)

    return change


def vocabulary(**ids: Any) -> Change:
    """Change ids of tokenizer.json's vocabulary."""

    def change(folder: Path) -> None:
        tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        tokenizer["model"]["vocab"].update(ids)
        put(TOKENIZER, json.dumps(tokenizer))(folder)

    return change


def duplicated(folder: Path) -> None:
    text = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},' + (
        b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    )
    put(WEIGHTS, struct.pack("<Q", len(text)) + text + b"\0")(folder)


DEEP = '{"model_type": "qwen2", "a": ' + "[" * 10_000 + "]" * 10_000 + "}"
SMALL = '{"model_type": "qwen2", "a": ' + "[" * 100 + "]" * 100 + "}"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 6209726\n"
PAGE = "<!DOCTYPE html>\n<html><body>401 Unauthorized</body></html>"
REFUSED: list[tuple[str, Change, str, str]] = [
    # What stands in the place of a file.
    *((f"{name} is a pipe", kind(name, "pipe"), "irregular_file", name) for name in FILES),
    *((f"{name} is a folder", kind(name, "folder"), "irregular_file", name) for name in FILES),
    *((f"{name} dangles", kind(name, "nowhere"), "dangling_link", name) for name in FILES),
    *(
        (f"a pipe as {name}", kind(name, "pipe"), "irregular_file", name)
        for name in (TEMPLATE, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
    ),
    ("template is a folder", kind(TEMPLATE, "folder"), "irregular_file", TEMPLATE),
    ("template dangles", kind(TEMPLATE, "nowhere"), "dangling_link", TEMPLATE),
    ("a socket", kind(CONFIG, "socket"), "irregular_file", CONFIG),
    ("a link to a device", kind(CONFIG, "/dev/zero"), "link_outside", CONFIG),
    ("a link in a circle", kind(WEIGHTS, WEIGHTS), "dangling_link", WEIGHTS),
    ("a link to elsewhere", kind(CONFIG, "/etc/passwd"), "link_outside", CONFIG),
    # JSON.
    ("a list", put(CONFIG, "[]"), "no_object", CONFIG),
    ("null", put(CONFIG, "null"), "no_object", CONFIG),
    ("a text", put(CONFIG, '"qwen2"'), "no_object", CONFIG),
    ("deep", put(CONFIG, DEEP), "too_deep", CONFIG),
    ("less deep", put(CONFIG, SMALL), "too_deep", CONFIG),
    ("deep tokenizer", put(TOKENIZER, DEEP), "too_deep", TOKENIZER),
    ("cut off", put(CONFIG, '{"model_type": "qwen2", "hid'), "not_json", CONFIG),
    ("empty", put(CONFIG, ""), "empty_file", CONFIG),
    ("zeros", put(CONFIG, bytes(500)), "zeros", CONFIG),
    ("a page", put(CONFIG, PAGE), "web_page", CONFIG),
    ("UTF-16", put(CONFIG, '{"model_type": "qwen2"}'.encode("utf-16")), "byte_order_mark", CONFIG),
    ("a mark", put(CONFIG, b"\xef\xbb\xbf{}"), "byte_order_mark", CONFIG),
    ("Latin-1", put(CONFIG, b'{"a": "\xe9"}'), "not_utf8", CONFIG),
    ("long number", put(CONFIG, '{"a": ' + "9" * 5000 + "}"), "not_json", CONFIG),
    *(
        (f"{name} {state}", put(name, text), code, name)
        for name in ("generation_config.json", "tokenizer_config.json")
        for state, text, code in (("broken", "{", "not_json"), ("a list", "[1]", "no_object"))
    ),
    ("tokenizer broken", put(TOKENIZER, "{"), "not_json", TOKENIZER),
    ("tokenizer as a list", put(TOKENIZER, "[1]"), "other_form", TOKENIZER),
    ("settings of special tokens", put("special_tokens_map.json", "[]"), "no_object", "special_"),
    ("another's settings", put("hf_quant_config.json", "3"), "no_object", "hf_quant_config.json"),
    ("template in Latin-1", put(TEMPLATE, b"\xe9"), "not_utf8", TEMPLATE),
    # Values of config.json.
    ("no type", put(CONFIG, "{}"), "wrong_value", CONFIG),
    ("a type that is no name", setting(CONFIG, model_type="../qwen2"), "wrong_value", CONFIG),
    ("a type that is a list", setting(CONFIG, model_type=["qwen2"]), "wrong_value", CONFIG),
    ("no heads", setting(CONFIG, num_attention_heads=0), "wrong_value", CONFIG),
    ("heads below 0", setting(CONFIG, num_key_value_heads=-2), "wrong_value", CONFIG),
    ("a size as a text", setting(CONFIG, hidden_size="192"), "wrong_value", CONFIG),
    ("a size that is no whole number", setting(CONFIG, hidden_size=192.5), "wrong_value", CONFIG),
    ("true as a size", setting(CONFIG, num_hidden_layers=True), "wrong_value", CONFIG),
    ("a vocabulary of 1e12", setting(CONFIG, vocab_size=10**12), "wrong_value", CONFIG),
    ("a vocabulary of 1e9", setting(CONFIG, vocab_size=10**9), "other_vocabulary", CONFIG),
    ("1e9 layers", setting(CONFIG, num_hidden_layers=10**9), "too_few_layers", CONFIG),
    ("7 layers", setting(CONFIG, num_hidden_layers=7), "too_few_layers", CONFIG),
    ("1e9 experts", setting(CONFIG, num_experts=10**9), "wrong_value", CONFIG),
    ("another width", setting(CONFIG, hidden_size=256), "other_width", CONFIG),
    ("a base of 0", setting(CONFIG, rope_theta=0), "wrong_value", CONFIG),
    ("a base of NaN", setting(CONFIG, rope_theta=float("nan")), "wrong_value", CONFIG),
    ("an epsilon as a text", setting(CONFIG, rms_norm_eps="1e-6"), "wrong_value", CONFIG),
    ("a switch of 0", setting(CONFIG, rope_traditional=0), "wrong_value", CONFIG),
    ("a switch of null", setting(CONFIG, rope_traditional=None), "wrong_value", CONFIG),
    ("scaling as a list", setting(CONFIG, rope_scaling=[]), "wrong_value", CONFIG),
    ("few types of layers", setting(CONFIG, layer_types=["a"] * 5), "wrong_value", CONFIG),
    ("no bits", setting(CONFIG, quantization={"bits": 0}), "wrong_value", CONFIG),
    ("no size of groups", setting(CONFIG, quantization={"bits": 4}), "wrong_value", "group_size"),
    ("an end as a text", setting(CONFIG, eos_token_id=[6143, "end"]), "wrong_value", CONFIG),
    ("no end in a list", setting(CONFIG, eos_token_id=[None]), "wrong_value", CONFIG),
    ("an end below 0", setting(CONFIG, eos_token_id=-1), "wrong_value", CONFIG),
    (
        "an end that is an object",
        setting("generation_config.json", eos_token_id={"a": 1}),
        "wrong_value",
        "generation_config.json",
    ),
    ("code", setting(CONFIG, model_file="x.py"), "own_code", CONFIG),
    *(
        (f"{end} as the end", setting("tokenizer_config.json", eos_token=end), "wrong_value", "eos")
        for end in (3, {"text": "a"}, ["a"])
    ),
    # Headers of safetensors.
    ("empty weights", put(WEIGHTS, b""), "empty_file", WEIGHTS),
    ("a pointer", put(WEIGHTS, LFS), "lfs_pointer", WEIGHTS),
    ("a pointer's tokenizer", put(TOKENIZER, LFS), "lfs_pointer", TOKENIZER),
    ("a page as weights", put(WEIGHTS, PAGE), "web_page", WEIGHTS),
    ("weights of zeros", put(WEIGHTS, bytes(6209726)), "zeros", WEIGHTS),
    ("3 bytes", put(WEIGHTS, b"abc"), "weights_damaged", WEIGHTS),
    ("cut in half", weights(lambda all: all[: len(all) // 2]), "weights_damaged", WEIGHTS),
    ("cut by a byte", weights(lambda all: all[:-1]), "weights_damaged", WEIGHTS),
    ("cut in the header", weights(lambda all: all[:500]), "weights_damaged", WEIGHTS),
    ("longer", weights(lambda all: all + b"\0"), "weights_damaged", WEIGHTS),
    (
        "header beyond the file",
        weights(lambda all: struct.pack("<Q", 1 << 62) + all[8:]),
        "weights_damaged",
        WEIGHTS,
    ),
    ("no JSON", weights(lambda all: all[:8] + b"x" + all[9:]), "weights_damaged", WEIGHTS),
    ("a list as header", put(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "weights_damaged", WEIGHTS),
    (
        "a deep header",
        put(WEIGHTS, struct.pack("<Q", 20_000) + b"[" * 20_000),
        "weights_damaged",
        WEIGHTS,
    ),
    ("a weight twice", duplicated, "weights_damaged", WEIGHTS),
    (
        "data of numbers",
        header(lambda all: all.update(__metadata__={"a": 1})),
        "weights_damaged",
        "a",
    ),
    ("an entry as a text", header(lambda all: all.update(a="b")), "weights_damaged", WEIGHTS),
    ("unknown dtype", edit(dtype="F12"), "weights_damaged", WEIGHTS),
    ("dtype as a list", edit(dtype=["F16"]), "weights_damaged", WEIGHTS),
    ("another shape", edit(shape=[6144, 191]), "weights_damaged", WEIGHTS),
    ("a shape below 0", edit(shape=[-6144, -192]), "weights_damaged", WEIGHTS),
    ("a shape of texts", edit(shape=["6144", 192]), "weights_damaged", WEIGHTS),
    ("a huge shape", edit(shape=[1 << 40, 1 << 40]), "weights_damaged", WEIGHTS),
    ("offsets below 0", edit(data_offsets=[-10, 2359286]), "weights_damaged", WEIGHTS),
    (
        "offsets beyond",
        edit(data_offsets=[1 << 40, (1 << 40) + 2359296]),
        "weights_damaged",
        WEIGHTS,
    ),
    ("offsets backwards", edit(data_offsets=[2359296, 0]), "weights_damaged", WEIGHTS),
    ("one offset", edit(data_offsets=[0]), "weights_damaged", WEIGHTS),
    ("overlapping", header(swap), "weights_damaged", WEIGHTS),
    ("a scalar head", edit(shape=[], data_offsets=[0, 2]), "weights_damaged", WEIGHTS),
    ("a flat embedding", edit(shape=[6144 * 192]), "no_matrix", WEIGHTS),
    ("turned", edit(shape=[192, 6144]), "other_vocabulary", CONFIG),
    # Several files.
    ("a shard is missing", shards(keep=1), "missing_shard", "model-00002-of-00002.safetensors"),
    (
        "a shard is missing without an index",
        together(shards(keep=1), lambda folder: (folder / looks.INDEX).unlink()),
        "missing_shard",
        "model-00002-of-00002.safetensors",
    ),
    ("index outside", shards({EMBEDDING: "../model.safetensors"}), "index_outside", looks.INDEX),
    ("index at a root", shards({EMBEDDING: "/etc/passwd"}), "index_outside", looks.INDEX),
    ("index of a number", shards({EMBEDDING: 3}), "index_outside", looks.INDEX),  # type: ignore[dict-item]
    (
        "index of another shard",
        shards({EMBEDDING: "model-00001-of-00002.safetensors"}),
        "index_misfits",
        looks.INDEX,
    ),
    (
        "index of a weight that is not there",
        shards({"more": "model-00002-of-00002.safetensors"}),
        "index_misfits",
        looks.INDEX,
    ),
    ("an index without a map", put(looks.INDEX, "{}"), "index_without_map", looks.INDEX),
    (
        "an index with a name twice",
        put(looks.INDEX, '{"weight_map": {"a": "model.safetensors", "a": "model-2.safetensors"}}'),
        "not_json",
        looks.INDEX,
    ),
    (
        "two models",
        lambda folder: os.link(folder / WEIGHTS, folder / "model-copy.safetensors"),
        "weight_twice",
        WEIGHTS,
    ),
    # The tokenizer.
    ("no list of tokens", setting(TOKENIZER, added_tokens=None), "other_form", TOKENIZER),
    ("a vocabulary of texts", vocabulary(a="b"), "other_form", TOKENIZER),
    ("an id below 0", vocabulary(a=-1), "other_form", TOKENIZER),
    ("a plain token beyond the rows", vocabulary(new=6144), "tokens_beyond_rows", "6144"),
    (
        "an added token beyond the rows",
        added(id=6144, content="<new>", special=False),
        "tokens_beyond_rows",
        "6144",
    ),
    (
        "the end beyond the rows",
        together(
            added(id=7000, content="<end>", special=True),
            setting("tokenizer_config.json", eos_token="<end>"),
        ),
        "tokens_beyond_rows",
        "7000",
    ),
    (
        "settings with a token beyond the rows",
        setting("tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<new>"}}),
        "tokens_beyond_rows",
        "9999",
    ),
]


@pytest.mark.parametrize(
    ("change", "code", "named"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED]
)
def test_each_fault_is_a_line_with_its_file(
    tiny: Path, tmp_path: Path, change: Change, code: str, named: str
) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError) as caught:
        inspect_folder(folder)
    assert caught.value.code == f"model.{code}", caught.value
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700
    for read in (load_tokenizer, load_model):  # they look as well
        with refused(f"model.{code}"):
            read(folder)


def as_cache(folder: Path) -> Path:
    """Turn a folder into a snapshot in a hub's cache."""
    repo = folder.parent / "models--team--tiny"
    snapshot = repo / "snapshots" / ("1" * 40)
    shutil.move(folder, repo / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def as_dvc_links(folder: Path) -> Path:
    """Turn files into links to a cache of DVC, as its cache type symlink makes them."""
    for number, path in enumerate(sorted(folder.iterdir())):
        cached = folder.parent / f".dvc/cache/files/md5/{number:02x}/{'0' * 30}"
        cached.parent.mkdir(parents=True)
        path.rename(cached)
        path.symlink_to(cached)
    return folder


def as_link(folder: Path) -> Path:
    link = folder.parent / "link"
    link.symlink_to(folder)
    return link


def with_links_inside(folder: Path) -> Path:
    (folder / "parts").mkdir()
    (folder / WEIGHTS).rename(folder / "parts" / "weights")
    (folder / WEIGHTS).symlink_to("parts/weights")
    return folder


def with_shards(folder: Path) -> Path:
    shards()(folder)
    return folder


def with_placeholder(folder: Path) -> Path:
    """Add a special token without a row that no text needs, as Gemma 3's tokenizer has one."""
    added(id=6144, content="<image_soft_token>", special=True)(folder)
    return folder


def with_other_files(folder: Path) -> Path:
    """Add what repositories have besides a model, none of which is read."""
    for name in ("original", ".cache", "onnx"):
        (folder / name).mkdir()
    put("pytorch_model.bin", b"never read")(folder)
    os.mkfifo(folder / "notes.md")
    put("trainer_state.json", "[1, 2")(folder)
    return folder


@pytest.mark.parametrize(
    "arrange",
    [
        as_cache,
        as_dvc_links,
        as_link,
        with_links_inside,
        with_shards,
        with_placeholder,
        with_other_files,
    ],
)
def test_folders_as_they_are_found_are_read(tiny: Path, tmp_path: Path, arrange: Any) -> None:
    seen = inspect_folder(arrange(copy_model(tiny, tmp_path / "model")))
    assert (seen.rows, len(seen.weights)) == (6144, 74)
    assert seen.config == read_config(tiny)
    expected = {"<image_soft_token>": 6144} if arrange is with_placeholder else {}
    assert seen.without_rows == expected


def test_a_folder_is_looked_at_again_only_if_a_file_changed(tiny: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    assert inspect_folder(folder) is inspect_folder(folder)
    put(CONFIG, "[]")(folder)
    with refused("model.no_object"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "no_config"),
        (
            lambda folder: (folder / CONFIG).rename(folder / "adapter_config.json"),
            "adapters_folder",
        ),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.bin"), "no_weights"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "Model.safetensors"), "no_weights"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "model.safetensors.incomplete"),
            "no_weights",
        ),
    ],
)
def test_missing_files_are_named(tiny: Path, tmp_path: Path, change: Change, code: str) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    change(folder)
    with refused(f"model.{code}", folder=folder):
        resolve_source(str(folder), None)


@pytest.mark.parametrize(
    ("left", "code"),
    [
        ((), "model.no_tokenizer"),
        (("vocab.json",), "model.no_tokenizer"),
        (("tokenizer.model",), "chat.tokenizer_not_loaded"),  # one of SentencePiece, broken
    ],
)
def test_a_missing_tokenizer_is_named(
    tiny: Path, tmp_path: Path, left: tuple[str, ...], code: str
) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    (folder / TOKENIZER).unlink()
    for name in left:
        put(name, '{"a": 1}')(folder)
    with refused(code, folder=folder) as caught:
        load_tokenizer(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_texts_are_neither_cut_nor_padded_as_a_training_left_it(tiny: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    (folder / TEMPLATE).unlink()  # as of a base model
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    token = {"pad_id": 6141, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    setting(TOKENIZER, truncation=cut, padding=padding | token)(folder)
    texts = [RenderedText(text, None) for text in ("a", "a much longer text of many words")]
    whole = [encoding.ids for encoding in encode_texts(texts, load_tokenizer(tiny))]
    assert [encoding.ids for encoding in encode_texts(texts, load_tokenizer(folder))] == whole


def test_a_token_that_each_text_begins_with_has_a_row(tiny: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny, tmp_path / "model")
    first, text = ({"id": "<s>", "type_id": 0}, {"id": "A", "type_id": 0})
    beginning = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": first}, {"Sequence": text}],
        "pair": [{"Sequence": text}, {"Sequence": text | {"id": "B"}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [6144], "tokens": ["<s>"]}},
    }
    setting(TOKENIZER, post_processor=beginning)(folder)
    with refused("model.tokens_beyond_rows", id=6144, rows=6144):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("path", "revision", "code"),
    [
        ("", None, "no_name"),
        ("  ", None, "no_name"),
        ("models/a\0b", None, "no_name"),
        ("models/a\nb", None, "no_name"),
        ("x" * 5000, None, "name_too_long"),
        ("a/" * 2500, None, "name_too_long"),
        ("模" * 100, None, "name_too_long"),
        ("x/" + "y" * 200, None, "repository_too_long"),
        ("~nobody-of-this-name/model", None, "no_path"),
        ("nowhere", None, "no_folder"),
        ("/dev/null", None, "file_for_folder"),
        ("models/tiny/config.json", None, "file_for_folder"),
        ("team/model", "../../etc", "no_revision_name"),
        ("team/model", "r" * 300, "no_revision_name"),
        ("team/model", "", "no_revision_name"),
    ],
)
def test_names_that_name_no_model(
    repo: Path, monkeypatch: pytest.MonkeyPatch, path: str, revision: str | None, code: str
) -> None:
    monkeypatch.chdir(repo)
    with refused(f"model.{code}") as caught:
        find_model(path, revision)
    assert len(str(caught.value)) < 400


def test_a_folder_with_a_pattern_in_its_path_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny, tmp_path / "my[model]")
    with refused("model.pattern_in_path", folder=folder):
        inspect_folder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tiny: Path, tmp_path: Path, value: float) -> None:
    import numpy as np

    folder = copy_model(tiny, tmp_path / "model")
    weights(lambda all: all[:-2] + np.float16(value).tobytes())(folder)
    with refused("model.not_finite", count=1) as caught:
        load_model(folder)
    assert "model." in caught.value.facts["name"]
