"""The loop, on the real tiny model: what is learned, in which order, and to the same bytes."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from athanor import chat, models, settings, training
from athanor.chat import Tokens
from athanor.evaluation import mean_loss, padded, summed_loss
from athanor.schema import Config

Rows = list[dict[str, Any]]


def completion(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [
    completion("PolarDB是什么", "阿里云开源宇宙无敌数据库"),
    completion("月亮哪天最圆", "星期八"),
    completion("谁是最帅的地球人", "德哥"),
    completion("哪吒的师傅是谁", "孙悟空的师傅的舅舅"),
    completion("为什么电动汽车比较费油", "因为电很贵"),
]


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> list[Tokens]:
    return chat.tokenize_all(ROWS, models.load_tokenizer(tiny), True, 2048)


@pytest.fixture(scope="module")
def cfg(repo: Path) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return settings.compose(Path("conf"), [])


@pytest.fixture
def trained(tiny: Path, tokens: list[Tokens], cfg: Config) -> Callable[..., dict[str, np.ndarray]]:
    """Trains the tiny model for a few iterations and returns its adapters."""

    def run(**changed: Any) -> dict[str, np.ndarray]:
        settings: dict[str, Any] = {
            "seed": 0,
            "batch_size": 2,
            "iters": 4,
            "learning_rate": 1e-3,
            "val_batches": -1,
            "steps_per_report": 2,
            "steps_per_eval": 2,
            "grad_checkpoint": False,
            "grad_accumulation_steps": 1,
            "on_iteration": lambda _: None,
            "on_point": lambda _: None,
        } | changed
        model, _ = models.load(tiny)
        models.make_trainable(model, cfg.train, settings["seed"])
        training.train(model, tokens, tokens[:3], **settings)
        return {k: np.array(v) for k, v in tree_flatten(model.trainable_parameters())}

    return run


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def test_padding_and_prompts_move_no_parameter(tiny: Path, tokens: list[Tokens]) -> None:
    """The gradient of a padded batch is the sum of its rows' own, whatever the padding holds."""
    model, _ = models.load(tiny)
    model.freeze()
    model.layers[-1].unfreeze()
    gradient = training.nn.value_and_grad(model, summed_loss)

    def flat_gradient(*arrays: mx.array) -> np.ndarray:
        _, found = gradient(model, *arrays)
        return np.concatenate([np.array(v).ravel() for _, v in tree_flatten(found)])

    inputs, targets, mask = padded(tokens)
    assert (mask == 0).any() and targets.shape[1] > min(map(len, tokens))
    together = flat_gradient(inputs, targets, mask)
    apart = sum(flat_gradient(*padded([row])) for row in tokens)
    np.testing.assert_allclose(together, apart, rtol=1e-3, atol=1e-4)
    junk = mx.where(mask == 0, 7, targets)
    np.testing.assert_array_equal(together, flat_gradient(inputs, junk, mask))


@pytest.mark.parametrize(("count", "batch_size"), [(5, 2), (6, 6), (3, 4), (7, 3), (1, 1)])
def test_every_row_comes_once_an_epoch(count: int, batch_size: int) -> None:
    an_epoch = -(-count // batch_size)
    found = list(islice(training.batches(count, batch_size, seed=3), 2 * an_epoch))
    for epoch in (found[:an_epoch], found[an_epoch:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(count))
        assert max(map(len, epoch)) <= batch_size


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert training.epoch_order(50, 0, 0) == training.epoch_order(50, 0, 0)
    assert training.epoch_order(50, 0, 0) != training.epoch_order(50, 0, 1)
    assert training.epoch_order(50, 0, 0) != training.epoch_order(50, 1, 0)


def test_same_seed_same_bytes_however_often_one_looks(
    trained: Callable[..., dict[str, np.ndarray]],
) -> None:
    first = trained()
    assert same(first, trained(steps_per_eval=1, val_batches=1, steps_per_report=1))
    assert not same(first, trained(seed=1))


def test_accumulated_batches_weigh_by_their_tokens(
    trained: Callable[..., dict[str, np.ndarray]], tokens: list[Tokens]
) -> None:
    """Uneven batches that make up one epoch give the update of that epoch in one batch."""
    whole = trained(batch_size=len(tokens), iters=1)
    pieces = trained(batch_size=2, iters=3, grad_accumulation_steps=3)
    for key in whole:
        np.testing.assert_allclose(whole[key], pieces[key], atol=2e-4, err_msg=key)


def test_validation_loss_is_the_same_in_any_batches(tiny: Path, tokens: list[Tokens]) -> None:
    model, _ = models.load(tiny)
    expected, count = mean_loss(model, tokens, 1)
    assert count == sum(sum(row.supervised[1:]) for row in tokens)
    for batch_size in (2, 3, 8):
        assert mean_loss(model, tokens, batch_size)[0] == pytest.approx(expected, abs=1e-5)


def test_reports_are_means_over_supervised_tokens(
    tiny: Path, tokens: list[Tokens], trained: Callable[..., dict[str, np.ndarray]]
) -> None:
    """At a rate too small to learn, the train loss of an epoch is the loss on all its tokens."""
    points: list[training.Point] = []
    trained(
        learning_rate=1e-12, iters=3, steps_per_report=3, steps_per_eval=9, on_point=points.append
    )
    model, _ = models.load(tiny)
    report = next(point.metrics for point in points if "train_loss" in point.metrics)
    expected, count = mean_loss(model, tokens, 8)
    assert report["train_loss"] == pytest.approx(expected, abs=1e-4)
    assert report["trained_tokens"] == count
    assert [point.iteration for point in points if "val_loss" in point.metrics] == [0, 3]


def test_grad_checkpoint_saves_memory_and_changes_no_result(
    trained: Callable[..., dict[str, np.ndarray]],
) -> None:
    from mlx_lm.models.qwen2 import TransformerBlock

    call, results, peaks = TransformerBlock.__call__, [], []
    for grad_checkpoint in (False, True):
        results.append(trained(iters=2, grad_checkpoint=grad_checkpoint))
        peaks.append(mx.get_peak_memory())
    assert TransformerBlock.__call__ is call
    assert peaks[1] < peaks[0]
    for key, value in results[0].items():
        np.testing.assert_allclose(value, results[1][key], atol=1e-5)
