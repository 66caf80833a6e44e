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
    return _parametrized(list(axes), covering([list(axis) for axis in axes.values()]))


def pairwise_of_some(some: Iterable[Any], **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """As `pairwise`, but of the first axis only the values in `some` meet all others; each of the rest has one case.

    In those, the other axes' combinations take turns. For values of which most behave alike where others matter.
    """
    (name, first), *others = ((name, list(axis)) for name, axis in axes.items())
    some = list(some)
    rows = covering([some, *(axis for _, axis in others)])
    turns = itertools.cycle(itertools.product(*(axis for _, axis in others)))
    rows += [(value, *next(turns)) for value in first if value not in some]
    return _parametrized([name, *(name for name, _ in others)], rows)


def _parametrized(names: list[str], rows: list[tuple[Any, ...]]) -> pytest.MarkDecorator:
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
