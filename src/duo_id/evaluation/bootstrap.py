"""The bootstrap: statistics of groups of rows, and of resamples of their samples and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from duo_id.evaluation.items import QUESTION, SAMPLE

RESAMPLES = 1000


@dataclass(frozen=True)
class Drawn:
    """The statistics of one group of rows, and of its resamples.

    Attributes:
        key: what the rows have in common.
        samples: how many there are.
        seeds: how many of patterns or masks.
        values: (1 + resamples,) of each statistic, the first of the rows themselves; NaN where nothing was measured.
        certain: whether there is but one sample a task and one seed, so that resamples tell nothing.
    """

    key: dict[str, Any]
    samples: int
    seeds: int
    values: dict[str, np.ndarray]
    certain: bool


def draw(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> list[Drawn]:
    """The statistics of each group of rows: those with the same samples, or seeds, take the same resamples of them.

    Args:
        rows: as `duo_id.evaluation.summary.frame` gives them, those of full attention among them.
        by: columns, at least one; one group for each combination of their values.
        seed: of the resamples.
    """
    fractions = _fractions(rows)
    keys = pd.DataFrame({column: rows[column].to_numpy() for column in by})
    keys["the task"] = rows["task"].to_numpy()
    keys["the seed"] = rows["seed"].fillna(-1).to_numpy()
    keys["the sample"] = rows.groupby(SAMPLE).ngroup().to_numpy()
    parts = np.stack([part for fraction in fractions.values() for part in fraction], axis=1)  # (rows, 2 x fractions)
    sums = keys.join(pd.DataFrame(parts)).groupby(list(keys), dropna=False).sum()
    places, values, resamples = sums.index.to_frame(index=False), sums.to_numpy(), _Resamples(seed)
    names = list(places[list(by)].itertuples(index=False, name=None))
    groups = places.groupby(list(by), dropna=False).ngroup().to_numpy()
    tasks, seeds, samples = (pd.factorize(places[f"the {unit}"])[0] for unit in ("task", "seed", "sample"))
    found = []
    for group in range(groups.max() + 1):
        of_group = np.flatnonzero(groups == group)
        cells = [of_group[tasks[of_group] == task] for task in np.unique(tasks[of_group])]
        totals = [resamples.total(values[cell], samples[cell], seeds[cell]) for cell in cells]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = dict(
                zip(fractions, _mean(np.stack([total[:, 0::2] / total[:, 1::2] for total in totals])).T, strict=True)
            )
            for name in ("accuracy", "score"):
                ratio = means.pop(f"shared_{name}") / means[f"full_{name}"]
                means[f"relative_{name}"] = np.where(means.pop(f"full_{name}") > 0, ratio, np.nan)
        counts = [len(np.unique(samples[cell])) for cell in cells]
        masks = len(np.unique(seeds[of_group]))
        key = dict(zip(by, names[of_group[0]], strict=True))
        found.append(Drawn(key, sum(counts), masks, means, max(counts) == 1 and masks == 1))
    return found


def with_intervals(drawn: Mapping[str, np.ndarray], certain: bool) -> dict[str, float]:
    """Each statistic (1 + resamples) as its value NAME and the ends NAME_low and NAME_high of its 95% interval."""
    values = np.stack(list(drawn.values()), axis=1)
    ends = np.full((2, len(drawn)), np.nan) if certain else _intervals(values[1:])
    row: dict[str, float] = {}
    for name, value, low, high in zip(drawn, values[0], *ends, strict=True):
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


class _Resamples:
    """Bootstrap weights, the first of which are ones: the sample itself. Equal sets of one kind get equal weights."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.known: dict[tuple[str, bytes], np.ndarray] = {}

    def weights(self, kind: str, units: np.ndarray) -> np.ndarray:
        """How often each unit of a kind is drawn: (1 + resamples, units)."""
        key, count = (kind, units.tobytes()), len(units)
        if key not in self.known:
            drawn = self.random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            self.known[key] = np.vstack([np.ones(count), drawn])
        return self.known[key]

    def total(self, values: np.ndarray, samples: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """The sums (1 + resamples, columns) of values (lines, columns), one line a sample and seed."""
        samples, sample = np.unique(samples, return_inverse=True)
        seeds, seed = np.unique(seeds, return_inverse=True)
        table = np.zeros((len(seeds), len(samples), values.shape[1]))
        table[seed, sample] = values
        drawn, drawn_seeds = self.weights("samples", samples), self.weights("seeds", seeds)
        return np.einsum("rs,srk->rk", drawn_seeds, drawn @ table)


def _fractions(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators, one value a row, whose ratio of sums is a statistic; 0 where it is unknown."""
    measured = ["loss", "correct", "score", "bytes"]
    full = rows.loc[rows["kind"] == "full", [*QUESTION, *measured]].drop_duplicates(QUESTION)
    full = rows[QUESTION].merge(full, on=QUESTION, how="left")
    own = {column: rows[column].to_numpy(float) for column in [*measured, "kl", "tokens", "exact"]}
    of_full = {column: full[column].to_numpy(float) for column in measured}
    tokens, one = own["tokens"], np.ones(len(rows))
    pairs = {
        "kept": (own["bytes"], of_full["bytes"]),
        "loss": (own["loss"], tokens),
        "rise": (own["loss"] - of_full["loss"], tokens),
        "kl": (own["kl"], tokens),
        "accuracy": (own["correct"], tokens),
        "exact": (own["exact"], one),
        "score": (own["score"], one),
        "shared_accuracy": (own["correct"] + 0 * of_full["correct"], tokens),  # NaN where either is
        "full_accuracy": (of_full["correct"] + 0 * own["correct"], tokens),
        "shared_score": (own["score"] + 0 * of_full["score"], one),
        "full_score": (of_full["score"] + 0 * own["score"], one),
    }
    known = {name: np.isfinite(above) & np.isfinite(below) for name, (above, below) in pairs.items()}
    return {name: tuple(np.where(known[name], part, 0) for part in pair) for name, pair in pairs.items()}  # type: ignore[misc]


def _mean(votes: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is finite there; NaN where nothing is."""
    finite = np.isfinite(votes)
    with np.errstate(invalid="ignore"):
        return np.where(finite, votes, 0).sum(0) / finite.sum(0)


def _intervals(drawn: np.ndarray) -> np.ndarray:
    """The ends (2, metrics) of the middle 95% of what was drawn (resamples, metrics), where that is a number."""
    finite = np.isfinite(drawn)
    ends = np.full((2, drawn.shape[1]), np.nan)
    whole = finite.all(0)
    ends[:, whole] = np.percentile(drawn[:, whole], [2.5, 97.5], axis=0)
    for column in np.flatnonzero(finite.any(0) & ~whole):
        ends[:, column] = np.percentile(drawn[finite[:, column], column], [2.5, 97.5])
    return ends
