"""The bootstrap: statistics of groups of rows, and draws of what other samples and seeds might have made of them.

A statistic has two sources of chance, and each has its own draws, added up: which samples a task has, and which seeds a
contender. Neither is drawn with replacement, for a mean of 3 seeds would then never leave their range: how far each
lies off is multiplied by what is drawn (Wu 1986, "Jackknife, bootstrap and other resampling methods in regression
analysis"), such that the mean of n normal values gets exactly the interval of Student's t with n - 1 degrees of
freedom, 4.3 standard errors to either side of 3 seeds. The samples of all tasks share their degrees. The sum of both
sources has the interval of Behrens and Fisher, which holds the truth in 95% of cases or a few more.
`scipy.stats.bootstrap` has neither: it draws units of one kind, with replacement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from duo_id.report.rows import QUESTION, SAMPLE

DRAWS = 4000  # even: every second one is another's mirror image
FINE = 64  # draws of a scale to each that is kept, which are then evenly spread


@dataclass(frozen=True)
class BootstrapDraws:
    """The statistics of one group of rows, and draws about them.

    Attributes:
        key: what the rows have in common.
        samples: how many there are.
        seeds: how many of patterns or masks.
        values: (1 + DRAWS,) of each statistic, the first of the rows themselves; NaN where nothing was measured.
        single_draw: whether there is but one sample a task and one seed, so that draws tell nothing.
    """

    key: dict[str, Any]
    samples: int
    seeds: int
    values: dict[str, np.ndarray]
    single_draw: bool


def bootstrap(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> Iterator[BootstrapDraws]:
    """The statistics of each group of rows: those with the same samples, or seeds, take the same draws of them.

    Args:
        rows: as `duo_id.report.summary.frame` gives them, those of full attention among them.
        by: columns, at least one; one group for each combination of their values.
        seed: of the draws.
    """
    fractions = _fractions(rows)
    keys = pd.DataFrame({column: rows[column].to_numpy() for column in by})
    keys["the task"] = rows["task"].to_numpy()
    keys["the seed"] = rows["seed"].fillna(-1).to_numpy()
    keys["the sample"] = rows.groupby(SAMPLE).ngroup().to_numpy()
    parts = np.stack([part for fraction in fractions.values() for part in fraction], axis=1)  # (rows, 2 x fractions)
    sums = keys.join(pd.DataFrame(parts)).groupby(list(keys), dropna=False).sum()
    places, values, multipliers = sums.index.to_frame(index=False), sums.to_numpy(), _Multipliers(seed)
    names = list(places[list(by)].itertuples(index=False, name=None))
    groups = places.groupby(list(by), dropna=False).ngroup().to_numpy()
    tasks, seeds, samples = (pd.factorize(places[f"the {unit}"])[0] for unit in ("task", "seed", "sample"))
    for group in range(groups.max() + 1):
        of_group = np.flatnonzero(groups == group)
        cells = [of_group[tasks[of_group] == task] for task in np.unique(tasks[of_group])]
        counts = [len(np.unique(samples[cell])) for cell in cells]
        scale = multipliers.scale("samples", sum(counts) - len(counts))
        votes = np.stack([multipliers.vote(values[cell], samples[cell], seeds[cell], scale) for cell in cells])
        means = dict(zip(fractions, _mean(votes).T, strict=True))
        for name in ("accuracy", "score"):
            means[f"relative_{name}"] = _ratio(means.pop(f"shared_{name}"), means.pop(f"full_{name}"))
        masks = len(np.unique(seeds[of_group]))
        key = dict(zip(by, names[of_group[0]], strict=True))
        yield BootstrapDraws(key, sum(counts), masks, means, max(counts) == 1 and masks == 1)


def with_intervals(
    drawn: Mapping[str, np.ndarray], single_draw: bool, limits: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, float]:
    """Each statistic (1 + draws) as its value NAME and the ends NAME_low and NAME_high of its 95% interval.

    Args:
        drawn: the statistics.
        single_draw: whether none has an interval.
        limits: of some, the least and the greatest value that there can be, at which their intervals end.
    """
    values = np.stack(list(drawn.values()), axis=1)
    ends = np.full((2, len(drawn)), np.nan) if single_draw else _intervals(values[1:])
    row: dict[str, float] = {}
    for name, value, low, high in zip(drawn, values[0], *ends, strict=True):
        least, greatest = (limits or {}).get(name, (-np.inf, np.inf))
        inside = max(low, min(value, least)), min(high, max(value, greatest))
        row |= {name: value, f"{name}_low": inside[0], f"{name}_high": inside[1]}
    return row


class _Multipliers:
    """What the parts of units are multiplied by in each draw. Equal sets of one kind get equal ones."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.known: dict[tuple[str, bytes], np.ndarray] = {}
        self.scales: dict[tuple[str, int], np.ndarray] = {}

    def of(self, kind: str, units: np.ndarray) -> np.ndarray:
        """(DRAWS, units), normal; 0 for a unit that stands alone, of whose likes nothing is known."""
        key, count = (kind, units.tobytes()), len(units)
        if key not in self.known:
            half = self.random.normal(size=(DRAWS // 2, count)) * np.sqrt(count / max(count - 1, 1)) * (count > 1)
            self.known[key] = np.concatenate([half, -half])
        return self.known[key]

    def scale(self, kind: str, degrees: int) -> np.ndarray:
        """(DRAWS, 1): what makes Student's t with so many degrees of freedom of what is normal."""
        if (kind, degrees) not in self.scales:
            drawn = np.sort(self.random.chisquare(max(degrees, 1), size=(DRAWS // 2) * FINE))
            half = np.sqrt(max(degrees, 1) / self.random.permutation(drawn[FINE // 2 :: FINE]))
            self.scales[kind, degrees] = np.concatenate([half, half])[:, None]
        return self.scales[kind, degrees]

    def vote(self, values: np.ndarray, samples: np.ndarray, seeds: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The fractions of a task (1 + DRAWS, fractions), to first order in what the units' parts are off.

        Args:
            values: (lines, 2 x fractions) numerators and denominators, one line a sample and seed.
            samples: (lines,).
            seeds: (lines,).
            scale: of the samples; seeds have their own.
        """
        samples, sample = np.unique(samples, return_inverse=True)
        seeds, seed = np.unique(seeds, return_inverse=True)
        above, below = values[:, 0::2], values[:, 1::2]
        with np.errstate(invalid="ignore", divide="ignore"):
            fraction = above.sum(0) / below.sum(0)
            off = (above - fraction * below) / below.sum(0)
        table = np.zeros((len(seeds), len(samples), off.shape[1]))
        table[seed, sample] = off
        of_samples = scale * self.of("samples", samples) @ table.sum(0)
        of_seeds = self.scale("seeds", len(seeds) - 1) * self.of("seeds", seeds) @ table.sum(1)
        return np.vstack([fraction, fraction + of_samples + of_seeds])


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


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio (1 + DRAWS) of two statistics, to first order; NaN where nothing is below."""
    if not below[0] > 0:
        return np.full(len(above), np.nan)
    ratio = above[0] / below[0]
    return np.asarray(ratio + (above - ratio * below) / below[0])


def _mean(votes: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is finite there; NaN where nothing is."""
    finite = np.isfinite(votes)
    with np.errstate(invalid="ignore"):
        return np.where(finite, votes, 0).sum(0) / finite.sum(0)


def _intervals(drawn: np.ndarray) -> np.ndarray:
    """The ends (2, metrics) of the middle 95% of what was drawn (draws, metrics), where that is a number."""
    finite = np.isfinite(drawn)
    ends = np.full((2, drawn.shape[1]), np.nan)
    whole = finite.all(0)
    ends[:, whole] = np.percentile(drawn[:, whole], [2.5, 97.5], axis=0)
    for column in np.flatnonzero(finite.any(0) & ~whole):
        ends[:, column] = np.percentile(drawn[finite[:, column], column], [2.5, 97.5])
    return ends
