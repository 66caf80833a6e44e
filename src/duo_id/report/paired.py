"""Contenders beside one of them, sample by sample: differences that are surer than the values themselves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from duo_id.common.errors import UserError
from duo_id.report.bootstrap import BootstrapDraws, bootstrap, with_intervals
from duo_id.report.rows import QUESTION
from duo_id.report.summary import CONTENDER, REPORTED, Metric, contender_of, frame, name_of
from duo_id.report.tables import Cell, Grid, interval_cell

FORMS = {"rise": REPORTED["rise"], "kl": REPORTED["kl"], "ratio": Metric("ratio", 2)}
TITLES = {
    "rise": "Rise in answer loss less that of {} (nats a token)",
    "ratio": "Rise in answer loss as a multiple of that of {}",
    "kl": "KL from full attention less that of {} (nats a token)",
}


def paired(rows: pd.DataFrame, reference: str, by: Sequence[str] = (), seed: int = 0) -> pd.DataFrame:
    """What each contender loses more than `reference` does at the same sparsity, on the questions that both answered.

    Both take the same draws of samples and of seeds (`duo_id.report.bootstrap`), so what makes a sample hard for
    both is no uncertainty. Tasks have one vote each.

    Args:
        rows: as `duo_id.report.summary.frame` gives them.
        reference: the contender, a head pattern, that others are compared with.
        by: more columns that samples have, such as `task`; one group for each combination of their values.
        seed: of the draws.

    Returns:
        one row a contender, sparsity and combination: `CONTENDER`, `by`, `samples`, the differences `rise` and `kl`,
        below 0 where `reference` loses more, and `ratio`, of the rises, each with the ends of its 95% interval as in
        `summarise`; the ratio is NaN unless `reference` loses more than nothing beyond its own interval.

    Raises:
        UserError: `reference` is no pattern of these rows.
    """
    known = rows.loc[rows["kind"] == "pattern", "heads"].unique()
    if reference not in known:
        raise UserError(f"reference={reference}: there are no such heads here, choose among {', '.join(known)}")
    rows = rows.reset_index(drop=True)
    full, own = rows["kind"] == "full", (rows["kind"] == "pattern") & (rows["heads"] == reference)
    asked = rows.groupby(QUESTION).ngroup()
    found = []
    for _, at in rows[~full].groupby("sparsity"):
        beside = at.index[own[at.index]]
        alike: dict[frozenset[int], list[int]] = {}  # contenders that share the same questions are drawn at once
        for _, other in at.drop(beside).groupby(CONTENDER[:2]):
            shared = frozenset(asked[beside]) & frozenset(asked[other.index])
            alike.setdefault(shared, []).extend(other.index)
        for shared, others in alike.items():
            among = rows.loc[[*rows.index[full], *beside, *others]]
            among = among[asked[among.index].isin(shared)]
            found += _compared(list(bootstrap(among, [*CONTENDER, *by], seed)), reference, by) if shared else []
    columns = [*CONTENDER, *by, "samples"]
    columns += [f"{name}{end}" for name in FORMS for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=columns).sort_values([*CONTENDER, *by]).reset_index(drop=True)


def paired_grids(results: Mapping[str, Any], reference: str | None = None) -> dict[str, Grid]:
    """Tables, by title: what contenders lose more than `reference` over all tasks, and on how many tasks they do.

    There are none where a single pattern stands alone.

    Args:
        results: as in results.json.
        reference: a contender among its patterns; None: the first.

    Raises:
        UserError: as `paired`.
    """
    patterns = list(dict.fromkeys(map(contender_of, results["patterns"])))
    if len(patterns) < 2 and reference is None:
        return {}
    reference = reference or patterns[0]
    rows = frame(results)
    overall, tasks = paired(rows, reference), paired(rows, reference, ["task"])
    seeds = rows.groupby(CONTENDER[:2])["seed"].nunique().to_dict()
    sparsities = sorted(overall["sparsity"].unique())
    means = overall.groupby(CONTENDER[:2], sort=False)["rise"].mean().sort_values(kind="stable")
    headings = ["heads", *(f"{100 * sparsity:.4g}%\nstream" for sparsity in sparsities)]
    name, found = name_of("pattern", reference), dict[str, Grid]()
    for kind, title in TITLES.items():
        cells = {
            tuple(row[key] for key in CONTENDER): interval_cell(row, kind, FORMS[kind])
            for row in overall.to_dict("records")
        }
        if any(np.isfinite(overall[kind])):
            found[title.format(name)] = _grid(headings, means.index, sparsities, cells, seeds)
    counted = {key: _worse(of_key) for key, of_key in tasks.groupby(CONTENDER)}
    title = f"Tasks on which they lose more than {name}, and in brackets beyond the interval"
    return found | {title: _grid(headings, means.index, sparsities, counted, seeds)}


def _compared(drawn: Sequence[BootstrapDraws], reference: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """The contenders among the groups of one sparsity less the reference among them."""

    def place(one: BootstrapDraws) -> tuple[Any, ...]:
        return tuple(one.key[column] for column in by)

    def is_reference(one: BootstrapDraws) -> bool:
        return (one.key["kind"], one.key["heads"]) == ("pattern", reference)

    references = {place(one): one for one in drawn if is_reference(one)}
    found = []
    for one in drawn:
        if one.key["kind"] == "full" or is_reference(one):
            continue
        beside = references[place(one)]
        rise, theirs = one.values["rise"], beside.values["rise"]
        single_draw = one.single_draw and beside.single_draw
        above = np.nanpercentile(theirs[1:], 2.5) > 0 if not single_draw else theirs[0] > 0
        statistics = {
            "rise": rise - theirs,
            "kl": one.values["kl"] - beside.values["kl"],
            "ratio": np.where(theirs > 0, rise, np.nan) / theirs if above else np.full(len(rise), np.nan),
        }
        found.append(one.key | {"samples": one.samples} | with_intervals(statistics, single_draw))
    return found


def _worse(tasks: pd.DataFrame) -> Cell:
    worse, beyond = int((tasks["rise"] > 0).sum()), int((tasks["rise_low"] > 0).sum())
    return Cell(f"{worse} ({beyond}) of {len(tasks)}", worse)


def _grid(
    headings: Sequence[str],
    names: pd.Index,
    sparsities: Sequence[float],
    cells: Mapping[Any, Cell],
    seeds: Mapping[Any, int],
) -> Grid:
    """One line a contender, sparsities across."""
    nothing = Cell("-", -np.inf)
    lines = [
        [
            Cell(name_of(kind, heads, int(seeds[kind, heads]))),
            *(cells.get((kind, heads, sparsity), nothing) for sparsity in sparsities),
        ]
        for kind, heads in names
    ]
    return Grid(headings, {"": lines})
