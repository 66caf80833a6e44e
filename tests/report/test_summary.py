"""Statistics by hand, intervals that cover, and results that cannot be read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from duo_id.common.errors import UserError
from duo_id.report.rows import THIRDS, WRITTEN
from duo_id.report.summary import COLUMNS, REPORTED, contenders, frame, load_results, name_of, summarise
from tests.evaluate.saved import line_up, save, saved_results

FULL, MASK = ("full", "full", 0.0), ("pattern", "found", 0.5)


def row(task: str, index: int, contender: tuple[str, str, float], loss: float, tokens: int, **columns: Any) -> dict:
    kind, heads, sparsity = contender
    base = {"task": task, "length": 1000, "index": index, "question": 0, "depth": None, "kind": kind, "heads": heads}
    measured = {"loss": loss, "tokens": tokens, "kl": 0.0, "correct": 0, "score": None, "exact": None, "text": None}
    return base | {"sparsity": sparsity, "seed": None, "bytes": 100} | measured | columns


def rows_of(*rows: dict) -> pd.DataFrame:
    return frame({"rows": rows})


def only(rows: pd.DataFrame, kind: str = "pattern", **options: Any) -> pd.Series:
    statistics = summarise(rows, **options)
    return statistics[statistics["kind"] == kind].squeeze()


def written(agreed: int, same: int, length: int, along: float, own: float, repeated: float) -> dict[str, Any]:
    """Columns of a free text, where full attention wrote four tokens."""
    return dict(zip(WRITTEN, (4, along, same, agreed, length, own, repeated), strict=True))


def by_hand() -> pd.DataFrame:
    """Task a: two samples of 1 and 3 tokens; task b: one of 10 tokens, without generated answers."""
    return rows_of(
        row("a", 0, FULL, 1.0, 1, correct=1, score=1.0, exact=True, **written(4, 4, 4, 0.0, 0.0, 0.0)),
        row("a", 1, FULL, 3.0, 3, correct=3, score=0.5, exact=False),
        row("b", 0, FULL, 20.0, 10, correct=5),
        row(
            "a",
            0,
            MASK,
            2.0,
            1,
            correct=1,
            score=0.75,
            exact=False,
            kl=0.5,
            bytes=50,
            pieces="1000010",
            **written(2, 3, 8, 2.0, 4.0, 0.25),
        ),
        row("a", 1, MASK, 4.0, 3, correct=1, score=0.0, exact=False, kl=0.7, bytes=70),
        row("b", 0, MASK, 25.0, 10, correct=3, kl=2.0, bytes=30),
    )


def test_values_by_hand() -> None:
    statistics = only(by_hand())
    expected = {
        "kept": (120 / 200 + 0.3) / 2,
        "loss": (6 / 4 + 25 / 10) / 2,  # tokens of a task are pooled, tasks weigh the same
        "rise": ((6 - 4) / 4 + (25 - 20) / 10) / 2,
        "kl": (1.2 / 4 + 2 / 10) / 2,
        "accuracy": (2 / 4 + 3 / 10) / 2,
        "relative_accuracy": (2 / 4 + 3 / 10) / (4 / 4 + 5 / 10),
        "exact": 0.0,
        "score": 0.375,  # of task a alone
        "relative_score": 0.375 / 0.75,
        "first_third": 1 / 2,
        "middle_third": 0,
        "last_third": 1 / 3,
        "agreed": 2,
        "agreement": 3 / 4,
        "along": 2 / 4,
        "drift": 4 / 8,
        "written": 8 / 4,
        "repeated": 0.25,
    }
    assert expected.keys() == REPORTED.keys()
    for metric, value in expected.items():
        assert statistics[metric] == pytest.approx(value), metric
    assert (statistics["samples"], statistics["seeds"]) == (3, 1)
    full = only(by_hand(), "full")
    assert [full[metric] for metric in ("kept", "rise", "relative_score", "exact")] == [1, 0, 1, 0.5]


def test_the_cache_that_is_kept_is_that_of_whole_answers() -> None:
    """Where both were generated; elsewhere that of the contexts, 70 of 100 in a and 30 of 100 in b."""
    rows = by_hand().assign(total_bytes=np.nan)
    first = (rows["task"] == "a") & (rows["index"] == 0)
    rows.loc[first, "total_bytes"] = np.where(rows.loc[first, "kind"] == "full", 400, 110)
    rows.loc[(rows["task"] == "b") & (rows["kind"] == "full"), "total_bytes"] = 900
    assert only(rows)["kept"] == pytest.approx(((110 + 70) / (400 + 100) + 0.3) / 2)


def test_intervals_by_hand() -> None:
    """Two samples, 1 degree of freedom: 12.7 standard errors, clipped to possible values."""
    statistics = only(by_hand()[lambda rows: rows["task"] == "a"])
    off = np.array([2.0 - 1.5 * 1, 4.0 - 1.5 * 3]) / 4
    error = math.sqrt(2 * (off**2).sum())
    assert statistics["loss_high"] == pytest.approx(1.5 + 12.706 * error, rel=0.15)
    assert statistics["loss_low"] == 0
    assert (statistics["relative_score_low"], statistics["score_low"], statistics["score_high"]) == (0, 0, 1)


def test_groups_of_one_sample_have_no_interval() -> None:
    statistics = only(by_hand()[lambda rows: rows["task"] == "b"])
    assert statistics["loss"] == 2.5
    assert math.isnan(statistics["loss_low"])
    assert math.isnan(statistics["score"])
    assert math.isnan(statistics["relative_score_high"])


def test_only_questions_that_full_attention_answered_too_are_relative_to_it() -> None:
    rows = by_hand()
    rows = rows[(rows["kind"] != "full") | (rows["index"] == 0) & (rows["task"] == "a")]
    statistics = only(rows)
    assert statistics["loss"] == pytest.approx(2.0)
    assert statistics["rise"] == pytest.approx((2 - 1) / 1)
    assert statistics["relative_score"] == pytest.approx(0.75)
    alone = only(rows[rows["kind"] != "full"])
    assert alone["loss"] == pytest.approx(2.0)
    assert math.isnan(alone["rise"])
    assert math.isnan(alone["kept"])


def test_where_full_attention_scores_nothing_no_ratio_is_given() -> None:
    rows = rows_of(row("a", 0, FULL, 1, 1, score=0.0), row("a", 0, MASK, 1, 1, score=0.5))
    assert math.isnan(only(rows)["relative_score"])


def test_questions_of_a_sample_are_resampled_together() -> None:
    """Questions that agree within each sample add no information."""
    values = np.random.default_rng(1).normal(size=20)
    once = rows_of(*(row("a", index, MASK, value, 1) for index, value in enumerate(values)))
    many = [row("a", index, MASK, value, 1, question=q) for index, value in enumerate(values) for q in range(10)]
    one, ten = only(once), only(rows_of(*many))
    assert (one["loss_low"], one["loss_high"]) == pytest.approx((ten["loss_low"], ten["loss_high"]))
    assert ten["samples"] == 20


def test_random_masks_are_resampled_too() -> None:
    random = ("baseline", "random", 0.5)
    rows = [row("a", index, random, 10.0 * seed, 1, seed=seed) for index in range(50) for seed in range(3)]
    statistics = only(rows_of(*rows), "baseline")
    assert (statistics["loss"], statistics["seeds"]) == (10, 3)
    assert statistics["loss_low"] < 5  # though all samples agree, the masks do not
    assert statistics["loss_high"] > 15
    single = summarise(rows_of(*rows), ["kind", "seed"])
    assert single["loss"].tolist() == [0, 10, 20]
    assert (single["loss_low"] == single["loss_high"]).all()


def test_intervals_cover_the_truth() -> None:
    """About 95% of the intervals of 100 experiments with 40 samples cover the mean."""
    values = np.random.default_rng(0).normal(1.0, 0.5, size=(100, 40))
    rows = [row("a", index, MASK, value, 1, length=length) for (length, index), value in np.ndenumerate(values)]
    statistics = summarise(rows_of(*rows), ["length"])
    hits = ((statistics["loss_low"] <= 1.0) & (statistics["loss_high"] >= 1.0)).sum()
    assert 88 <= hits <= 99
    widths = statistics["loss_high"] - statistics["loss_low"]
    assert widths.mean() == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.08)


def test_the_difference_is_surer_than_its_sides() -> None:
    """Samples differ greatly in difficulty, but the mask costs all of them about the same."""
    hard = np.random.default_rng(0).normal(5, 2, size=30)
    rows = [row("a", index, FULL, value, 1) for index, value in enumerate(hard)]
    rows += [row("a", index, MASK, value + 0.1 * (index % 2), 1) for index, value in enumerate(hard)]
    statistics = only(rows_of(*rows))
    assert statistics["rise"] == pytest.approx(0.05)
    assert (
        statistics["rise_high"] - statistics["rise_low"] < 0.05 < 1 < statistics["loss_high"] - statistics["loss_low"]
    )


def test_groups_may_have_any_columns() -> None:
    rows = frame(saved_results(samples=1, contenders=line_up(peers=False)))
    statistics = summarise(rows, ["task", "length", "depth", "kind", "heads", "sparsity", "seed"])
    assert set(statistics["task"]) == set(rows["task"])
    assert len(statistics) == len(
        rows.groupby(["task", "length", "depth", "kind", "heads", "sparsity", "seed"], dropna=False)
    )
    assert statistics.loc[statistics["task"] == "language", "score"].isna().all()
    assert summarise(rows).equals(summarise(rows)), "a function of its arguments"


def test_contenders_stand_in_the_order_of_tables() -> None:
    statistics = contenders(frame(saved_results(samples=1)))
    assert statistics["kind"].tolist() == ["full"] + ["pattern", *["baseline"] * 3] * 3 + ["eviction"] * 3
    assert statistics["sparsity"].tolist() == [0.0] + [0.25] * 4 + [0.5] * 4 + [0.75] * 4 + [0.25, 0.5, 0.75]
    assert statistics.loc[statistics["heads"] == "random", "seeds"].tolist() == [5, 5, 5]


def test_results_come_back_from_the_disk(tmp_path: Path) -> None:
    results = saved_results(samples=1, contenders=line_up(peers=False))
    folder = save(tmp_path / "run", results)
    assert load_results(folder) == load_results(folder / "results.json") == json.loads(json.dumps(results))
    rows = frame(load_results(folder))
    assert list(rows.columns) == [*COLUMNS, *THIRDS, "budget"]
    assert len(rows) == len(results["rows"])
    assert set(rows["exact"].dropna()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "does not hold the results of an evaluation"),
        ({"version": 2}, "has version 2, this duo_id reads version 1"),
        ({"rows": []}, "holds no rows"),
        ({"rows": [{"task": "a"}]}, r"rows\.0 lacks length, index"),
        ({"model": "m"}, "model='m' is no object"),
        ({"settings": None}, "settings=None is no object"),
        ({"rows": [3]}, r"rows\.0=3 is no object"),
        (None, "line 1, column 1: not JSON"),
    ],
)
def test_what_is_not_results_is_refused(change: dict | None, message: str, tmp_path: Path) -> None:
    results = saved_results(samples=1, tasks=("language",))
    (tmp_path / "results.json").write_text("{" if change is None else json.dumps(results | change))
    with pytest.raises(UserError, match=message) as error:
        load_results(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("column", "value"), [("kind", "nosuch"), ("task", None), ("length", "1000"), ("kind", [])])
def test_damaged_rows_are_named(column: str, value: object, tmp_path: Path) -> None:
    results = saved_results(samples=1, tasks=("language",))
    results["rows"][0][column] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=rf"results.json: rows\.0\.{column}="):
        load_results(tmp_path)


def test_results_need_full_attention(tmp_path: Path) -> None:
    results = saved_results(samples=1, tasks=("language",))
    masks = [row for row in results["rows"] if row["kind"] != "full"]
    (tmp_path / "results.json").write_text(json.dumps(results | {"rows": masks}))
    with pytest.raises(UserError, match="no rows of full attention"):
        load_results(tmp_path)


def test_missing_keys_files_and_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json is missing"):
        load_results(tmp_path)
    results = saved_results(samples=1, tasks=("language",))
    (tmp_path / "results.json").write_text(json.dumps({key: results[key] for key in ("schema", "version", "rows")}))
    with pytest.raises(UserError, match="lacks model, patterns, contenders"):
        load_results(tmp_path)
    results["rows"][0]["loss"] = "much"
    with pytest.raises(UserError, match="loss is not numeric"):
        frame(results)


def test_half_characters_are_replaced(tmp_path: Path) -> None:
    results = saved_results(samples=1, tasks=("language",))
    results["rows"][0]["text"], results["rows"][1]["text"] = "a \ud800", "\N{GRINNING FACE} \\ud800"
    rows = frame(load_results(save(tmp_path, results)))
    assert rows["text"].iloc[:2].tolist() == ["a ?", "\N{GRINNING FACE} \\ud800"]


def test_names_are_printable() -> None:
    assert name_of("full", "full") == "full attention"
    assert name_of("baseline", "random", 5) == "random (5 masks)"
    assert name_of("pattern", "a\nb\x00\ud800") == "a\ufffdb\ufffd\ufffd"
