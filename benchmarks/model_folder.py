"""The look at a model's folder: how long it takes, on a folder of Qwen2.5-7B's shape.

    uv run python benchmarks/model_folder.py [--shards 8]

Makes a folder of Qwen2.5-7B's shape, a layer in each shard, in the temporary folder: its weights
are sparse files, which take no room on the disk. The tokenizer has as many tokens as Qwen2.5's.
"""

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

from athanor.model.folder import INDEX, inspect_folder

WIDTH, INNER, KEYS, TOKENS, ADDED = 3584, 18_944, 512, 151_643, 22
LAYER = {
    "input_layernorm.weight": [WIDTH],
    "post_attention_layernorm.weight": [WIDTH],
    "self_attn.q_proj.weight": [WIDTH, WIDTH],
    "self_attn.q_proj.bias": [WIDTH],
    "self_attn.k_proj.weight": [KEYS, WIDTH],
    "self_attn.k_proj.bias": [KEYS],
    "self_attn.v_proj.weight": [KEYS, WIDTH],
    "self_attn.v_proj.bias": [KEYS],
    "self_attn.o_proj.weight": [WIDTH, WIDTH],
    "mlp.gate_proj.weight": [INNER, WIDTH],
    "mlp.up_proj.weight": [INNER, WIDTH],
    "mlp.down_proj.weight": [WIDTH, INNER],
}


def write_weights(path: Path, shapes: dict[str, list[int]]) -> int:
    """Write a sparse safetensors file of bfloat16 weights, and return its size in bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, size = end, 2
        for dimension in shape:
            size *= dimension
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def write_model(folder: Path, shards: int) -> int:
    """Write a folder of this many layers and shards, and return the bytes of its weights."""
    size = 0
    index: dict[str, str] = {}
    for number in range(shards):
        shapes = {f"model.layers.{number}.{name}": shape for name, shape in LAYER.items()}
        if number == 0:
            shapes |= {"model.embed_tokens.weight": [152_064, WIDTH]}
        if number == shards - 1:
            shapes |= {"model.norm.weight": [WIDTH], "lm_head.weight": [152_064, WIDTH]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        size += write_weights(folder / file, shapes)
        index |= dict.fromkeys(shapes, file)
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": shards,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 151_645,
    }
    vocabulary = {f"token{number:06}": number for number in range(TOKENS)}
    added = [
        {"id": TOKENS + number, "content": f"<|added{number}|>", "special": True}
        for number in range(ADDED)
    ]
    merges = [[f"to{number:06}", "ken"] for number in range(TOKENS)]
    tokenizer = {"added_tokens": added, "model": {"vocab": vocabulary, "merges": merges}}
    for name, value in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        (INDEX, {"weight_map": index}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8, help="files of weights, a layer in each")
    shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder, shards)
        tokenizer = (folder / "tokenizer.json").stat().st_size
        print(f"{shards} shards of {size / 1e9:.1f} GB; tokenizer.json of {tokenizer / 1e6:.1f} MB")
        for label, prepare in (
            ("with its tokenizer", lambda: None),
            ("again, nothing changed", lambda: None),
            ("without tokenizer.json", (folder / "tokenizer.json").unlink),
        ):
            prepare()
            begin, used = time.perf_counter(), time.process_time()
            seen = inspect_folder(folder)
            seconds, used = time.perf_counter() - begin, time.process_time() - used
            print(
                f"{seconds * 1000:7.1f} ms ({used * 1000:.1f} of the CPU)  {label}: "
                f"{len(seen.weights)} weights"
            )


if __name__ == "__main__":
    main()
