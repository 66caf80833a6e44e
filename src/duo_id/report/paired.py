"""Contenders compared with one of them, sample by sample: differences are more certain than values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from duo_id.common.errors import UserError
from duo_id.report.bootstrap import BootstrapDraws, bootstrap, with_intervals
from duo_id.report.budgets import Budget
from duo_id.report.rows import QUESTION
from duo_id.report.summary import CONTENDER, REPORTED, Metric, contender_of, frame, name_of
from duo_id.report.tables import Cell, Grid, interval_cell

FORMS = {"rise": REPORTED["rise"], "kl": REPORTED["kl"], "ratio": Metric("ratio", 2)}
TITLES = {
    "rise": "Rise in answer loss minus that of {} (nats per token)",
    "ratio": "Rise in answer loss as a multiple of that of {}",
    "kl": "KL from full attention minus that of {} (nats per token)",
}


def paired(rows: pd.DataFrame, reference: str, by: Sequence[str] = (), seed: int = 0) -> pd.DataFrame:
    """How much more each contender loses than `reference` at the same budget, on the questions that both answered.

    Both share the draws of samples and of seeds (`duo_id.report.bootstrap`), so a sample that is hard for both adds no
    uncertainty. Tasks weigh the same.

    Args:
        rows: as returned by `duo_id.report.summary.frame`.
        reference: the contender, a head pattern, that others are compared with.
        by: further columns of samples, such as `task`; one group per combination of their values.
        seed: of the draws.

    Returns:
        one row per contender, budget and combination: `CONTENDER`, `sparsity`, `cache`, `by`, `samples`, the
        differences `rise` and `kl`, negative where `reference` loses more, and `ratio`, of the rises, each with the
        ends of its 95% interval as in `summarise`; the ratio is NaN unless the interval of the rise of `reference` lies
        above 0.

    Raises:
        UserError: `reference` is not a pattern in these rows.
    """
    names = rows.loc[rows["kind"] == "pattern", "heads"].unique()
    if reference not in names:
        raise UserError(f"reference={reference}: no such heads in these results, choose among {', '.join(names)}")
    rows = rows.reset_index(drop=True)
    full, is_reference = rows["kind"] == "full", (rows["kind"] == "pattern") & (rows["heads"] == reference)
    question_ids = rows.groupby(QUESTION).ngroup()
    differences = []
    for _, group in rows[~full].groupby("budget"):
        reference_rows = group.index[is_reference[group.index]]
        contenders_by_questions: dict[frozenset[int], list[int]] = {}  # those with the same questions share a bootstrap
        for _, other in group.drop(reference_rows).groupby(CONTENDER[:2]):
            shared = frozenset(question_ids[reference_rows]) & frozenset(question_ids[other.index])
            contenders_by_questions.setdefault(shared, []).extend(other.index)
        for shared, others in contenders_by_questions.items():
            selected = rows.loc[[*rows.index[full], *reference_rows, *others]]
            selected = selected[question_ids[selected.index].isin(shared)]
            if shared:
                differences += _differences(list(bootstrap(selected, [*CONTENDER, *by], seed)), reference, by)
    columns = [*CONTENDER, "sparsity", "cache", *by, "samples"]
    columns += [f"{name}{end}" for name in FORMS for end in ("", "_low", "_high")]
    return pd.DataFrame(differences, columns=columns).sort_values([*CONTENDER, *by]).reset_index(drop=True)


def paired_grids(results: Mapping[str, Any], reference: str | None = None) -> dict[str, Grid]:
    """Tables by title: how much more contenders lose than `reference` over all tasks, and on how many tasks.

    Empty where nothing but the masks of a single pattern was scored.

    Args:
        results: as in results.json.
        reference: one of its patterns; None: the first.

    Raises:
        UserError: as `paired`.
    """
    patterns = list(dict.fromkeys(map(contender_of, results["patterns"])))
    rows = frame(results)
    if len(patterns) < 2 and reference is None and not (rows["kind"] == "spans").any():
        return {}
    reference = reference or patterns[0]
    overall, tasks = paired(rows, reference), paired(rows, reference, ["task"])
    seeds = rows.groupby(CONTENDER[:2])["seed"].nunique().to_dict()
    budgets = sorted(overall["budget"].unique())
    means = overall.groupby(CONTENDER[:2], sort=False)["rise"].mean().sort_values(kind="stable")
    headings = ["heads", *(budget.heading for budget in budgets)]
    name, grids = name_of("pattern", reference), dict[str, Grid]()
    for kind, title in TITLES.items():
        cells = {
            tuple(row[key] for key in CONTENDER): interval_cell(row, kind, FORMS[kind])
            for row in overall.to_dict("records")
        }
        if any(np.isfinite(overall[kind])):
            grids[title.format(name)] = _grid(headings, means.index, budgets, cells, seeds)
    counted = {key: _count_worse(of_key) for key, of_key in tasks.groupby(CONTENDER)}
    title = f"Tasks on which they lose more than {name}, in brackets those beyond the interval"
    return grids | {title: _grid(headings, means.index, budgets, counted, seeds)}


def _differences(groups: Sequence[BootstrapDraws], reference: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """The contenders among the groups of one budget minus the reference among them."""

    def group_key(group: BootstrapDraws) -> tuple[Any, ...]:
        return tuple(group.key[column] for column in by)

    def is_reference(group: BootstrapDraws) -> bool:
        return (group.key["kind"], group.key["heads"]) == ("pattern", reference)

    references = {group_key(group): group for group in groups if is_reference(group)}
    differences = []
    for group in groups:
        if group.key["kind"] == "full" or is_reference(group):
            continue
        base = references[group_key(group)]
        rises, base_rises = group.values["rise"], base.values["rise"]
        single_draw = group.single_draw and base.single_draw
        has_ratio = np.nanpercentile(base_rises[1:], 2.5) > 0 if not single_draw else base_rises[0] > 0
        statistics = {
            "rise": rises - base_rises,
            "kl": group.values["kl"] - base.values["kl"],
            "ratio": np.where(base_rises > 0, rises, np.nan) / base_rises if has_ratio else np.full(len(rises), np.nan),
        }
        key = group.key | group.key["budget"].columns
        differences.append(key | {"samples": group.samples} | with_intervals(statistics, single_draw))
    return differences


def _count_worse(tasks: pd.DataFrame) -> Cell:
    worse, beyond = int((tasks["rise"] > 0).sum()), int((tasks["rise_low"] > 0).sum())
    return Cell(f"{worse} ({beyond}) of {len(tasks)}", worse)


def _grid(
    headings: Sequence[str],
    names: pd.Index,
    budgets: Sequence[Budget],
    cells: Mapping[Any, Cell],
    seeds: Mapping[Any, int],
) -> Grid:
    """One line per contender, budgets across."""
    nothing = Cell("-", -np.inf)
    lines = [
        [
            Cell(name_of(kind, heads, int(seeds[kind, heads]))),
            *(cells.get((kind, heads, budget), nothing) for budget in budgets),
        ]
        for kind, heads in names
    ]
    return Grid(headings, {"": lines})
