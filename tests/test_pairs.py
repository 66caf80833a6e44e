"""Thinned products of parameters: every two values meet, in few cases."""

from itertools import combinations, product

import pytest

from tests.support.pairs import covering, pairwise_of_some


@pytest.mark.parametrize("sizes", [(3, 2), (2, 2, 2, 2), (15, 4, 2, 2), (3, 3, 2, 2, 2), (2, 5, 4, 3)], ids=str)
def test_every_two_values_meet_and_rows_are_few(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}-{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = covering(axes)
    for (first, values), (second, others) in combinations(enumerate(axes), 2):
        assert {(row[first], row[second]) for row in rows} == set(product(values, others))
    assert all(value in axis for row in rows for value, axis in zip(row, axes, strict=True))
    assert len(set(rows)) == len(rows) <= 1.5 * max(a * b for a, b in combinations(sizes, 2))
    assert covering(axes) == rows


def test_of_some_all_meet_and_each_of_the_rest_has_a_case() -> None:
    axes = {"letter": "abcdefg", "number": [1, 2, 3], "flag": [False, True]}
    mark = pairwise_of_some("ab", **axes)
    names, rows = mark.args
    assert names == list(axes)
    assert [row for row in rows if row[0] in "ab"] == covering([["a", "b"], [1, 2, 3], [False, True]])
    rest = [row for row in rows if row[0] not in "ab"]
    assert [row[0] for row in rest] == list("cdefg")
    assert len({row[1:] for row in rest}) == len(rest), "combinations take turns"
