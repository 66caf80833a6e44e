"""The bootstrap: statistics of groups of rows, and draws of their values under other samples and seeds.

A statistic has two sources of randomness, the samples of a task and the seeds of a contender; each has its own draws,
which are added up. Drawing with replacement would never take a mean of 3 seeds out of their range, so deviations are
multiplied by random numbers instead (Wu 1986, "Jackknife, bootstrap and other resampling methods in regression
analysis"), such that the mean of n normal values gets exactly the interval of Student's t with n - 1 degrees of
freedom, 4.3 standard errors either side for 3 seeds. The samples of all tasks share their degrees of freedom. The sum
of both sources has the Behrens-Fisher interval, whose coverage is 95% or slightly more.
`scipy.stats.bootstrap` has neither: it resamples units of one kind, with replacement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from duo_id.report.rows import QUESTION, SAMPLE, THIRDS, WRITTEN

DRAWS = 4000  # even: half of them mirror the other half
FINE = 64  # draws of a scale for each one kept, so that those kept are quantiles


@dataclass(frozen=True)
class BootstrapDraws:
    """The statistics of one group of rows, and draws of them.

    Attributes:
        key: the values of the grouping columns.
        samples: number of samples.
        seeds: number of seeds, of patterns or masks.
        values: (1 + DRAWS,) per statistic, first its value for the rows; NaN where nothing was measured.
        single_draw: whether each task has one sample and there is one seed, so that draws carry no information.
    """

    key: dict[str, Any]
    samples: int
    seeds: int
    values: dict[str, np.ndarray]
    single_draw: bool


def bootstrap(rows: pd.DataFrame, by: Sequence[str], seed: int = 0) -> Iterator[BootstrapDraws]:
    """The statistics of each group of rows; groups with the same samples, or seeds, share the draws of these.

    Args:
        rows: as returned by `duo_id.report.summary.frame`, including those of full attention.
        by: columns, at least one; one group per combination of their values.
        seed: of the draws.
    """
    fractions = _fractions(rows)
    keys = pd.DataFrame({column: rows[column].to_numpy() for column in by})
    keys["the task"] = rows["task"].to_numpy()
    keys["the seed"] = rows["seed"].fillna(-1).to_numpy()
    keys["the sample"] = rows.groupby(SAMPLE).ngroup().to_numpy()
    parts = np.stack([part for fraction in fractions.values() for part in fraction], axis=1)  # (rows, 2 x fractions)
    sums = keys.join(pd.DataFrame(parts)).groupby(list(keys), dropna=False).sum()
    cell_keys, values, multipliers = sums.index.to_frame(index=False), sums.to_numpy(), _Multipliers(seed)
    names = list(cell_keys[list(by)].itertuples(index=False, name=None))
    groups = cell_keys.groupby(list(by), dropna=False).ngroup().to_numpy()
    tasks, seeds, samples = (pd.factorize(cell_keys[f"the {unit}"])[0] for unit in ("task", "seed", "sample"))
    for number in range(groups.max() + 1):
        members = np.flatnonzero(groups == number)
        cells = [members[tasks[members] == task] for task in np.unique(tasks[members])]
        counts = [len(np.unique(samples[cell])) for cell in cells]
        scale = multipliers.scale("samples", sum(counts) - len(counts))
        by_task = np.stack([multipliers.fractions(values[cell], samples[cell], seeds[cell], scale) for cell in cells])
        means = dict(zip(fractions, _mean(by_task).T, strict=True))
        for name in ("accuracy", "score"):
            means[f"relative_{name}"] = _ratio(means.pop(f"shared_{name}"), means.pop(f"full_{name}"))
        num_seeds = len(np.unique(seeds[members]))
        key = dict(zip(by, names[members[0]], strict=True))
        yield BootstrapDraws(key, sum(counts), num_seeds, means, max(counts) == 1 and num_seeds == 1)


def with_intervals(
    statistics: Mapping[str, np.ndarray], single_draw: bool, limits: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, float]:
    """Each statistic (1 + draws) as its value NAME and the ends NAME_low and NAME_high of its 95% interval.

    Args:
        statistics: value and draws, by name.
        single_draw: whether there are no intervals.
        limits: for some, the smallest and largest possible value, at which intervals are clipped.
    """
    values = np.stack(list(statistics.values()), axis=1)
    ends = np.full((2, len(statistics)), np.nan) if single_draw else _intervals(values[1:])
    row: dict[str, float] = {}
    for name, value, low, high in zip(statistics, values[0], *ends, strict=True):
        minimum, maximum = (limits or {}).get(name, (-np.inf, np.inf))
        clipped = max(low, min(value, minimum)), min(high, max(value, maximum))
        row |= {name: value, f"{name}_low": clipped[0], f"{name}_high": clipped[1]}
    return row


class _Multipliers:
    """Random multipliers of the deviations of units, per draw. Equal sets of units of one kind share them."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.multipliers: dict[tuple[str, bytes], np.ndarray] = {}
        self.scales: dict[tuple[str, int], np.ndarray] = {}

    def of(self, kind: str, units: np.ndarray) -> np.ndarray:
        """(DRAWS, units), normal; 0 for a single unit, whose spread is unknown."""
        key, count = (kind, units.tobytes()), len(units)
        if key not in self.multipliers:
            half = self.random.normal(size=(DRAWS // 2, count)) * np.sqrt(count / max(count - 1, 1)) * (count > 1)
            self.multipliers[key] = np.concatenate([half, -half])
        return self.multipliers[key]

    def scale(self, kind: str, degrees: int) -> np.ndarray:
        """(DRAWS, 1): factors that turn normal numbers into Student's t with this many degrees of freedom."""
        if (kind, degrees) not in self.scales:
            quantiles = np.sort(self.random.chisquare(max(degrees, 1), size=(DRAWS // 2) * FINE))
            half = np.sqrt(max(degrees, 1) / self.random.permutation(quantiles[FINE // 2 :: FINE]))
            self.scales[kind, degrees] = np.concatenate([half, half])[:, None]
        return self.scales[kind, degrees]

    def fractions(self, values: np.ndarray, samples: np.ndarray, seeds: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The fractions of a task (1 + DRAWS, fractions), to first order in the units' deviations.

        Args:
            values: (lines, 2 x fractions) numerators and denominators, one line per sample and seed.
            samples: (lines,).
            seeds: (lines,).
            scale: of the samples; seeds have their own.
        """
        samples, sample = np.unique(samples, return_inverse=True)
        seeds, seed = np.unique(seeds, return_inverse=True)
        numerators, denominators = values[:, 0::2], values[:, 1::2]
        with np.errstate(invalid="ignore", divide="ignore"):
            fraction = numerators.sum(0) / denominators.sum(0)
            deviations = (numerators - fraction * denominators) / denominators.sum(0)
        by_seed_and_sample = np.zeros((len(seeds), len(samples), deviations.shape[1]))
        by_seed_and_sample[seed, sample] = deviations
        of_samples = scale * self.of("samples", samples) @ by_seed_and_sample.sum(0)
        of_seeds = self.scale("seeds", len(seeds) - 1) * self.of("seeds", seeds) @ by_seed_and_sample.sum(1)
        return np.vstack([fraction, fraction + of_samples + of_seeds])


def _fractions(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators, one value per row, whose sums divide to a statistic; 0 where unknown."""
    paired_columns = ["loss", "correct", "score", "bytes", "total_bytes"]
    full = rows.loc[rows["kind"] == "full", [*QUESTION, *paired_columns]].drop_duplicates(QUESTION)
    full = rows[QUESTION].merge(full, on=QUESTION, how="left")
    columns = [*paired_columns, "kl", "tokens", "exact", *THIRDS, *WRITTEN]
    values = {column: rows[column].to_numpy(float) for column in columns}
    full_values = {column: full[column].to_numpy(float) for column in paired_columns}
    tokens, ones = values["tokens"], np.ones(len(rows))
    answered = np.isfinite(values["total_bytes"] + full_values["total_bytes"])
    pairs = {
        "kept": tuple(np.where(answered, each["total_bytes"], each["bytes"]) for each in (values, full_values)),
        "loss": (values["loss"], tokens),
        "rise": (values["loss"] - full_values["loss"], tokens),
        "kl": (values["kl"], tokens),
        "accuracy": (values["correct"], tokens),
        "exact": (values["exact"], ones),
        "score": (values["score"], ones),
        **{third: (values[third], ones) for third in THIRDS},
        "agreed": (values["agreed"], ones),
        "agreement": (values["along_correct"], values["full_written"]),
        "along": (values["along_kl"], values["full_written"]),
        "drift": (values["own_kl"], values["written"]),
        "written": (values["written"], values["full_written"]),
        "repeated": (values["repeated"], ones),
        "shared_accuracy": (values["correct"] + 0 * full_values["correct"], tokens),  # NaN where either is
        "full_accuracy": (full_values["correct"] + 0 * values["correct"], tokens),
        "shared_score": (values["score"] + 0 * full_values["score"], ones),
        "full_score": (full_values["score"] + 0 * values["score"], ones),
    }
    finite = {name: np.isfinite(pair[0]) & np.isfinite(pair[1]) for name, pair in pairs.items()}
    return {name: tuple(np.where(finite[name], part, 0) for part in pair) for name, pair in pairs.items()}  # type: ignore[misc]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio (1 + DRAWS) of two statistics, to first order; NaN unless the denominator is positive."""
    if not denominator[0] > 0:
        return np.full(len(numerator), np.nan)
    ratio = numerator[0] / denominator[0]
    return np.asarray(ratio + (numerator - ratio * denominator) / denominator[0])


def _mean(votes: np.ndarray) -> np.ndarray:
    """The mean over the first axis of the finite values; NaN where there are none."""
    finite = np.isfinite(votes)
    with np.errstate(invalid="ignore"):
        return np.where(finite, votes, 0).sum(0) / finite.sum(0)


def _intervals(draws: np.ndarray) -> np.ndarray:
    """The ends (2, metrics) of the middle 95% of the finite draws (draws, metrics)."""
    finite = np.isfinite(draws)
    ends = np.full((2, draws.shape[1]), np.nan)
    all_finite = finite.all(0)
    ends[:, all_finite] = np.percentile(draws[:, all_finite], [2.5, 97.5], axis=0)
    for column in np.flatnonzero(finite.any(0) & ~all_finite):
        ends[:, column] = np.percentile(draws[finite[:, column], column], [2.5, 97.5])
    return ends
