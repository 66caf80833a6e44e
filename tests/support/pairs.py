"""Tests with many parameters, thinned from their product to rows in which every two values meet."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test so that each value of a parameter meets each value of every other in one case at least.

    What breaks at one value, or where two meet, is noticed, by a number of cases near the product of the two longest
    axes instead of all. The cases are the same each time.
    """
    names = list(axes)
    rows = covering([list(axis) for axis in axes.values()])
    return pytest.mark.parametrize(names, rows, ids=["-".join(map(str, row)) for row in rows])


def covering(axes: list[list[Any]]) -> list[tuple[Any, ...]]:
    """Rows with a value of each axis, of two or more, such that every two values of two axes are in one of them.

    Greedy: each row begins with the first two values that have not met and takes, axis by axis, the value that meets
    the most others for the first time; of equals, the one taken least.
    """
    assert len(axes) > 1, "there are no pairs"
    places = list(itertools.combinations(range(len(axes)), 2))
    open_pairs = {
        ((a, i), (b, j)): None for a, b in places for i in range(len(axes[a])) for j in range(len(axes[b]))
    }  # a dict keeps their order
    rows: list[tuple[Any, ...]] = []
    taken = [[0] * len(axis) for axis in axes]
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for axis, values in enumerate(axes):
            if axis not in row:
                gains = [
                    sum(tuple(sorted([(axis, value), other])) in open_pairs for other in row.items())
                    for value in range(len(values))
                ]
                row[axis] = min(range(len(values)), key=lambda value: (-gains[value], taken[axis][value]))
            taken[axis][row[axis]] += 1
        for pair in itertools.combinations(sorted(row.items()), 2):
            open_pairs.pop(pair, None)
        rows.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return rows
