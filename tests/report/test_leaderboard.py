"""Leaderboards: seeds as one contender, tasks out of family, the best first."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from duo_id.evaluate.tasks.registry import EVALUATION_TASKS
from duo_id.report.figures import plot_cost
from duo_id.report.leaderboard import FAMILIES, average_over_seeds, in_family_tasks, leaderboards, seconds_of
from duo_id.report.summary import contender_of, frame, summarise
from tests.evaluate.saved import LENGTHS, a_pattern, line_up, saved_results

NAMES = ("found", "other#0", "other#1", "other#2")


def found_on(name: str, seconds: float, **data: Any) -> Any:
    return replace(a_pattern(NAMES.index(name)), provenance={"seconds": seconds, "settings": {"data": data}})


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """A pattern and three seeds of another, on all tasks."""
    patterns = {"found": found_on("found", 2, task="passkey")}
    for number in range(3):
        data = {"task": "mixture", "mixture": {"key_value": 1, "text": 0}}
        patterns[f"other#{number}"] = found_on(f"other#{number}", 10 + number, **data)
    return saved_results(3, contenders=line_up(NAMES), patterns=patterns)


def test_seeds_are_one_contender(results: dict[str, Any]) -> None:
    rows = frame(results)
    assert set(rows.loc[rows["kind"] == "pattern", "heads"]) == {"found", "other"}
    statistics = summarise(rows).set_index(["heads", "sparsity"]).loc[("other", 0.5)]
    assert statistics["seeds"] == 3
    seed_losses = [row["loss"] / row["tokens"] for row in results["rows"] if row["heads"] == "other#1"]
    assert len(seed_losses) == (rows["heads"] == "other").sum() / 3
    assert set(rows.loc[rows["heads"] == "other", "seed"]) == {0, 1, 2}
    assert rows.loc[rows["heads"] == "random", "seed"].nunique() == 5, "random masks keep theirs"
    assert seconds_of(results["patterns"]) == {"found": 2, "other": 11}
    both = average_over_seeds(results["patterns"])
    expected = sum(a_pattern(number).scores for number in (1, 2, 3)) / 3
    torch.testing.assert_close(both["other"].scores, expected)


@pytest.mark.parametrize(
    ("name", "contender"), [("a", "a"), ("a#3", "a"), ("a#3 [2]", "a [2]"), ("a#x", "a#x"), ("a#1b", "a#1b")]
)
def test_contenders_of_patterns(name: str, contender: str) -> None:
    assert contender_of(name) == contender


def test_tables_by_task_family_and_length(results: dict[str, Any]) -> None:
    tables = leaderboards(results)
    titles = [title.removeprefix("Rise in answer loss over full attention (nats per token), ") for title in tables]
    assert titles == ["all tasks", "out of family: language", *(f"{length:,} tokens" for length in LENGTHS)]
    grid = tables["Rise in answer loss over full attention (nats per token), all tasks"]
    assert grid.headings[2:] == ["25%\nstream", "50%\nstream", "75%\nstream", "100%\nstream"][: len(grid.headings) - 2]
    lines = grid.sections[""]
    assert [line[0].text for line in lines][:2] == ["found", "other (3 seeds)"], "the least harm first"
    assert [line[1].text for line in lines][:3] == ["2.0", "11.0", "-"]
    rises = summarise(frame(results)).set_index(["heads", "sparsity"])["rise"]
    assert lines[0][3].value == pytest.approx(rises["found", 0.5])


def test_families_name_held_out_tasks() -> None:
    assert set().union(*FAMILIES.values()) < EVALUATION_TASKS.keys(), "some resemble none of the training tasks"
    patterns = [{"provenance": {"settings": {"data": {"task": task}}}} for task in ("copying", "text", "disk", None)]
    assert in_family_tasks(patterns) == {
        *("copying", "list-reorder", "table-reformat", "list-all"),
        *("language", "rare-ngrams"),
    }
    assert in_family_tasks([{"provenance": {}}]) == set()


def test_one_pattern_needs_no_leaderboard() -> None:
    assert leaderboards(saved_results(1)) == {}


def test_cost_is_drawn_where_it_is_known(results: dict[str, Any]) -> None:
    figure = plot_cost(frame(results), seconds_of(results["patterns"]))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["25% stream", "50% stream", "75% stream"]
    points = {line.get_label(): line.get_xdata()[0] for line in panels[0].lines if line.get_linestyle() == "None"}
    assert points == {"found": 2, "other": 11}
