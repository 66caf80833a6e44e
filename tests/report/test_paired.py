"""Paired comparisons: what both share adds no uncertainty, and questions that one lacks are left out."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from duo_id.common.errors import UserError
from duo_id.report.budgets import Budget
from duo_id.report.paired import paired, paired_grids
from duo_id.report.rows import QUESTION
from duo_id.report.summary import CONTENDER, frame, summarise
from tests.evaluate.saved import SPARSITIES, TASKS, a_pattern, line_up, saved_results

NAMES = ("found", "other#0", "other#1", "other#2")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """A pattern, three seeds of another, and baselines."""
    return saved_results(5, contenders=line_up(NAMES), patterns={name: a_pattern() for name in NAMES})


def with_twin(rows: pd.DataFrame, **changes: Any) -> pd.DataFrame:
    """The rows, plus those of a contender `twin`, a copy of `found` with changes."""
    twin = rows[(rows["kind"] == "pattern") & (rows["heads"] == "found")]
    return pd.concat([rows, twin.assign(heads="twin", **changes)], ignore_index=True)


def row_of(differences: pd.DataFrame, heads: str, sparsity: float = 0.5) -> pd.Series:
    (row,) = [row for _, row in differences.iterrows() if (row["heads"], row["sparsity"]) == (heads, sparsity)]
    return row


def test_values_are_those_of_the_contenders_apart(results: dict[str, Any]) -> None:
    rows = frame(results)
    unpaired = summarise(rows).set_index(CONTENDER)
    differences = paired(rows, "found")
    assert set(differences["heads"]) == {"other", "random", "streaming", "window", "snapkv"}
    assert len(differences) == 5 * len(SPARSITIES)
    for row in differences.to_dict("records"):
        contender, reference = (
            unpaired.loc[tuple(row[key] for key in CONTENDER)],
            unpaired.loc["pattern", "found", row["budget"]],
        )
        assert row["rise"] == pytest.approx(contender["rise"] - reference["rise"])
        assert row["ratio"] == pytest.approx(contender["rise"] / reference["rise"])
        assert row["rise_low"] <= row["rise"] <= row["rise_high"]
        if np.isfinite(contender["kl"]):
            assert row["kl"] == pytest.approx(contender["kl"] - reference["kl"])


def test_what_both_have_in_common_is_certain(results: dict[str, Any]) -> None:
    rows = frame(results)
    loss = rows.loc[(rows["kind"] == "pattern") & (rows["heads"] == "found")]
    full = loss.merge(rows.loc[rows["kind"] == "full", [*QUESTION, "loss"]], on=QUESTION, suffixes=("", "_full"))
    shifted = row_of(paired(with_twin(rows, loss=loss["loss"] + 0.25 * loss["tokens"]), "found"), "twin")
    assert [shifted[f"rise{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.25] * 3)
    doubled = (2 * full["loss"] - full["loss_full"]).to_numpy()
    twice = row_of(paired(with_twin(rows, loss=doubled), "found"), "twin")
    assert [twice[f"ratio{end}"] for end in ("", "_low", "_high")] == pytest.approx([2.0] * 3)
    twin = row_of(paired(with_twin(rows), "found"), "twin")
    assert [twin[f"rise{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    unpaired = summarise(rows).set_index(CONTENDER).loc["pattern", "found", Budget(sparsity=0.5)]
    assert unpaired["rise_high"] - unpaired["rise_low"] > 0.005, "though each is uncertain"


def test_intervals_are_those_of_a_slow_reference(results: dict[str, Any]) -> None:
    rows = frame(results)
    rows = rows[(rows["task"] == "json-lookup") & ((rows["kind"] == "full") | (rows["sparsity"] == 0.5))]
    row, random = row_of(paired(rows, "found"), "other"), np.random.default_rng(1)
    full = rows[rows["kind"] == "full"].set_index(QUESTION)["loss"]
    samples = sorted(set(rows.set_index(["length", "index"]).index))

    def rise(heads: str, seed: float | None, sample: tuple[int, int]) -> tuple[float, float]:
        picked = rows[(rows["heads"] == heads) & (rows["length"] == sample[0]) & (rows["index"] == sample[1])]
        picked = picked if seed is None else picked[picked["seed"] == seed]
        return (
            picked["loss"].to_numpy() - full.loc[list(picked[QUESTION].itertuples(index=False))].to_numpy()
        ).sum(), picked["tokens"].sum()

    table = {(seed, sample): rise("other", seed, sample) for seed in (0, 1, 2) for sample in samples}
    reference_rises = {sample: rise("found", None, sample) for sample in samples}
    above, below = (
        np.array([[table[seed, sample][part] for sample in samples] for seed in range(3)]) for part in (0, 1)
    )
    their_above, their_below = np.array([reference_rises[sample] for sample in samples]).T
    value, their_value = above.sum() / below.sum(), their_above.sum() / their_below.sum()
    off = (above - value * below) / below.sum()
    their_off = (their_above - their_value * their_below) / their_below.sum()
    draws, degrees = [], len(samples) - 1
    for _ in range(8000):
        of_seeds = np.sqrt(3 / 2) * np.sqrt(2 / random.chisquare(2)) * random.normal(size=3)
        of_samples = np.sqrt(len(samples) / degrees) * np.sqrt(degrees / random.chisquare(degrees))
        of_samples = of_samples * random.normal(size=len(samples))
        draws.append(value - their_value + of_seeds @ off.sum(1) + of_samples @ (off.sum(0) - their_off))
    low, high = np.percentile(draws, [2.5, 97.5])
    assert row["rise_low"] == pytest.approx(low, abs=0.05 * (high - low))
    assert row["rise_high"] == pytest.approx(high, abs=0.05 * (high - low))


def test_questions_that_one_lacks_are_left_out(results: dict[str, Any]) -> None:
    rows = with_twin(frame(results))
    lacking = (rows["heads"] == "twin") & ((rows["task"] == "language") | (rows["index"] == 0))
    some = rows[~lacking]
    shared = some[(some["task"] != "language") & (some["index"] != 0)]
    actual, expected = paired(some, "other"), paired(shared, "other")
    for metric in ("rise", "kl", "ratio"):
        assert row_of(actual, "twin")[metric] == pytest.approx(row_of(expected, "twin")[metric])
    assert row_of(actual, "twin")["samples"] == (len(TASKS) - 1) * 2 * 4
    assert row_of(actual, "found")["samples"] == len(TASKS) * 2 * 5
    nothing = rows[~((rows["heads"] == "twin") & (rows["sparsity"] == 0.5))]
    assert set(paired(nothing, "twin")["sparsity"]) == {0.25, 0.75}


def test_a_ratio_to_nothing_is_no_ratio(results: dict[str, Any]) -> None:
    rows = frame(results)
    full = rows[rows["kind"] == "full"].set_index(QUESTION)["loss"]
    exact = full.loc[list(rows[rows["heads"] == "found"][QUESTION].itertuples(index=False))].to_numpy()
    assert paired(with_twin(rows, loss=exact), "twin")["ratio"].isna().all()
    assert paired(with_twin(rows, loss=exact), "found").set_index("heads").loc["twin", "ratio"].eq(0).all()
    index = rows.loc[rows["heads"] == "found", "index"].to_numpy()
    noise = np.where(index == 0, 1.0, -0.2)  # slightly above 0, but not significantly
    unsure = paired(with_twin(rows, loss=exact + noise), "twin")
    assert (unsure["rise"] > 0).any()
    assert unsure["ratio"].isna().all()


def test_tasks_are_counted(results: dict[str, Any]) -> None:
    rows = frame(results)
    base = rows[rows["heads"] == "found"]
    added = base["task"].map(dict(zip(TASKS, (0.1, 0.1, 0.0, -0.1), strict=True)))
    added += np.where(base["task"] == TASKS[2], np.where(base["index"] == 0, 1.0, -0.05), 0)  # one sample decides
    twin = base.assign(heads="twin", loss=base["loss"] + added * base["tokens"]).to_dict("records")
    changed = results | {"rows": results["rows"] + twin, "patterns": results["patterns"] | {"twin": {}}}
    grids = paired_grids(changed, "found")
    assert list(grids) == [
        "Rise in answer loss minus that of found (nats per token)",
        "Rise in answer loss as a multiple of that of found",
        "KL from full attention minus that of found (nats per token)",
        "Tasks on which they lose more than found, in brackets those beyond the interval",
    ]
    first, *_, tasks = grids.values()
    assert first.headings == ["heads", "25%\nstream", "50%\nstream", "75%\nstream"]
    (line,) = [line for line in tasks.sections[""] if line[0].text == "twin"]
    assert [cell.text for cell in line[1:]] == ["3 (2) of 4"] * 3
    assert {"twin", "other (3 seeds)"} <= {line[0].text for line in first.sections[""]}
    means = [sum(cell.value for cell in line[1:]) for line in first.sections[""]]
    assert means == sorted(means), "the least harm first"


def test_the_first_pattern_is_the_reference_unless_another_is_named(results: dict[str, Any]) -> None:
    assert all("found" in title for title in paired_grids(results))
    assert all("other" in title for title in paired_grids(results, "other"))
    assert paired_grids(saved_results(1)) == {}
    with pytest.raises(UserError, match=r"reference=random: no such heads in these results, choose among found, other"):
        paired_grids(results, "random")
