"""Thinned products of parameters: every two values meet, in few cases."""

from itertools import combinations, product

import pytest

from tests.support.pairs import covering


@pytest.mark.parametrize("sizes", [(3, 2), (2, 2, 2, 2), (15, 4, 2, 2), (3, 3, 2, 2, 2), (2, 5, 4, 3)], ids=str)
def test_every_two_values_meet_and_rows_are_few(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}-{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = covering(axes)
    for (first, values), (second, others) in combinations(enumerate(axes), 2):
        assert {(row[first], row[second]) for row in rows} == set(product(values, others))
    assert all(value in axis for row in rows for value, axis in zip(row, axes, strict=True))
    assert len(set(rows)) == len(rows) <= 1.5 * max(a * b for a, b in combinations(sizes, 2))
    assert covering(axes) == rows
