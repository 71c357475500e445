"""Batches: every row once an epoch, little padding, and an order that seed and epoch decide."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner import trainer as peer
from mlx_lm.tuner.datasets import CacheDataset

from athanor.compute.arrays import TokenizedText, pad_rows
from athanor.train.batches import Batches, plan_epoch


def row(length: int, line: int = 0) -> TokenizedText:
    return TokenizedText(list(range(length)), [False] + [True] * (length - 1), line)


@pytest.mark.parametrize(
    ("count", "batch_size"), [(5, 2), (6, 6), (3, 4), (7, 3), (1, 1), (2500, 8), (2049, 8)]
)
def test_every_row_comes_once_an_epoch(count: int, batch_size: int) -> None:
    lengths = [2 + i % 37 for i in range(count)]
    for epoch in (0, 1, 7):
        batches = plan_epoch(lengths, batch_size, 3, epoch)
        assert sorted(number for batch in batches for number in batch) == list(range(count))
        assert max(map(len, batches)) <= batch_size
        assert len(batches) == -(-count // batch_size)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [10] * 50
    np.random.seed(1)
    first = plan_epoch(lengths, 4, 0, 0)
    np.random.seed(2)
    assert plan_epoch(lengths, 4, 0, 0) == first
    assert plan_epoch(lengths, 4, 0, 1) != first
    assert plan_epoch(lengths, 4, 1, 0) != first


@pytest.mark.parametrize(("count", "batch_size"), [(12, 6), (101, 4), (1000, 8)])
def test_rows_change_company_from_epoch_to_epoch(count: int, batch_size: int) -> None:
    """Also where no two rows have the same length."""
    lengths = list(range(10, 10 + count))
    first, second = (
        {frozenset(batch) for batch in plan_epoch(lengths, batch_size, 0, epoch)}
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 4


def test_a_batch_is_a_function_of_its_iteration() -> None:
    rows = [row(3 + i % 5) for i in range(11)]
    forward = Batches(rows, 4, seed=0)
    numbers = [forward(iteration).numbers for iteration in range(1, 10)]
    backward = Batches(rows, 4, seed=0)
    assert [backward(iteration).numbers for iteration in range(9, 0, -1)] == numbers[::-1]
    for epoch in (numbers[:3], numbers[3:6], numbers[6:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(11))


def test_at_most_a_twentieth_is_padding_beside_mlx_lms(capsys: pytest.CaptureFixture[str]) -> None:
    """Positions that are computed for nothing, on 2,000 rows of log-normal lengths."""
    draw = np.random.default_rng(0)
    for sigma in (0.5, 1.0):
        lengths = np.clip(draw.lognormal(5, sigma, 2000).astype(int), 8, 2048)
        rows = [row(int(length)) for length in lengths]
        batches = (pad_rows([rows[i] for i in b]) for b in plan_epoch(list(lengths), 8, 0, 0))
        ours = share_of_padding((batch.inputs.size, batch.targets.size) for batch in batches)
        np.random.seed(0)
        theirs = share_of_padding(peers_batches(rows))
        with capsys.disabled():
            print(f"\n  padding, sigma {sigma}: {ours:.1%}, mlx-lm {theirs:.1%}", end=" ")
        assert ours <= 0.05
        assert ours < theirs


def share_of_padding(batches: Iterator[tuple[int, int]]) -> float:
    """The share of positions that is not learned from, as every token of these rows is."""
    positions, learned = map(sum, zip(*batches, strict=True))
    return 1 - learned / positions


def peers_batches(rows: list[TokenizedText]) -> Iterator[tuple[int, int]]:
    """mlx_lm.lora's batches of the same rows, which are dictionaries with one key, as its own."""

    class Data(list[dict[str, TokenizedText]]):
        def process(self, row: dict[str, TokenizedText]) -> tuple[list[int], int]:
            return row["tokens"].ids, 0

    dataset = CacheDataset(Data({"tokens": row} for row in rows))
    for batch, lengths in peer.iterate_batches(dataset, 8, 2048):
        steps = mx.arange(1, batch.shape[1])
        yield batch[:, :-1].size, int((steps < lengths[:, 1:]).sum())


def test_a_batch_counts_its_supervised_tokens() -> None:
    rows = [row(3 + i) for i in range(5)]
    batches = Batches(rows, 4, seed=0)
    for batch in map(batches, (1, 2)):
        assert batch.rows == [rows[number] for number in batch.numbers]
        assert pad_rows(batch.rows).targets.size == batch.tokens
