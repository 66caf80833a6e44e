"""Gains are over the better baseline at the same sizes; tables show them and fit a terminal."""

from io import StringIO

import pytest
from rich.console import Console

from duo_id.benchmark.tables import memory, results_tables, with_gains
from tests.benchmark import saved


def shown(results: dict) -> str:
    output = StringIO()
    Console(width=80, file=output).print(*results_tables(results), sep="\n")
    return output.getvalue()


def test_the_faster_baseline_and_the_smaller_one_are_compared_with() -> None:
    rows = {(row["attention"], row["sparsity"], row["context"]): row for row in saved.decode()["rows"]}
    duo = rows["duo", 0.5, 1000]
    assert duo["speedup"] == 6.0 / 2.0
    assert duo["memory_saving"] == 9 / 2
    assert duo["floor_ratio"] == 2.0 / 1.5
    assert "speedup" not in rows["full", 0.0, 1000]


def test_nothing_is_gained_over_what_did_not_fit_but_floors_compare() -> None:
    (row,) = (row for row in saved.decode()["rows"] if row["sparsity"] == 0.75 and row["context"] == 2000)
    assert row["speedup"] is None
    assert row["memory_saving"] is None
    assert row["floor_ratio"] == 3.0 / 1.5


def test_rows_of_other_sizes_are_no_baseline() -> None:
    rows = [saved.row("full", 0.0, 1000, 8.0, 2**31, batch_size=2), saved.row("duo", 0.5, 1000, 2.0, 2**31)]
    assert with_gains(rows)[1]["speedup"] is None


def test_comparing_again_changes_nothing() -> None:
    rows = saved.decode()["rows"]
    assert with_gains(rows) == rows


def test_without_a_peak_weights_and_cache_count() -> None:
    assert memory({"status": "ok", "peak_bytes": None, "weights_bytes": 3, "cache_bytes": 4}) == 7
    assert memory({"status": "OOM", "peak_bytes": None, "weights_bytes": 3, "cache_bytes": None}) is None


def test_tables_show_every_row_with_its_floor_and_gain() -> None:
    text = shown(saved.decode())
    assert text.count("OOM") == 2 * 2
    (line,) = (line for line in text.splitlines() if "duo 0.5" in line and "1,000" in line and "3.00x" in line)
    assert line.split() == ["duo", "0.5", "1,000", "2", "10%", "500", "1.5", "1.100", "3.00x", "1.33x"]
    assert "floors at 4 TB/s, 700 TFLOP/s" in text


@pytest.mark.parametrize("results", [saved.decode(), saved.prefill()], ids=["decode", "prefill"])
def test_tables_cut_nothing_off(results: dict) -> None:
    assert "…" not in shown(results)


def test_the_task_memory_has_one_table() -> None:
    assert len(results_tables(saved.decode() | {"task": "memory"})) == 1
