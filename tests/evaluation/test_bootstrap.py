"""Resamples of groups of rows: what is drawn together, and what apart."""

import numpy as np

from duo_id.evaluation.bootstrap import RESAMPLES, _Resamples, draw, with_intervals
from duo_id.evaluation.summary import CONTENDER, METRICS, frame
from tests.evaluation.saved import TASKS, saved_results


def test_masks_and_samples_are_drawn_apart() -> None:
    resamples = _Resamples(0)
    samples, seeds = (resamples.weights(kind, np.arange(3)) for kind in ("samples", "seeds"))
    assert (samples != seeds).any()
    assert resamples.weights("seeds", np.arange(3)) is seeds


def test_groups_of_the_same_samples_take_the_same_resamples() -> None:
    rows = frame(saved_results())
    own = rows[(rows["kind"] == "pattern") & (rows["sparsity"] == 0.5)]
    groups = {group.key["heads"]: group for group in draw(rows, CONTENDER) if group.key["sparsity"] in (0.0, 0.5)}
    full, found = groups["full"], groups["found"]
    assert found.values.keys() == METRICS.keys()
    assert (found.samples, found.seeds, found.certain) == (len(TASKS) * 2 * 4, 1, False)
    assert found.values["rise"].shape == (1 + RESAMPLES,)
    np.testing.assert_allclose(found.values["loss"] - full.values["loss"], found.values["rise"], atol=1e-9)
    of_tasks = own.groupby("task")[["loss", "tokens"]].sum()
    assert found.values["loss"][0] == (of_tasks["loss"] / of_tasks["tokens"]).mean()


def test_intervals_are_the_middle_of_what_was_drawn() -> None:
    drawn = {"loss": np.array([5.0, *range(101)]), "kl": np.array([1.0, *[np.nan] * 101])}
    found = with_intervals(drawn, certain=False)
    assert (found["loss"], found["loss_low"], found["loss_high"]) == (5, 2.5, 97.5)
    assert found["kl"] == 1
    assert np.isnan([found["kl_low"], with_intervals(drawn, certain=True)["loss_low"]]).all()
