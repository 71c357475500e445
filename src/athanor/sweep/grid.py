"""The swept keys of a choice as axes: their values in order, and the configurations as a grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from athanor.sweep.choice import Candidate, Choice
from athanor.sweep.naming import ALL_LAYERS, LAYERS, LEARNING_RATE

MOST_IN_A_GRID = 12  # values on an axis; more are drawn as dots


@dataclass(frozen=True)
class Grid:
    """The values of two keys in order, and in each cell (row, column) its best candidate.

    `over` are the other swept keys: a cell holds the best over them.
    """

    across: str
    down: str
    columns: list[Any]
    rows: list[Any]
    cells: dict[tuple[int, int], Candidate]
    over: list[str]


def swept_keys(choice: Choice) -> list[str]:
    """Return the keys with several values but the seed: learning rate, layers, then the others."""
    keys = [key for key in choice.keys if len(values_of(choice, key)) > 1]
    return sorted(keys, key=lambda key: (key != LEARNING_RATE, key != LAYERS))


def arrange_grid(choice: Choice) -> Grid | None:
    """Return the candidates as a grid of the first two swept keys.

    None with fewer keys, and for values that a search drew, whose grid would be mostly empty.
    """
    keys = swept_keys(choice)
    if len(keys) < 2:
        return None
    across, down, *over = keys
    columns, rows = values_of(choice, across), values_of(choice, down)
    cells: dict[tuple[int, int], Candidate] = {}
    for candidate in choice.candidates:  # in order, so that the first is a cell's best
        row = index_of(rows, candidate.values.get(down))
        cells.setdefault((row, index_of(columns, candidate.values.get(across))), candidate)
    longest = max(len(columns), len(rows))
    sparse = longest > MOST_IN_A_GRID / 2 and 2 * len(cells) < len(columns) * len(rows)
    if longest > MOST_IN_A_GRID or sparse:
        return None
    return Grid(across, down, columns, rows, cells, over)


def values_of(choice: Choice, key: str) -> list[Any]:
    """Return a key's values: numbers in order, then all layers; texts in the sweep's order."""
    values = [trial.values.get(key) for trial in choice.trials]
    unique = list({repr(value): value for value in values}.values())
    if all(map(is_number, unique)):
        return sorted(unique, key=lambda value: (key == LAYERS and value == ALL_LAYERS, value))
    return unique


def index_of(values: Sequence[Any], value: Any) -> int:
    """Return the place of a value; 1, 1.0 and True are different values."""
    return [repr(other) for other in values].index(repr(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
