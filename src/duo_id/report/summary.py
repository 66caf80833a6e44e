"""From saved rows to statistics: each contender's scores with intervals, absolute and relative to full attention."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd

from duo_id.common.documents import FIRST, LARGEST_ROWS, Data, Line, Natural, checked, excerpt, read_json
from duo_id.common.errors import UserError
from duo_id.patterns.provenance import Model
from duo_id.patterns.saved import pattern_from_json
from duo_id.report.bootstrap import bootstrap, with_intervals
from duo_id.report.budgets import with_budgets
from duo_id.report.rows import ASKED, KINDS, OF_PATTERNS, QUESTION, SCHEMA, THIRDS, VERSION, WRITTEN, Scored

CONTENDER = ["kind", "heads", "budget"]  # random masks of all seeds are one contender
MEASURED = ["loss", "kl", "tokens", "correct", "score", "exact", "bytes", "total_bytes", *WRITTEN]
COLUMNS = [*QUESTION, "turn", "depth", *ASKED, *MEASURED, "text", "pieces"]
SEED = "#"  # the pattern NAME#2 is a seed of the contender NAME


@dataclass(frozen=True)
class Metric:
    """How a column of `summarise` is displayed: its label, its digits, and whether values are percentages."""

    label: str
    digits: int
    percent: bool = False

    def text(self, value: float) -> str:
        """A value as text, without its unit; a dash for NaN."""
        return f"{self.scaled(value):.{self.digits}f}" if np.isfinite(value) else "-"

    def scaled(self, value: Any) -> Any:
        """A value, or an array of them, in the unit of the label."""
        return 100 * value if self.percent else value


REPORTED = {
    "kept": Metric("KV kept (%)", 1, True),
    "loss": Metric("answer loss (nats)", 3),
    "rise": Metric("rise in loss (nats)", 3),
    "kl": Metric("KL from full (nats)", 3),
    "accuracy": Metric("token accuracy (%)", 1, True),
    "relative_accuracy": Metric("accuracy / full's (%)", 1, True),
    "exact": Metric("exact answers (%)", 1, True),
    "score": Metric("score (%)", 1, True),
    "relative_score": Metric("score / full's (%)", 1, True),
    "first_third": Metric("lines right, first third (%)", 1, True),
    "middle_third": Metric("lines right, middle third (%)", 1, True),
    "last_third": Metric("lines right, last third (%)", 1, True),
    "agreed": Metric("tokens before the first difference", 1),
    "agreement": Metric("same next token along full's text (%)", 1, True),
    "along": Metric("KL along full's text (nats)", 3),
    "drift": Metric("KL along its own text (nats)", 3),
    "written": Metric("tokens / full's (%)", 1, True),
    "repeated": Metric("repeated runs (%)", 1, True),
}

SHARE, POSITIVE = (0.0, 1.0), (0.0, np.inf)
LIMITS = dict.fromkeys(("accuracy", "exact", "score", "agreement", "repeated", *THIRDS), SHARE) | dict.fromkeys(
    ("kept", "loss", "kl", "relative_accuracy", "relative_score", "agreed", "along", "drift", "written"), POSITIVE
)  # possible values


class ContenderEntry(Data):
    """A contender in results.json, as far as pages show it."""

    kind: Line
    heads: Line
    note: str | None = None


class Results(Data):
    """The contents of results.json, besides schema and version; patterns are checked like heads.json."""

    model: Model
    patterns: dict[Line, dict[str, Any]]
    contenders: list[ContenderEntry]
    settings: dict[str, Any]
    versions: dict[str, Line | None]
    rows: Annotated[list[Scored], FIRST]
    split: Line | None = None
    seed: Natural | None = None
    chat_template: bool | None = None


def load_results(path: str | Path) -> dict[str, Any]:
    """Load the results of an evaluation.

    Args:
        path: its run folder, or the `results.json` in it.

    Raises:
        UserError: there is no such file, or it does not hold the results of an evaluation of this version.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} is missing: give the run folder of a finished evaluation")
    results = read_json(path, LARGEST_ROWS, replace_surrogates=True)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{path} does not hold the results of an evaluation (schema {SCHEMA})")
    if results.get("version") != VERSION:
        raise UserError(f"{path} has version {excerpt(results.get('version'))}, this duo_id reads version {VERSION}")
    checked(Results, results, path)
    for name, pattern in results["patterns"].items():
        pattern_from_json(pattern, f"{path}: patterns.{excerpt(name)}")
    if not results["rows"]:
        raise UserError(f"{path} holds no rows: nothing was scored")
    if all(row["kind"] != "full" for row in results["rows"]):
        raise UserError(f"{path} holds no rows of full attention, the reference of all others")
    return results


def frame(results: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of results as a frame; what was not measured is NaN, and `exact` is 1 or 0.

    Patterns named NAME#SEED are seeds of the contender NAME. `budget` is what was asked, see `Budget`; `THIRDS` are the
    shares of the right lines in each third of a long answer.

    Raises:
        UserError: a column holds values other than numbers.
    """
    rows = pd.DataFrame(results["rows"], columns=COLUMNS)
    rows["exact"] = rows["exact"].map({True: 1.0, False: 0.0})
    for third, name in enumerate(THIRDS):
        rows[name] = rows["pieces"].map(partial(_right_in_third, third), na_action="ignore")
    for column in ("turn", "depth", "sparsity", "cache", "seed", *MEASURED, *THIRDS):
        try:
            rows[column] = rows[column].astype(float)
        except (TypeError, ValueError) as error:
            raise UserError(f"these results are damaged: {column} is not numeric ({error})") from None
    return with_budgets(_with_seeds(rows))


def contender_of(pattern: str) -> str:
    """The contender that a pattern belongs to: NAME for NAME#2, and in merged runs NAME [2] for NAME#2 [2]."""
    return re.sub(rf"{SEED}\d+(?=$| \[\d+\]$)", "", pattern)


def _right_in_third(third: int, pieces: str) -> float:
    """The share of 1 among the pieces of one third; NaN where it has none."""
    part = pieces[third * len(pieces) // 3 : (third + 1) * len(pieces) // 3]
    return part.count("1") / len(part) if part else np.nan


def _with_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    seeds = rows["heads"].str.extract(rf"{SEED}(\d+)(?:$| \[\d+\]$)")[0].astype(float)
    seeds = seeds.where(rows["kind"].isin(OF_PATTERNS))
    named = rows["heads"].map({name: contender_of(name) for name in rows["heads"].unique()})
    return rows.assign(seed=rows["seed"].fillna(seeds), heads=named.where(seeds.notna(), rows["heads"]))


def summarise(rows: pd.DataFrame, by: Sequence[str] = CONTENDER, seed: int = 0) -> pd.DataFrame:
    """Statistics of each group of rows, with 95% intervals.

    Loss, KL and token accuracy pool the tokens of a task, exact answers and scores are means over its questions, and
    several tasks are averaged with equal weight. Metrics relative to full attention compare the same questions: `rise`
    is a difference, `relative_accuracy` and `relative_score` are ratios of the averages over tasks, and `kept` is the
    fraction of the full cache's bytes, at the end of both generated answers; of the context where there are none.

    Intervals are those of Student's t over the samples of each task, all questions of a sample together, and over seeds
    where a group has several, combined by a bootstrap (`duo_id.report.bootstrap`). Both sides of a relative value share
    their draws. There is no interval where each task has one sample.

    Args:
        rows: as returned by `frame`; relative metrics need those of full attention among them.
        by: columns, at least one; one group per combination of their values.
        seed: of the draws.

    Returns:
        one row per group, ascending, with the columns `by`, `samples`, `seeds` and, for each of `REPORTED`, its value
        and the ends of its interval: `loss`, `loss_low`, `loss_high`, ...; NaN where nothing was measured. Beside a
        `budget` stand `sparsity` and `cache`, its numbers.
    """
    statistics = []
    for group in bootstrap(rows, by, seed):
        budget = group.key.get("budget")
        asked = {} if budget is None else budget.columns
        row = group.key | asked | {"samples": group.samples, "seeds": group.seeds}
        reported = {name: group.values[name] for name in REPORTED}
        statistics.append(row | with_intervals(reported, group.single_draw, LIMITS))
    return pd.DataFrame(statistics)


def contenders(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """`summarise` by contender and the columns `by`, in the order of tables.

    Full attention comes first and token eviction last, with masks and spans in between by budget, then kind.
    """
    statistics = summarise(rows, [*CONTENDER, *by])
    statistics["rank"] = statistics["kind"].map(KINDS.index)
    statistics["evicts"], statistics["partial"] = statistics["kind"] == "eviction", statistics["kind"] != "full"
    order = ["evicts", "partial", "budget", "rank", "heads", *by]
    return statistics.sort_values(order).drop(columns=["evicts", "partial", "rank"]).reset_index(drop=True)


def name_of(kind: str, heads: str, seeds: int = 1) -> str:
    """A contender's name in tables and figures: printable, on one line."""
    name = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in heads)
    if kind == "full":
        return "full attention"
    of_seeds = "masks" if kind == "baseline" else "seeds"
    name += ", spans" if kind == "spans" else ""
    return f"{name} ({seeds} {of_seeds})" if seeds > 1 else name
