"""Stage `test`: base and tuned model side by side, on every row that `prepare` left.

    uv run python -m athanor.test

Reads params.yaml, artifacts/prepare/ and artifacts/train/; writes artifacts/test/metrics.json and
predictions.jsonl, and adds both to the training's MLflow run. The training questions are asked
too: whether they were learned by heart is what the figures `test_train_*` say.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from athanor import chat, console, files, models, settings, sources, tracking
from athanor.chat import Tokens
from athanor.evaluation import Answer, answers, mean_loss
from athanor.paths import PREPARED, SPLITS, TESTED, TRAINED


@dataclass(frozen=True)
class Split:
    """What is asked of a model on one split: the loss on `tokens`, answers to `questions`."""

    tokens: list[Tokens]
    questions: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a model made of a split: its mean loss in nats a token, and an answer a question."""

    loss: float
    answers: list[Answer]


def examine(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    splits: dict[str, Split],
    *,
    batch_size: int,
    max_tokens: int,
    title: str,
) -> dict[str, Outcome]:
    """Measures the loss over every row once, and asks every question greedily."""
    outcomes = {}
    with console.progress() as bar:
        task = bar.add_task(title, total=sum(len(split.questions) for split in splits.values()))
        for name, split in splits.items():
            loss, _ = mean_loss(model, split.tokens, batch_size)
            given = answers(
                model,
                tokenizer,
                [chat.prompt_ids(row, tokenizer) for row in split.questions],
                max_tokens=max_tokens,
                batch_size=batch_size,
                on_answer=lambda: bar.advance(task),
            )
            outcomes[name] = Outcome(loss, given)
    return outcomes


def predictions(
    splits: dict[str, Split],
    base: dict[str, Outcome],
    tuned: dict[str, Outcome],
    tokenizer: TokenizerWrapper,
) -> list[dict[str, Any]]:
    """A line a question: what was asked, what was expected, and what both models said."""
    lines = []
    for name, split in splits.items():
        for row, *pair in zip(
            split.questions, base[name].answers, tuned[name].answers, strict=True
        ):
            said = {
                who: {"text": chat.answer_text(answer.ids, tokenizer), "stopped": answer.stopped}
                for who, answer in zip(("base", "tuned"), pair, strict=True)
            }
            lines.append(
                {
                    "split": name,
                    "prompt": row["messages"][:-1],
                    "reference": chat.expected_answer(row, tokenizer),
                    **said,
                }
            )
    return lines


def figures(
    outcomes: dict[str, Outcome], lines: list[dict[str, Any]], who: str
) -> dict[str, float]:
    """The metrics of one model: test_* for the test rows, test_valid_* and test_train_* beside.

    `exact_match` and `stop_rate` are shares of the questions asked; an answer that was cut off is
    no exact match.
    """
    found: dict[str, float] = {}
    for name, outcome in outcomes.items():
        prefix = metric_prefix(name, who)
        if not math.isnan(outcome.loss):
            found[f"{prefix}loss"] = outcome.loss
            found[f"{prefix}perplexity"] = math.exp(min(outcome.loss, 700))
        asked = [line for line in lines if line["split"] == name]
        if asked:
            exact = [is_exact(line, who) for line in asked]
            found[f"{prefix}exact_match"] = sum(exact) / len(asked)
            found[f"{prefix}stop_rate"] = sum(line[who]["stopped"] for line in asked) / len(asked)
    return found


def metric_prefix(split: str, who: str) -> str:
    """What a metric's name begins with: test_ or test_<split>_, then base_ for the base model."""
    return ("test_" if split == "test" else f"test_{split}_") + ("base_" if who == "base" else "")


def is_exact(line: dict[str, Any], who: str) -> bool:
    """Whether an answer is the reference, to the character, and ended by itself."""
    return bool(line[who]["stopped"] and line[who]["text"] == line["reference"])


def main() -> None:
    cfg = settings.load(sys.argv[1:])
    trained = files.read_json(TRAINED / "run.json")
    with tracking.resume(trained["run"], trained["run_id"]) as run:
        source = sources.Source.read(PREPARED / "model.json")
        model, tokenizer = models.load(source.folder())
        splits = {}
        for name in SPLITS:
            rows = files.read_jsonl(PREPARED / f"{name}.jsonl")
            questions = [row for row in rows if "text" not in row]
            splits[name] = Split(
                chat.tokenize_all(rows, tokenizer, cfg.train.mask_prompt, cfg.train.max_seq_length),
                questions[: None if cfg.test.max_rows == -1 else cfg.test.max_rows],
            )
        limits = {"batch_size": cfg.test.batch_size, "max_tokens": cfg.test.max_tokens}
        base = examine(model, tokenizer, splits, title="ask the base", **limits)
        models.load_adapters(model, TRAINED / "adapters")
        tuned = examine(model, tokenizer, splits, title="ask the tuned", **limits)

        lines = predictions(splits, base, tuned, tokenizer)
        metrics = figures(base, lines, "base") | figures(tuned, lines, "tuned")
        files.write_jsonl(TESTED / "predictions.jsonl", lines)
        files.write_json(TESTED / "metrics.json", metrics)
        run.metrics(trained["iteration"], metrics)
        run.artifact(TESTED / "predictions.jsonl", "test")
    _show(splits, metrics, lines)


def _show(splits: dict[str, Split], metrics: dict[str, float], lines: list[dict[str, Any]]) -> None:
    rows = []
    for name, split in splits.items():
        for who in ("base", "tuned"):
            prefix = metric_prefix(name, who)
            if f"{prefix}loss" not in metrics:
                continue
            asked = len(split.questions)
            exact = sum(is_exact(line, who) for line in lines if line["split"] == name)
            stopped = sum(line[who]["stopped"] for line in lines if line["split"] == name)
            rows.append(
                [
                    f"{name}, {who}",
                    f"{metrics[f'{prefix}loss']:.4f}",
                    f"{metrics[f'{prefix}perplexity']:.4g}",
                    f"{exact} of {asked}" if asked else "–",
                    f"{stopped} of {asked}" if asked else "–",
                ]
            )
    console.side_by_side(
        "test", ["rows, model", "loss", "perplexity", "answered exactly", "stopped"], rows
    )
    console.side_by_side(
        "",
        ["asked", "expected", "base", "tuned"],
        [
            [
                _clip(line["prompt"][-1]["content"] or ""),
                _clip(line["reference"] or ""),
                *(
                    _clip(line[who]["text"] + ("" if line[who]["stopped"] else " …"))
                    for who in ("base", "tuned")
                ),
            ]
            for line in lines[:12]
        ],
    )
    console.done("", {"wrote": f"{TESTED}/: metrics.json, predictions.jsonl"})


def _clip(text: str, width: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    console.run(main)
