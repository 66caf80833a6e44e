"""Draws for groups of rows: what they share, and how often intervals cover the truth."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from duo_id.report.bootstrap import DRAWS, _Multipliers, bootstrap, with_intervals
from duo_id.report.summary import COLUMNS, CONTENDER, REPORTED, frame, summarise
from tests.evaluate.saved import TASKS, saved_results

STUDENT = {2: 4.303, 4: 2.776, 7: 2.365, 39: 2.023}  # 97.5% quantiles by degrees of freedom, from tables


def experiment(losses: np.ndarray, tokens: np.ndarray | None = None) -> pd.DataFrame:
    """Rows of losses (lengths, seeds, tasks, samples), all from seeds of one contender."""
    lengths, seeds, tasks, samples = np.indices(losses.shape).reshape(4, -1)
    columns = {"task": np.array(["a", "b", "c", "d"])[tasks], "length": lengths, "index": samples, "seed": seeds}
    counts = np.ones(losses.shape) if tokens is None else np.broadcast_to(tokens, losses.shape)
    template: dict[str, Any] = dict.fromkeys(COLUMNS) | {"question": 0, "kind": "baseline", "heads": "random"}
    values = columns | {"loss": losses.ravel(), "tokens": counts.ravel(), "sparsity": 0.5}
    return frame({"rows": pd.DataFrame(template | values).to_dict("records")})


@pytest.mark.parametrize(
    ("seeds", "tasks", "samples", "of_seeds", "of_samples"),
    [
        (3, 1, 8, 0.03, 0.1),
        (3, 4, 8, 0.03, 0.05),  # dominated by seeds
        (3, 2, 8, 0.0, 0.1),  # dominated by samples
        (1, 1, 8, 0.03, 0.1),
        (5, 2, 4, 0.03, 0.1),
        (2, 4, 8, 0.1, 0.05),
    ],
)
def test_intervals_hold_the_truth(seeds: int, tasks: int, samples: int, of_seeds: float, of_samples: float) -> None:
    """500 experiments in which seeds and samples each contribute to the loss, 1 on average."""
    random = np.random.default_rng(0)
    losses = 1 + random.normal(0, of_samples, (500, 1, tasks, samples))
    losses = losses + (seeds > 1) * random.normal(0, of_seeds, (500, seeds, 1, 1))
    statistics = summarise(experiment(losses), ["length"])
    covered = ((statistics["loss_low"] <= 1) & (statistics["loss_high"] >= 1)).mean()
    assert 0.92 <= covered <= 0.98


def test_intervals_are_those_of_student() -> None:
    """With one source of randomness; the ends are drawn themselves, so a few percent are noise."""
    random = np.random.default_rng(1)
    for shape, axis in (((1, 3, 1, 1), 1), ((1, 1, 1, 8), 3), ((1, 5, 1, 1), 1)):
        losses, count = random.normal(1, 0.02, shape), shape[axis]
        (statistics,) = summarise(experiment(losses), ["length"]).to_dict("records")
        half = STUDENT[count - 1] * losses.std(ddof=1) / np.sqrt(count)
        assert statistics["loss_high"] - statistics["loss"] == pytest.approx(half, rel=0.1)
        assert statistics["loss"] - statistics["loss_low"] == pytest.approx(half, rel=0.1)
    losses, tokens = random.normal(1, 0.2, (1, 1, 1, 40)), random.integers(1, 9, (1, 1, 1, 40))
    (statistics,) = summarise(experiment(losses * tokens, tokens), ["length"]).to_dict("records")
    mean = (losses * tokens).sum() / tokens.sum()
    spread = np.sqrt(40 / 39 * (((losses - mean) * tokens) ** 2).sum()) / tokens.sum()  # of a ratio, by linearisation
    assert statistics["loss_high"] - statistics["loss_low"] == pytest.approx(2 * STUDENT[39] * spread, rel=0.1)


def test_draws_are_those_of_a_slow_reference() -> None:
    """Draw by draw, over seeds and samples of two tasks with different numbers of samples."""
    random = np.random.default_rng(2)
    rows = experiment(random.normal(1, 0.2, (1, 3, 2, 6)))
    rows = rows[(rows["task"] == "a") | (rows["index"] < 4)]
    (group,) = bootstrap(rows, ["length"])
    off = [
        [(of_task.groupby(unit)["loss"].mean() - of_task["loss"].mean()).to_numpy() for unit in ("seed", "index")]
        for _, of_task in rows.groupby("task")
    ]
    expected = np.full(20000, rows.groupby("task")["loss"].mean().mean())
    for draw in range(len(expected)):
        of_samples = np.sqrt(8 / random.chisquare(8))
        of_seeds = np.sqrt(3 / 2) * np.sqrt(2 / random.chisquare(2)) * random.normal(size=3)  # the same for both tasks
        for by_seed, by_sample in off:
            count = len(by_sample)
            normal = np.sqrt(count / (count - 1)) * of_samples * random.normal(size=count)
            expected[draw] += ((of_seeds * by_seed).mean() + (normal * by_sample).mean()) / 2
    ours, slow = (np.percentile(values, [2.5, 25, 75, 97.5]) for values in (group.values["loss"][1:], expected))
    np.testing.assert_allclose(ours, slow, atol=0.05 * (slow[3] - slow[0]))


def test_masks_and_samples_are_drawn_apart() -> None:
    multipliers = _Multipliers(0)
    samples, seeds = (multipliers.of(kind, np.arange(3)) for kind in ("samples", "seeds"))
    assert samples.shape == (DRAWS, 3)
    assert (samples != seeds).any()
    assert (multipliers.scale("samples", 2) != multipliers.scale("seeds", 2)).any()
    assert multipliers.of("seeds", np.arange(3)) is seeds
    assert not multipliers.of("seeds", np.arange(1)).any()


def test_groups_of_the_same_samples_take_the_same_draws() -> None:
    rows = frame(saved_results())
    pattern_rows = rows[(rows["kind"] == "pattern") & (rows["sparsity"] == 0.5)]
    groups = {
        group.key["heads"]: group for group in bootstrap(rows, CONTENDER) if group.key["budget"].share in (0.0, 0.5)
    }
    full, masked = groups["full"], groups["found"]
    assert masked.values.keys() == REPORTED.keys()
    assert (masked.samples, masked.seeds, masked.single_draw) == (len(TASKS) * 2 * 4, 1, False)
    assert masked.values["rise"].shape == (1 + DRAWS,)
    np.testing.assert_allclose(masked.values["loss"] - full.values["loss"], masked.values["rise"], atol=1e-9)
    of_tasks = pattern_rows.groupby("task")[["loss", "tokens"]].sum()
    assert masked.values["loss"][0] == (of_tasks["loss"] / of_tasks["tokens"]).mean()


def test_intervals_are_the_middle_of_what_was_drawn() -> None:
    draws = {"loss": np.array([5.0, *range(101)]), "kl": np.array([1.0, *[np.nan] * 101])}
    intervals = with_intervals(draws, single_draw=False)
    assert (intervals["loss"], intervals["loss_low"], intervals["loss_high"]) == (5, 2.5, 97.5)
    assert intervals["kl"] == 1
    assert np.isnan([intervals["kl_low"], with_intervals(draws, single_draw=True)["loss_low"]]).all()


def test_intervals_end_where_values_do() -> None:
    draws = {"score": np.array([0.5, *np.linspace(-1, 3, 101)]), "rise": np.array([0.5, *np.linspace(-1, 3, 101)])}
    intervals = with_intervals(draws, False, {"score": (0.0, 1.0)})
    assert (intervals["score_low"], intervals["score_high"]) == (0, 1)
    assert (intervals["rise_low"], intervals["rise_high"]) == pytest.approx((-0.9, 2.9))
    beyond = with_intervals({"kl": np.array([-1e-9, *[-1.0] * 9])}, False, {"kl": (0.0, np.inf)})
    assert beyond["kl_low"] == -1e-9, "the value lies in its interval despite rounding"
    nothing = with_intervals({"score": np.full(5, np.nan)}, False, {"score": (0.0, 1.0)})
    assert np.isnan(list(nothing.values())).all()
