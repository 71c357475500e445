"""Two records compared: their rows and weights."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from athanor.runs import compare


@pytest.mark.parametrize(
    ("a", "b", "only_a", "only_b", "same", "reordered"),
    [
        ([1, 2, 3], [1, 2, 3], [], [], 3, False),
        ([1, 2, 3], [1, 3], [2], [], 2, False),
        ([1, 2, 3], [1, 9, 3, 8], [2], [2, 4], 2, False),
        ([1, 2, 3], [3, 2, 1], [], [], 3, True),
        ([1, 1, 2], [1, 2, 2], [2], [3], 2, False),
        ([], [7], [], [1], 0, False),
    ],
)
def test_rows_that_differ_are_named_by_line(
    a: list[int], b: list[int], only_a: list[int], only_b: list[int], same: int, reordered: bool
) -> None:
    changes = compare.compare_rows(np.array(a, dtype="<u8"), np.array(b, dtype="<u8"))
    assert changes == compare.RowChanges(only_a, only_b, same, reordered)
    assert changes.differ() == (a != b)


def test_weights_are_compared_relative_to_the_greatest(tmp_path: Path) -> None:
    a, b, other = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "other"))
    mx.save_safetensors(a, {"x": mx.array([1.0, -4.0]), "y": mx.array([0.5])})
    mx.save_safetensors(b, {"x": mx.array([1.0, -4.0]), "y": mx.array([0.25])})
    mx.save_safetensors(other, {"x": mx.array([1.0, -4.0])})
    assert compare.measure_weight_difference(Path(a), Path(b)) == 0.0625
    assert compare.measure_weight_difference(Path(a), Path(a)) == 0
    assert compare.measure_weight_difference(Path(a), Path(other)) is None
