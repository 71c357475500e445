"""The rules for values: the limits of each, those that exclude each other, those of the model."""

import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from math import inf, isfinite
from pathlib import PurePath
from typing import Any

from athanor import console
from athanor.config.schema import TrainConfig, all_keys, key_type
from athanor.errors import Problem, UserError
from athanor.model.config_values import SECTIONS, count_experts, is_quantized

METHODS = ("lora", "dora", "full")
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine")
KEEP = ("best", "last")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
# A name in MLflow's registry, without characters that have a meaning in its paths and searches.
MODEL_NAME = re.compile(r"[\w.-]{1,250}")
# What becomes of system messages: they stay, or are put into the questions after them.
KEEP_SYSTEM, MERGE = "keep", "merge"
END_TOKENS = ("auto", "template", "base", "train")
# The keys of config.json for the widths of layers that get adapters.
WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size")


class ConfigError(UserError):
    """One or more problems of a configuration, in the order in which they were found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(
            "config.problems",
            count=console.counted(len(problems), "problem"),
            problems="\n  ".join(map(str, problems)),
        )
        self.problems = problems


def rule(
    code: str, keys: tuple[str, ...], holds: Callable[[Any], bool], **facts: Any
) -> Callable[[dict[str, Any]], list[Problem]]:
    """Return a check of values by key: a problem for each of `keys` that breaks it and is not null.

    `facts` are those of its message, besides the value.
    """
    return lambda values: [
        Problem(code, key, value=values[key], **facts)
        for key in keys
        if values.get(key) is not None and not holds(values[key])
    ]


def keys_of(*types: Any) -> tuple[str, ...]:
    """Return the dotted keys of these types, or of these types or null."""
    return tuple(key for key in all_keys() if key_type(key) in [*types, *(t | None for t in types)])


def keys_ending(section: str, *suffixes: str) -> tuple[str, ...]:
    """Return the dotted keys of a section that end so."""
    return tuple(
        key for key in all_keys() if key.startswith(f"{section}.") and key.endswith(suffixes)
    )


def is_path(text: str) -> bool:
    """Return whether every system can have a file of this path: its limits are in bytes."""
    return len(text.encode()) < 4096 and all(
        len(part.encode()) < 256 for part in PurePath(text).parts
    )


def is_date(text: str) -> bool:
    """Return whether a text is a date of the calendar, written as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def at_most(most: float, value: float) -> bool:
    """Return whether a number is at most so far from 0."""
    return abs(value) <= most


# Keys that count something, with their largest values: mlx and NumPy index with 32 bits; more
# copies, threads or tokens than these are a slip of the finger that would never end.
COUNTS = dict.fromkeys(keys_of(int), 2**31 - 1) | {
    "seed": 2**64 - 1,
    "data.augment_seed": 2**64 - 1,
    "data.augment_copies": 1000,
    "train.blas_threads": 1024,
    "train.iters": 1_000_000_000,
    "test.max_tokens": 1_000_000,
}
FLOAT32 = 3.4e38
SIZES = dict.fromkeys(keys_of(float), FLOAT32) | {
    "train.activations_memory": 1e6,
    "train.activations_disk": 1e6,
}


RULES = (
    rule(
        "config.empty_text",
        (
            "model.path",
            "train.resume_adapter_file",
            *keys_ending("data", "_feature"),
            "data.label_prompt",
        ),
        bool,
    ),
    rule("config.no_share", keys_ending("data", "_size", "_share"), lambda v: 0 <= v <= 1),
    rule("config.too_large", ("fuse.max_difference", "train.dropout"), lambda v: 0 <= v < 1),
    rule("config.no_date", ("data.date",), is_date),
    rule("config.leak_similarity", ("data.leak_similarity",), lambda v: 0.5 <= v <= 1),
    *(
        rule("config.not_an_option", (key,), options.__contains__, options=options)
        for key, options in {
            "data.system": (KEEP_SYSTEM, MERGE),
            "train.method": METHODS,
            "train.optimizer": OPTIMIZERS,
            "train.lr_schedule": SCHEDULES,
            "train.keep": KEEP,
            "train.end_token": END_TOKENS,
        }.items()
    ),
    rule(
        "config.not_an_option",
        ("fuse.gguf",),
        GGUF_DTYPES.__contains__,
        options=(*GGUF_DTYPES, "null"),
    ),
    rule(
        "config.registered_name",
        ("fuse.registered_model_name",),
        lambda v: MODEL_NAME.fullmatch(v) is not None,
    ),
    rule(
        "config.no_count",
        ("train.num_layers", "train.val_batches", "test.max_rows"),
        lambda v: v == -1 or v >= 1,
    ),
    rule(
        "config.too_small",
        ("seed", "train.warmup", "data.augment_copies", "data.augment_seed"),
        lambda v: v >= 0,
        least=0,
    ),
    rule(
        "config.too_small",
        (
            "data.article_tokens",
            "data.max_row_bytes",
            "data.max_file_bytes",
            "train.rank",
            "train.batch_size",
            "train.iters",
            "train.epochs",
            "train.steps_per_report",
            "train.steps_per_eval",
            "train.patience",
            "train.save_every",
            "train.grad_accumulation_steps",
            "train.blas_threads",
            "test.batch_size",
            "test.max_tokens",
        ),
        lambda v: v >= 1,
        least=1,
    ),
    rule("config.too_small", ("train.max_seq_length",), lambda v: v >= 2, least=2),
    rule(
        "config.not_positive",
        ("train.learning_rate", "train.scale", "train.max_grad_norm"),
        lambda v: 0 < v < inf,
    ),
    rule(
        "config.negative",
        ("train.lr_end", "train.activations_memory", "train.activations_disk", "test.temp"),
        lambda v: 0 <= v < inf,
    ),
    # The rules of types come last: a key's first problem alone is reported.
    rule("config.path_too_long", ("model.path", "data.dataset"), is_path),
    rule("config.not_finite", keys_of(float), isfinite),
    rule("config.below_float32", keys_of(float), lambda v: v == 0 or abs(v) >= 1e-38),
    *(
        rule("config.beyond", (key,), partial(at_most, most), most=most)
        for key, most in {**COUNTS, **SIZES}.items()
    ),
)


def impossible_values(values: dict[str, Any]) -> Iterator[Problem]:
    """Yield the first problem of each value that breaks a rule, and values that cannot go together.

    `values` maps dotted keys to values of the right type; keys without a value are skipped.
    """
    broken: dict[str, Problem] = {}
    for check in RULES:
        for problem in check(values):
            broken.setdefault(problem.key, problem)
    yield from broken.values()
    values = {key: value for key, value in values.items() if key not in broken}
    share = values.get("data.valid_size", 0) + values.get("data.test_size", 0)
    if share >= 1:
        yield Problem("config.no_rows_left", "data.valid_size", share=share)
    name = values.get("fuse.registered_model_name")
    if name is not None and values.get("fuse.log_model") is False:
        yield Problem("config.name_without_model", "fuse.log_model", name=name)
    if values.get("train.end_token") == "train" and values.get("train.method", "lora") != "lora":
        yield Problem("config.end_needs_lora", "train.end_token", method=values["train.method"])
    if {"train.iters", "train.epochs"} <= values.keys():
        iters, epochs = values["train.iters"], values["train.epochs"]
        if iters is None and epochs is None:
            yield Problem("config.no_length", "train.epochs")
        elif iters is not None and epochs is not None:
            yield Problem("config.two_lengths", "train.epochs", iters=iters, epochs=epochs)


def training_misfits(config: dict[str, Any], train: TrainConfig) -> Iterator[Problem]:
    """Yield the keys that the model of this config.json cannot be trained with."""
    # Models that also see or hear have a section for their language model.
    sizes = next((config[key] for key in SECTIONS if config.get(key)), config)
    layers = sizes.get("num_hidden_layers")
    if isinstance(layers, int) and train.num_layers > layers:
        yield Problem(
            "config.too_many_layers", "train.num_layers", layers=layers, value=train.num_layers
        )
    widths = {
        name: sizes[name] for name in WIDTHS if isinstance(sizes.get(name), int) and sizes[name] > 0
    }
    if widths and train.method != "full":
        name = min(widths, key=lambda name: widths[name])
        if train.rank > widths[name]:
            yield Problem(
                "config.rank_above_width",
                "train.rank",
                width=widths[name],
                name=name,
                value=train.rank,
            )
    if train.method == "full" and is_quantized(config):
        yield Problem("config.quantized", "train.method")
    if train.method == "dora" and (experts := count_experts(config)) > 1:
        yield Problem("config.dora_of_experts", "train.method", experts=experts)
