"""The gate that a fused model has to pass: it is the model that was trained.

Both are asked the same questions. They have to read the same tokens and to stop at the same ones.
Their logits, along the ends of the questions and the trained model's greedy answers, may differ by
a share of what the training itself changed there, plus what rounding to the stored dtype does. Each
weight has to be the trained one, as well as its stored form can hold it (compare_weights.py), and
the files the base's (compare_files.py).

Reads a base's folder, its adapters and a fused folder. One model is in memory at a time.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from athanor.chat.base import load_with_tokenizer
from athanor.chat.conversation import Conversation, chat
from athanor.chat.rendering import Rendering, rendering_of
from athanor.compute import evaluation
from athanor.device.backend import on_cpu
from athanor.errors import UserError
from athanor.fuse.compare_files import (
    describe_question,
    find_file_differences,
    tokenize_questions,
)
from athanor.fuse.compare_weights import EPSILON, compare_weights, explain_rounding, find_damage
from athanor.model.adapters import load_adapters
from athanor.model.load import load_model
from athanor.model.stored import read_dtypes

# At most so many tokens of a question and of a greedy answer; so many last positions of both are
# compared: with a vocabulary of 150,000 each is 0.6 MB of logits.
LONGEST, ANSWER, POSITIONS = 512, 24, 32
# Rounding may move a logit by so many of the stored dtype's steps, which are its epsilon times the
# largest logit: where the weights alone are rounded, as on a CPU, which computes in float32, and
# where every result is. Measured: at most 0.7 of them (the tiny model and a random one of 0.5 B, in
# float16 and bfloat16), and 5.3 (the tiny one, quantized, computed in half precision).
STEPS_OF_WEIGHTS, STEPS_OF_RESULTS = 2.0, 8.0

FIXED = [
    chat(("user", "你好，请用一句话介绍你自己。"), ("assistant", "")),
    chat(("user", "What is the capital of France?"), ("assistant", "")),
    chat(
        ("user", "def add(a: int, b: int) -> int:\n    return a + b  # 是什么？"), ("assistant", "")
    ),
    chat(("user", "🙂🚀 1 + 1 = ?"), ("assistant", "")),
    chat(
        ("system", "简短回答。"),
        ("user", "Hi!"),
        ("assistant", "Hello!"),
        ("user", "再说一遍。"),
        ("assistant", ""),
    ),
]


@dataclass(frozen=True)
class Reply:
    """The trained model's logits and greedy answer to one question.

    `ids` are the question's tokens, `prompt_length` in number, and then those of the answer;
    `logits` are float32, [the last POSITIONS of `ids` at most, vocabulary].
    """

    question: str
    ids: list[int]
    prompt_length: int
    logits: np.ndarray

    @property
    def first(self) -> int:
        """The position in `logits` that the answer's first token is taken from."""
        return len(self.logits) - (len(self.ids) - self.prompt_length) - 1


@dataclass(frozen=True)
class TrainedModel:
    """The trained model's replies, which fused models are compared with.

    `rows` are all questions, those that it is not asked included; `change` is the largest
    difference of logits between it and its base, at the positions that are compared.
    """

    base: Path
    adapters: Path
    rows: list[Conversation]
    replies: list[Reply]
    change: float
    rendering: Rendering


@dataclass(frozen=True)
class Answer:
    """The fused model's greedy answer against the trained one's.

    `parts_at` is the first token of the answer that differs, from 0, and None where all are equal;
    `tie` says that the trained model prefers its own token there by less than `tolerance`.
    """

    question: str
    parts_at: int | None
    tie: bool


@dataclass(frozen=True)
class Report:
    """The figures of the gate. Differences are of logits, the largest at any compared position.

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
    cause: UserError | None

    def summary(self) -> str:
        """Return the figures in a line."""
        share = "" if self.share_lost is None else f", {self.share_lost:.2%} of the training's"
        same = sum(answer.parts_at is None for answer in self.answers)
        ties = sum(answer.tie for answer in self.answers)
        tied = f" ({ties} part at a tie)" if ties else ""
        return (
            f"largest logit difference {self.difference:.3g}{share} (allowed: {self.tolerance:.3g})"
            f", {same} of {len(self.answers)} greedy answers equal{tied}"
        )


def ask_trained_model(
    base: Path, adapters: Path, rows: list[Conversation], rendering: Rendering | None = None
) -> TrainedModel:
    """Ask the trained model, `base` with `adapters` on, the FIXED questions and those of `rows`.

    Questions that its template refuses or that are longer than LONGEST tokens are not asked; of
    plain text, the first tokens are the question.

    Raises:
        UserError: where the adapters make no finite logits.
    """
    model, tokenizer = load_with_tokenizer(base, rendering)
    load_adapters(model, adapters)
    plain = [Conversation(text=row.turns[-2].content) for row in FIXED]
    rows = [*(FIXED if tokenizer.has_chat_template else plain), *rows]
    prompts = list(tokenize_questions(rows, tokenizer))
    asked = [(row, ids) for row, ids in zip(rows, prompts, strict=True) if 0 < len(ids) <= LONGEST]
    answers = evaluation.generate_answers(
        model,
        tokenizer,
        [ids for _, ids in asked],
        max_tokens=ANSWER,
        batch_size=max(1, len(asked)),
    )
    replies = []
    for (row, ids), answer in zip(asked, answers, strict=True):
        logits = _compute_logits(model, ids + answer.ids)
        replies.append(Reply(describe_question(row), ids + answer.ids, len(ids), logits))
    del model
    mx.clear_cache()
    model = load_model(base)
    differences = (reply.logits - _compute_logits(model, reply.ids) for reply in replies)
    change = max(map(_largest, differences), default=0.0)
    if not math.isfinite(change):
        raise UserError("fuse.no_finite_logits", adapters=adapters, base=base)
    return TrainedModel(base, adapters, rows, replies, change, rendering_of(tokenizer))


def compare_with_trained(trained: TrainedModel, folder: Path, max_difference: float) -> Report:
    """Compare the model in `folder`, as it is loaded from there, with the trained one.

    `max_difference` is the share of what the training changed in the logits that may be lost.

    Raises:
        UserError: where the folder can't be loaded.
    """
    model, tokenizer = load_with_tokenizer(folder, trained.rendering)
    steps = STEPS_OF_WEIGHTS if on_cpu() else STEPS_OF_RESULTS
    largest = max((_largest(reply.logits) for reply in trained.replies), default=0.0)
    rounding = steps * _coarsest_epsilon(folder) * largest
    tolerance = max_difference * trained.change + rounding
    difference, positions, answers = 0.0, 0, []
    for reply in trained.replies:
        logits = _compute_logits(model, reply.ids)
        if logits.shape != reply.logits.shape:
            difference = math.inf
            break
        difference = float(np.maximum(difference, _largest(logits - reply.logits)))  # nan stays nan
        positions += len(logits)
        answers.append(_compare_answer(reply, logits, tolerance))
    del model
    mx.clear_cache()
    share = difference / trained.change if trained.change > rounding else None
    cause = next(find_file_differences(trained.base, folder, trained.rows, tokenizer), None)
    if cause is None:
        changes = list(compare_weights(trained.base, trained.adapters, folder))
        cause = find_damage(changes)
        parted = any(answer.parts_at is not None and not answer.tie for answer in answers)
        if cause is None and (parted or not difference <= tolerance):
            cause = explain_rounding(changes)
    return Report(difference, trained.change, share, rounding, tolerance, positions, answers, cause)


def _compute_logits(model: nn.Module, ids: list[int]) -> np.ndarray:
    """Return float32 [the last POSITIONS of ids at most, vocabulary], in one forward pass."""
    return np.array(model(mx.array(ids)[None])[0, -POSITIONS:].astype(mx.float32))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _coarsest_epsilon(folder: Path) -> float:
    """Return the coarsest epsilon of the dtypes that a model's weights are stored in."""
    return max([EPSILON, *(mx.finfo(dtype).eps for dtype in read_dtypes(folder).values())])


def _compare_answer(reply: Reply, logits: np.ndarray, tolerance: float) -> Answer:
    """Find the first token where the fused model's greedy answer differs from the trained one's.

    Up to there both have read the same, so one pass along the trained one's answer shows it.
    """
    own, tokens = reply.logits[reply.first :], logits[reply.first :].argmax(axis=-1)
    parted = np.flatnonzero(own.argmax(axis=-1) != tokens)
    if not len(parted):
        return Answer(reply.question, None, False)
    at = int(parted[0])
    margin = own[at].max() - own[at][tokens[at]]
    return Answer(reply.question, at, bool(margin <= tolerance))
