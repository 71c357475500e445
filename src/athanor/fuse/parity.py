"""Whether a fused model is the model that was trained: the gate that stage `fuse` has to pass.

Both are asked the same questions. They have to read the same tokens and to stop at the same ones.
The logits that they give, along the ends of the questions and the trained model's greedy answers,
may differ by a share of what the training itself changed there, plus what rounding to the stored
dtype does. Each weight has to be the trained one, as well as the form that it is stored in can hold
it: this sees what few questions show, and says why the gate is shut.

Reads a base's folder, its adapters and a fused folder. One model is in memory at a time.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from athanor import files
from athanor.chat import templates
from athanor.chat.load import load_tokenizer, load_with_tokenizer
from athanor.chat.templates import Message
from athanor.compute import evaluation
from athanor.device.backend import on_cpu
from athanor.errors import UserError
from athanor.model.adapters import load_adapters
from athanor.model.source import read_config, stated_stop_ids
from athanor.model.stored import read_dtypes

# At most so many tokens of a question, of a plain text that is one, and of a greedy answer; and how
# many last positions of both are compared: with 150,000 tokens each is 0.6 MB of logits.
LONGEST, TEXT, ANSWER, POSITIONS = 512, 64, 24, 32
# Rounding may move a logit by so many of the stored dtype's steps, which are its epsilon times the
# largest logit: where the weights alone are rounded, as on a CPU, which computes in float32, and
# where every result is. Measured: at most 0.7 of them (the tiny model and a random one of 0.5 B, in
# float16 and bfloat16), and 5.3 (the tiny one, quantized, computed in half precision).
STEPS_OF_WEIGHTS, STEPS_OF_RESULTS = 2.0, 8.0
# The least epsilon: of float32, whose own is smaller than what the order of a sum does.
FLOAT32 = 1e-5

# Values of a weight that are computed with at a time.
VALUES = 1 << 24

FIXED = [
    [{"role": "user", "content": "你好，请用一句话介绍你自己。"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "def add(a: int, b: int) -> int:\n    return a + b  # 是什么？"}],
    [{"role": "user", "content": "🙂🚀 1 + 1 = ?"}],
    [
        {"role": "system", "content": "简短回答。"},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "再说一遍。"},
    ],
]


@dataclass(frozen=True)
class Said:
    """What the trained model makes of one question.

    `ids` are the question's tokens, `asked` in number, and then those of its greedy answer;
    `logits` are float32, [the last POSITIONS of `ids` at most, vocabulary].
    """

    question: str
    ids: list[int]
    asked: int
    logits: np.ndarray


@dataclass(frozen=True)
class Trained:
    """The trained model, as far as fused ones are held against it.

    `rows` are all questions, those that it is not asked included; `change` is the largest
    difference of logits between it and its base, at the positions that are compared.
    """

    base: Path
    adapters: Path
    rows: list[Message]
    said: list[Said]
    change: float


@dataclass(frozen=True)
class Answer:
    """Whether the fused model's greedy answer is the trained one's.

    `parts_at` is the first token of the answer that is another one, from 0, and None where all are
    equal; `tie` says that the trained model prefers its own token there by less than `tolerance`.
    """

    question: str
    parts_at: int | None
    tie: bool


@dataclass(frozen=True)
class Report:
    """What the gate found. Differences are of logits, the largest at any compared position.

    `share_lost` is `difference` in shares of `change`, which is what the training did; None where
    the training did less than `rounding`. `cause` says why the gate is shut; None where it is open.
    """

    difference: float
    change: float
    share_lost: float | None
    rounding: float
    tolerance: float
    positions: int
    answers: list[Answer]
    cause: str | None

    def summary(self) -> str:
        """The figures in a line."""
        share = "" if self.share_lost is None else f", {self.share_lost:.2%} of the training's"
        same = sum(answer.parts_at is None for answer in self.answers)
        ties = sum(answer.tie for answer in self.answers)
        tied = f" ({ties} part at a tie)" if ties else ""
        return (
            f"largest logit difference {self.difference:.3g}{share} (allowed: {self.tolerance:.3g})"
            f", {same} of {len(self.answers)} greedy answers equal{tied}"
        )


def ask(base: Path, adapters: Path, rows: list[Message]) -> Trained:
    """Asks the trained model, `base` with `adapters` on, the FIXED questions and those of `rows`.

    Questions that its template refuses or that are longer than LONGEST tokens are not asked; of
    plain text, the first tokens are the question.

    Raises:
        UserError: where the adapters make no finite logits.
    """
    model, tokenizer = load_with_tokenizer(base)
    load_adapters(model, adapters)
    fixed: list[Message] = [
        {"messages": [*turns, {"role": "assistant", "content": ""}]}
        if tokenizer.has_chat_template
        else {"text": turns[-1]["content"]}
        for turns in FIXED
    ]
    rows = [*fixed, *rows]
    read = zip(rows, _read(rows, tokenizer), strict=True)
    asked = [(row, ids) for row, ids in read if 0 < len(ids) <= LONGEST]
    prompts = [ids for _, ids in asked]
    given = evaluation.generate_answers(
        model, tokenizer, prompts, max_tokens=ANSWER, batch_size=max(1, len(prompts))
    )
    said = []
    for (row, ids), answer in zip(asked, given, strict=True):
        logits = _logits(model, ids + answer.ids)
        said.append(Said(_question(row), ids + answer.ids, len(ids), logits))
    del model
    mx.clear_cache()
    model, _ = load_with_tokenizer(base)
    change = max((_largest(one.logits - _logits(model, one.ids)) for one in said), default=0.0)
    if not math.isfinite(change):
        raise UserError(
            f"{adapters}: with them the model of {base} answers with nan or inf; a training with "
            "a smaller train.learning_rate may not: `uv run dvc repro fuse` runs both"
        )
    return Trained(base, adapters, rows, said, change)


def compare(trained: Trained, folder: Path, max_difference: float) -> Report:
    """Holds the model in `folder`, as it is loaded from there, against the trained one.

    `max_difference` is the share of what the training changed in the logits that may be lost.

    Raises:
        UserError: where the folder can't be loaded.
    """
    model, tokenizer = load_with_tokenizer(folder)
    steps = STEPS_OF_WEIGHTS if on_cpu() else STEPS_OF_RESULTS
    largest = max((_largest(one.logits) for one in trained.said), default=0.0)
    rounding = steps * _epsilon(folder) * largest
    tolerance = max_difference * trained.change + rounding
    difference, positions, answers = 0.0, 0, []
    for one in trained.said:
        logits = _logits(model, one.ids)
        if logits.shape != one.logits.shape:
            difference = math.inf
            break
        difference = float(np.maximum(difference, _largest(logits - one.logits)))  # nan stays nan
        positions += len(logits)
        answers.append(_answer(one, logits, tolerance))
    del model
    mx.clear_cache()
    share = difference / trained.change if trained.change > rounding else None
    parted = any(answer.parts_at is not None and not answer.tie for answer in answers)
    cause = _misread(trained, folder, tokenizer) or _reconfigured(trained, folder)
    if cause is None:
        changes = list(_changes(trained, folder))
        cause = _damaged(changes)
        if cause is None and (parted or not difference <= tolerance):
            cause = _drowned(changes, share)
    return Report(difference, trained.change, share, rounding, tolerance, positions, answers, cause)


def _logits(model: nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [the last POSITIONS of ids at most, vocabulary], in one forward pass."""
    return np.array(model(mx.array(ids)[None])[0, -POSITIONS:].astype(mx.float32))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _epsilon(folder: Path) -> float:
    """The coarsest epsilon of the dtypes that a model's weights are stored in."""
    dtypes = read_dtypes(folder).values()
    return max([FLOAT32, *(mx.finfo(one).eps for one in dtypes if mx.issubdtype(one, mx.floating))])


def _answer(one: Said, logits: np.ndarray, tolerance: float) -> Answer:
    """Where the fused model's greedy answer parts from the trained one's.

    Up to there both have read the same, so one pass along the trained one's answer shows it.
    """
    first = len(logits) - (len(one.ids) - one.asked) - 1
    own, tokens = one.logits[first:], logits[first:].argmax(axis=-1)
    parted = np.flatnonzero(own.argmax(axis=-1) != tokens)
    if not len(parted):
        return Answer(one.question, None, False)
    at = int(parted[0])
    margin = own[at].max() - own[at][tokens[at]]
    return Answer(one.question, at, bool(margin <= tolerance))


def _question(row: Message) -> str:
    """A question in words, for people."""
    if "text" in row:
        return str(row["text"])[:40]
    asked = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    return str(asked[-1])[:40] if asked else ""


def _read(rows: list[Message], tokenizer: TokenizerWrapper) -> list[list[int]]:
    """Each question's tokens; none of a question that the template refuses."""
    read = []
    for row in rows:
        try:
            if "text" in row:
                ids = list(tokenizer.encode(row["text"]))[:TEXT]
            else:
                ids = templates.encode_prompt(row, tokenizer)
        except Exception:  # chat templates raise what they like
            ids = []
        read.append(ids)
    return read


def _misread(trained: Trained, folder: Path, tokenizer: TokenizerWrapper) -> str | None:
    """Where the fused folder reads a question as other tokens, or ends answers at others."""
    own = load_tokenizer(trained.base)
    questions = zip(_read(trained.rows, own), _read(trained.rows, tokenizer), strict=True)
    for row, (ids, found) in zip(trained.rows, questions, strict=True):
        if ids != found:
            same = own.chat_template == tokenizer.chat_template
            pairs = enumerate(zip(ids, found, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(found)))
            here, there = (templates.decode_answer(part[at : at + 8], own) for part in (found, ids))
            return (
                f"the {'tokenizer' if same else 'chat template'} is not the base's: the question "
                f"{_question(row)!r} has {here!r} as its tokens from {at} on, expected {there!r}"
            )
    ends = {}
    for name in ("config.json", "generation_config.json"):
        ends[name] = set(stated_stop_ids(files.read_json(folder / name)))
    ends["the tokenizer"] = tokenizer.eos_token_ids
    for where, stops in ends.items():
        if stops != own.eos_token_ids:
            return f"the stops: {where} has {stops}, the training had {own.eos_token_ids}"
    return None


def _reconfigured(trained: Trained, folder: Path) -> str | None:
    """Which keys of config.json are not the base's, beside those that fusing changes."""
    before, after = read_config(trained.base), read_config(folder)
    ours = {"eos_token_id", "quantization", "quantization_config"}
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    other = ", ".join(sorted(set(keys) - ours))
    return f"config.json is not the base's: {other} differ" if other else None


@dataclass(frozen=True)
class _Change:
    """What became of one weight. The figures are Euclidean norms, but for `kept` and `storable`.

    `wanted` is what the training changed, `size` the trained weight, `lost` the fused one's
    distance from it, of which `unavoidable` is due to the form it is stored in. `kept` says how
    many times the fused weight has the change (its regression on it), `storable` how many times it
    would have it at best: a change that is less than the steps of a quantized weight drowns.
    """

    name: str
    quantized: bool
    wanted: float
    size: float
    lost: float
    unavoidable: float
    kept: float
    storable: float

    @property
    def layer(self) -> str:
        number = re.search(r"\.(\d+)\.", self.name)
        return number[1] if number else ""

    @property
    def wrong(self) -> bool:
        # Products of matrices are only so exact on some devices: hence 1% of the change.
        exact = 2 * self.unavoidable + 1e-2 * self.wanted + FLOAT32 * self.size
        return abs(self.kept - self.storable) > 0.05 or not self.lost <= exact


def _damaged(changes: list[_Change]) -> str | None:
    """What is wrong with weights that are not the trained ones as well as they can be."""
    wrong = [one for one in changes if one.wrong]
    if not wrong:
        return None
    trained = [one for one in changes if one.storable > 0.5]
    layers = {one.layer for one in trained}
    layers -= {one.layer for one in trained if not (one.wrong and abs(one.kept) < 0.1)}
    if layers and all(one.layer in layers for one in wrong):
        numbers = ", ".join(sorted(layers, key=lambda layer: (len(layer), layer)))
        return f"the adapters of layer {numbers} (counted from 0) are not in the fused weights"
    kept = [one.kept for one in trained]
    if trained and all(one.wrong for one in trained) and np.ptp(kept) < 0.3 * abs(median(kept)):
        return f"the scale: the fused weights have {median(kept):.3g} times the adapters"
    worst = sorted(wrong, key=lambda one: one.lost / (one.wanted or 1e-9), reverse=True)[:3]
    return f"{len(wrong)} weights are not the trained ones, worst " + ", ".join(
        f"{one.name} ({one.lost / one.wanted:.0%} of its change lost)"
        if one.wanted
        else f"{one.name} (not trained, and not the base's)"
        for one in worst
    )


def _drowned(changes: list[_Change], share_lost: float | None) -> str:
    """Why the logits differ where each weight is the trained one as well as it can be stored."""
    trained = [one for one in changes if one.wanted]
    wanted, rounded = (
        math.hypot(*figures)
        for figures in ([one.wanted for one in trained], [one.unavoidable for one in trained])
    )
    share = "" if share_lost is None else f"{share_lost:.0%} of "
    drowned = (
        f"lost {share}what the training changed: its rounding is "
        f"{rounded / wanted if wanted else math.inf:.2g} times the adapters"
    )
    if any(one.quantized for one in trained):
        return f"quantizing the fused weights {drowned}"
    return f"rounding the fused weights to the base's dtype {drowned}"


@dataclass(frozen=True)
class _Weight:
    """Where a weight is: `module[key]`, and in `adapters` what is added to it, if anything is."""

    module: nn.Module
    key: str
    adapters: nn.Module | None

    @property
    def array(self) -> mx.array:
        value: mx.array = self.module[self.key]
        return value if value.ndim else value[None]

    @property
    def quantized(self) -> bool:
        return self.key == "weight" and "scales" in self.module

    @property
    def form(self) -> dict[str, Any]:
        module = self.module
        return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def _changes(trained: Trained, folder: Path) -> Iterator[_Change]:
    """Holds each weight of the fused model against the base's and the trained one's.

    They are read from the disk one by one, and computed with some rows at a time.
    """
    model, _ = load_model(trained.base, lazy=True)
    load_adapters(model, trained.adapters)
    after = _weights(model)
    before = _weights(load_model(trained.base, lazy=True)[0])
    fused = _weights(load_model(folder, lazy=True)[0])
    del model
    for name in [name for name in fused if name in before and name in after]:
        places = [of.pop(name) for of in (before, after, fused)]
        stored = places[-1]
        shape = stored.array.shape
        step = max(1, VALUES // math.prod(shape[1:]))
        sums = np.zeros(6)
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            base, goal, value = (_values(place, rows) for place in places)
            at_best = _as_stored(goal, stored)
            change, lost, unavoidable = goal - base, value - goal, at_best - goal
            squares = [(x * x).sum() for x in (change, goal, lost, unavoidable)]
            products = [(x * change).sum() for x in (value - base, at_best - base)]
            sums += np.array(mx.stack([*squares, *products]))
        kept, storable = sums[4:] / sums[0] if sums[0] > 0 else (0.0, 0.0)
        yield _Change(name, stored.quantized, *map(float, (*np.sqrt(sums[:4]), kept, storable)))


def _weights(model: nn.Module) -> dict[str, _Weight]:
    """All weights by name; of quantized ones and of those with adapters, what they stand for."""
    found = {}
    inside: set[str] = set()
    for name, module in model.named_modules():  # a module comes before those that are in it
        if name in inside:
            continue
        stored, adapters = module, None
        if isinstance(module.get("lora_a"), mx.array):
            part = "linear" if "linear" in module else "embedding"
            stored, adapters = module[part], module
            inside.add(f"{name}.{part}")
        for key, value in stored.items():
            if not isinstance(value, mx.array) or key.startswith("_"):
                continue
            if "scales" in stored and key in ("scales", "biases"):
                continue
            found[f"{name}.{key}"] = _Weight(stored, key, adapters if key == "weight" else None)
    return found


def _values(weight: _Weight, rows: slice) -> mx.array:
    """Rows of a weight as the model computes with it, in float32.

    Adapters as the forward passes of mlx-lm's tuner have them: LoRA (Hu et al. 2021) is
    W + scale (A B)^T, and DoRA (Liu et al. 2024) gives its rows the lengths m.
    """
    module, adapters = weight.module, weight.adapters
    value = weight.array[rows]
    if weight.quantized:
        biases = module.get("biases")
        value = _dequantized(
            weight, value, module["scales"][rows], None if biases is None else biases[rows]
        )
    value = value.astype(mx.float32)
    if adapters is None:
        return value
    a, b = adapters["lora_a"].astype(mx.float32), adapters["lora_b"].astype(mx.float32)
    if b.ndim == 3:  # experts: a is [experts, rank, in], b [experts, out, rank]
        product = b[rows] @ a[rows]
    elif "embedding" in adapters:
        product = a[rows] @ b
    else:
        product = (a @ b[:, rows]).T
    value = value + adapters.scale * product
    if "m" in adapters:
        value = value * (adapters["m"][rows] / mx.linalg.norm(value, axis=1))[:, None]
    return value


def _as_stored(value: mx.array, weight: _Weight) -> mx.array:
    """What is left of float32 values that are stored as this weight is."""
    if weight.quantized:
        packed, *scaling = mx.quantize(value, **weight.form)
        scaling = [scales.astype(weight.module["scales"].dtype) for scales in scaling]
        value = _dequantized(weight, packed, *scaling)
    else:
        value = value.astype(weight.array.dtype)
    return value.astype(mx.float32)


def _dequantized(
    weight: _Weight, packed: mx.array, scales: mx.array, biases: mx.array | None = None
) -> mx.array:
    """Quantized values; in float32 where their scales are floats, which not all forms have."""
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed, scales, biases, **weight.form)
