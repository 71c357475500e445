"""Splitting models: which are split, and why others are not."""

import mlx.core as mx
import pytest

from athanor.compute import parts
from support.models import Body, Layer, SmallModel, freeze_layers


class Stateful(Layer):
    """A layer that keeps its input, or adds the input that another kept."""

    kept: list[mx.array] = []  # noqa: RUF012  # shared, as a state in the model would be

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def __call__(self, h: mx.array) -> mx.array:
        if self.reads:
            return super().__call__(h + Stateful.kept[-1])
        Stateful.kept.append(h)
        return super().__call__(h)


def test_layers_with_a_memory_are_not_split() -> None:
    body = Body()
    body.layers[0], body.layers[2] = Stateful(reads=False), Stateful(reads=True)
    split = freeze_layers(SmallModel(body)).parts
    assert split.can_cut_at(3)
    assert not split.can_cut_at(2)


def test_a_misfit_names_the_largest_difference() -> None:
    with pytest.raises(parts.Misfit, match=r"other \(1 of 1\)"):
        parts.refuse_difference(mx.zeros((2, 2)), mx.ones((2, 2)), parts.OTHER_SHAPE, "other")
    with pytest.raises(parts.Misfit, match="other"):
        parts.refuse_difference(
            mx.ones((2, 2)) * mx.nan, mx.ones((2, 2)), parts.OTHER_SHAPE, "other"
        )
