"""Copies of models/tiny with one thing wrong in each; a training's first iteration as the work."""

import importlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from support.model_folders import copy_model, kind, put, setting, shards

REPO = Path(__file__).parents[2]
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SETTINGS = (CONFIG, "generation_config.json", "tokenizer_config.json")
READ = (*SETTINGS, WEIGHTS, TOKENIZER, "chat_template.jinja")
ALSO_READ = ("added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt")
ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 2**31, 2**63, 10**12, 10**400, 1e9, -1e-9, 1e308, 0.5),
    *(float("nan"), float("inf"), None, True, False, "", "192", "a" * 100_000, "\0", "\ud800"),
    *([], [1], ["a"], [[[]]], {}, {"a": 1}, {"type": "linear"}, {"rope_type": "yarn"}, [None] * 6),
)
TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ messages[99].content }}",
    "{% if %}",
    "{{ raise_exception('no') }}",
    "{{ messages }}",
    "",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 10**10**10 }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
)


class Planted:
    """An object whose unpickling touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def load() -> None:
    """Import all that a training needs; nothing is computed before a fork."""
    for name in (
        *("athanor", "mlx.optimizers", "mlx_lm.utils", "mlx_lm.models.qwen2"),
        *("transformers", "transformers.models.qwen2", "athanor.chat.contract"),
        *("athanor.chat.load", "athanor.compute.forward", "athanor.train.learner"),
        *("athanor.compute.optimizers", "athanor.config.data_check"),
    ):
        importlib.import_module(name)
    from transformers import PreTrainedTokenizerFast  # noqa: F401  # imported when it is asked for


def work(folder: Path) -> None:
    """Look at the model, read its tokenizer and template, load it, and train one iteration."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from athanor.chat.base import load_with_tokenizer
    from athanor.chat.contract import resolve_contract
    from athanor.chat.conversation import chat
    from athanor.chat.model_check import refuse_model_misfits
    from athanor.chat.templates import render_row
    from athanor.chat.tokens import tokenize_rows
    from athanor.compute.forward import Forward, trainable_weights
    from athanor.config.compose import compose_config
    from athanor.errors import UserError
    from athanor.model.adapters import make_trainable
    from athanor.model.source import resolve_source
    from athanor.train.learner import Learner

    os.chdir(folder)
    config = compose_config(REPO / "conf", [f"model.path={folder / 'model'}", "train.num_layers=1"])
    source = resolve_source(config.model.path, None)
    refuse_model_misfits(config, source.folder())
    model, tokenizer = load_with_tokenizer(source.folder())
    contract = resolve_contract(source.folder(), tokenizer, "auto")
    rows = [chat(("user", f"Lamp {number}?"), ("assistant", f"No {number}.")) for number in (1, 2)]
    try:
        for row in rows:
            render_row(row, tokenizer)
    except Exception as error:  # prepare reports rows that a template refuses
        raise UserError("chat.faults", model=folder, faults=[error]) from error
    texts = tokenize_rows(rows, tokenizer, True, 64, contract.end)
    if not texts:
        raise UserError("chat.faults", model=folder, faults=["the template writes no row"])
    make_trainable(model, config.train, 0)
    forward = Forward.from_model(model, texts)
    learner = Learner(trainable_weights(model), optim.Adam(learning_rate=1e-3), max_grad_norm=1.0)
    loss, gradient = forward.loss_and_gradient(learner.weights, forward.prepare(texts))
    learner.add(gradient)
    learner.update(mx.array(0.1))
    mx.eval(learner.weights, loss)


def alter(folder: Path, chance: Random, canary: Path) -> str:
    """Copy the model to `folder`/model and alter it; return what was done."""
    model = copy_model(REPO / "models/tiny", folder / "model")
    return chance.choice(ALTERATIONS)(model, chance, canary)


def _flip(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice(READ)
    content = bytearray((model / name).read_bytes())
    # Of the weights mostly the header, of which everything else depends.
    end = 9000 if name == WEIGHTS and chance.random() < 0.8 else len(content)
    places = [chance.randrange(min(end, len(content))) for _ in range(chance.randint(1, 8))]
    for place in places:
        content[place] ^= 1 << chance.randrange(8)
    put(name, bytes(content))(model)
    return f"bytes {places} of {name} flipped"


def _cut(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice(READ)
    content = (model / name).read_bytes()
    place = chance.randrange(len(content))
    after = chance.choice((b"", bytes(len(content) - place), b"\n", content[:100]))
    put(name, content[:place] + after)(model)
    return f"{name} cut at {place}, then {len(after)} other bytes"


def _replace(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice((*READ, *ALSO_READ))
    targets = ("/dev/zero", "/dev/stdin", "/etc/passwd", name, "..", "nowhere", "/", CONFIG)
    of = chance.choice(("folder", "pipe", "socket", chance.choice(targets)))
    kind(name, of)(model)
    return f"{name} replaced by {of}"


def _swap(model: Path, chance: Random, canary: Path) -> str:
    first, second = chance.sample(READ, 2)
    (model / first).rename(model / "other")
    (model / second).rename(model / first)
    (model / "other").rename(model / second)
    return f"{first} and {second} swapped"


def _remove(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice(READ)
    to = chance.choice(
        (None, name.upper(), f"{name}.incomplete", f"model-{name}", "model-2.safetensors")
    )
    if to is None:
        (model / name).unlink()
    else:
        (model / name).rename(model / to)
    return f"{name} renamed {to}"


def _change_value(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice((CONFIG, CONFIG, CONFIG, *SETTINGS, TOKENIZER))
    settings = json.loads((model / name).read_text(encoding="utf-8"))
    place, path = settings, name
    while True:  # down to a random value
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return f"{path} is empty"
        key = chance.choice(keys)
        path = f"{path}.{key}"
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            break
        place = inner
    value = chance.choice(ODD)
    if chance.random() < 0.1:
        del place[key]
    else:
        place[key] = value
    put(name, json.dumps(settings))(model)
    return f"{path} = {str(value)[:40]!r}"


def _add_value(model: Path, chance: Random, canary: Path) -> str:
    name, keys = chance.choice(
        (
            (
                CONFIG,
                ("rope_scaling", "quantization", "quantization_config", "text_config", "head_dim"),
            ),
            (CONFIG, ("layer_types", "sliding_window", "num_experts", "use_sliding_window")),
            (CONFIG, ("rope_parameters", "quantize_activations", "tie_word_embeddings")),
            ("tokenizer_config.json", ("added_tokens_decoder", "chat_template", "bos_token")),
            (
                "tokenizer_config.json",
                ("chat_template_type", "tool_parser_type", "tokenizer_class"),
            ),
            ("special_tokens_map.json", ("eos_token", "bos_token", "additional_special_tokens")),
            ("added_tokens.json", ("<a>", "")),
            ("generation_config.json", ("eos_token_id", "pad_token_id")),
            ("model.safetensors.index.json", ("weight_map", "metadata")),
        )
    )
    key, value = chance.choice(keys), chance.choice(ODD)
    setting(name, **{key: value})(model)
    return f"{name}: {key} = {str(value)[:40]!r}"


def _swell(model: Path, chance: Random, canary: Path) -> str:
    name = chance.choice((*SETTINGS, TOKENIZER, *ALSO_READ, "model.safetensors.index.json"))
    if chance.random() < 0.5:
        depth = chance.choice((65, 1000, 10_000, 200_000))
        opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
        text = f'{{"a": {opening * depth}1{closing * depth}}}'
        put(name, text)(model)
        return f"{name} nested {depth} deep"
    size = chance.choice((10**5, 10**7, 4 * 10**7))
    text = chance.choice((" ", "1,", '"a",'))
    put(name, '{"a": [' + text * (size // len(text)) + "1]}")(model)
    return f"{name} of {size} bytes of {text!r}"


def _change_header(model: Path, chance: Random, canary: Path) -> str:
    content = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    key = chance.choice(("dtype", "shape", "data_offsets", ""))
    value = chance.choice((*ODD, "F32", "U8", "BOOL", [3, 4], [0, 0], [-5, 5], [2**62, 2**62]))
    if key:
        header[name][key] = value
    else:
        header[name if chance.random() < 0.5 else "extra.weight"] = value
    text = json.dumps(header).encode()
    start = chance.choice((len(text), len(text), len(text), len(text) - 1, 0, 2**40, 2**63))
    put(WEIGHTS, struct.pack("<Q", start) + text + content[8 + length :])(model)
    return f"header of {start}: {name} {key} = {str(value)[:40]!r}"


def _spoil_values(model: Path, chance: Random, canary: Path) -> str:
    content = bytearray((model / WEIGHTS).read_bytes())
    place = 10_000 + 2 * chance.randrange((len(content) - 10_000) // 2)
    size = chance.choice((2, 1000, len(content) - place))
    size = min(size, len(content) - place)
    byte = chance.choice((0xFF, 0x7C, 0x00, 0x7B))
    content[place : place + size] = bytes([byte]) * size
    put(WEIGHTS, bytes(content))(model)
    return f"{size} bytes of weights from {place} are {byte:#x}"


def _cut_into_shards(model: Path, chance: Random, canary: Path) -> str:
    name, file = "model.norm.weight", chance.choice(("../a", "/etc/passwd", "x", 3, None, WEIGHTS))
    keep = chance.choice((1, 2))
    shards({name: file} if chance.random() < 0.5 else {}, keep)(model)  # type: ignore[dict-item]
    return f"{keep} of 2 shards, with {name} in {file}"


def _plant(model: Path, chance: Random, canary: Path) -> str:
    code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()"
    for name in ("modeling_tiny.py", "qwen2.py", "custom.py", "tokenization_tiny.py", "json.py"):
        put(name, f"{code}\nModel = ModelArgs = T = None\n")(model)
    name, value = chance.choice(
        (
            (CONFIG, {"model_file": "custom.py"}),
            (CONFIG, {"auto_map": {"AutoModelForCausalLM": "modeling_tiny.Model"}}),
            (
                "tokenizer_config.json",
                {"auto_map": {"AutoTokenizer": ["tokenization_tiny.T", None]}},
            ),
            ("tokenizer_config.json", {"tokenizer_class": "custom.T"}),
            ("tokenizer_config.json", {"chat_template_type": "../../custom"}),
            ("tokenizer_config.json", {"tool_parser_type": "custom"}),
            (CONFIG, {"model_type": "custom"}),
            (CONFIG, {"quantization_config": {"quant_method": "custom"}}),
        )
    )
    if chance.random() < 0.3:
        put(chance.choice((WEIGHTS, "pytorch_model.bin")), pickle.dumps(Planted(canary)))(model)
        return "a pickle that runs a command"
    if chance.random() < 0.3:
        put("chat_template.jinja", _escape(canary))(model)
        return "a template that leaves its sandbox"
    setting(name, **value)(model)
    return f"{name} names code: {value}"


def _escape(canary: Path) -> str:
    return (
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if c.__name__ == 'Popen' %}{{ c(['touch', '" + str(canary) + "']) }}{% endif %}"
        "{% endfor %}{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    )


def _template(model: Path, chance: Random, canary: Path) -> str:
    text = chance.choice(TEMPLATES)
    if chance.random() < 0.5:
        put("chat_template.jinja", text)(model)
    else:
        (model / "chat_template.jinja").unlink()
        setting("tokenizer_config.json", chat_template=text)(model)
    return f"the template {text}"


ALTERATIONS: tuple[Callable[[Path, Random, Path], str], ...] = (
    *(_flip, _flip, _cut, _replace, _replace, _swap, _remove, _change_value, _change_value),
    *(_change_value, _add_value, _add_value, _swell, _change_header, _change_header),
    *(_spoil_values, _cut_into_shards, _plant, _template),
)
