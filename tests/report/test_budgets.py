"""Budgets tell a share of heads from a share of the cache, and go from much to little."""

import pytest

from duo_id.common.errors import UserError
from duo_id.report.budgets import Budget, budgets_of
from duo_id.report.figures import figures
from duo_id.report.paired import paired, paired_grids
from duo_id.report.summary import contenders, frame
from duo_id.report.tables import contender_grid, middle, task_grid, task_table
from tests.evaluate.saved import line_up, saved_results

HEADS = [("spans", "found"), ("pattern", "found"), ("baseline", "streaming")]
AT_SHARES = [
    {"kind": kind, "heads": heads, "sparsity": None, "cache": cache, "seed": None, "note": ""}
    for cache in (0.15, 0.5, 0.25)
    for kind, heads in HEADS
]


def test_budgets_in_words_and_in_order() -> None:
    half, quarter = Budget(cache=0.5), Budget(cache=0.25)
    assert [str(half), half.heading, half.in_words] == ["50% of cache", "50%\nof cache", "50% of the cache is kept"]
    streaming = Budget(sparsity=0.125)
    assert [str(streaming), streaming.heading] == ["12.5% stream", "12.5%\nstream"]
    assert streaming.in_words == "12.5% of the KV heads stream"
    assert sorted([quarter, half, Budget(0.75), Budget(0.0)]) == [Budget(0.0), Budget(0.75), half, quarter]


def test_both_kinds_stand_in_one_table() -> None:
    rows = frame(saved_results(contenders=line_up(sparsities=(0.5,)) + AT_SHARES))
    shares = [Budget(cache=0.5), Budget(cache=0.25), Budget(cache=0.15)]
    assert budgets_of(rows) == [Budget(0.5), *shares]
    table = contenders(rows)
    assert table["cache"].dropna().tolist() == [0.5] * 3 + [0.25] * 3 + [0.15] * 3
    assert table.loc[table["cache"].notna(), "kind"].tolist() == ["pattern", "spans", "baseline"] * 3
    grid = contender_grid(rows)
    assert list(grid.headings)[:4] == ["heads", "stream\n%", "cache\n%", "KV\nkept %"]
    lines = [[str(cell) for cell in cells[:3]] for cells in grid.sections["head patterns"]]
    assert ["found, spans", "-", "25"] in lines
    assert ["found", "50", "-"] in lines
    at_quarter = task_grid(rows, "rise", Budget(cache=0.25))
    assert list(at_quarter.headings)[2:] == ["found", "found, spans", "streaming"]
    assert "25% of the cache is kept" in str(task_table(rows, "Tiny", "rise", cache=0.25).title)


def test_shares_of_the_cache_alone() -> None:
    results = saved_results(contenders=line_up(peers=False)[:1] + AT_SHARES)
    rows = frame(results)
    assert middle(rows) == Budget(cache=0.5)
    drawn = figures(results)
    legend = [text.get_text() for text in drawn["budget-rise"].legends[0].get_texts()]
    assert legend == ["found", "found, spans", "streaming", "full attention"]
    titles = [axes.get_title(loc="left") for axes in drawn["tasks"].axes]
    assert titles == ["50% of cache", "25% of cache", "15% of cache"]


def test_spans_are_compared_with_the_masks_of_the_same_pattern() -> None:
    results = saved_results(contenders=line_up(peers=False)[:1] + AT_SHARES)
    differences = paired(frame(results), "found")
    assert set(zip(differences["kind"], differences["cache"], strict=True)) == {
        (kind, cache) for kind in ("spans", "baseline") for cache in (0.5, 0.25, 0.15)
    }
    grid = next(iter(paired_grids(results).values()))
    assert list(grid.headings) == ["heads", "50%\nof cache", "25%\nof cache", "15%\nof cache"]
    assert str(grid.sections[""][0][0]) == "found, spans"


@pytest.mark.parametrize("share", [0.5, None], ids=["both", "neither"])
def test_a_row_has_one_budget(share: float | None) -> None:
    results = saved_results(samples=1)
    results["rows"][1] |= {"sparsity": share, "cache": share}
    with pytest.raises(UserError, match="either a sparsity or a share of the cache"):
        frame(results)
