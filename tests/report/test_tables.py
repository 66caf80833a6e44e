"""Tables show what was measured, in order, and fit their terminals."""

from collections import Counter
from io import StringIO

import pytest
from rich.console import Console

from duo_id.common.tables import TextTable
from duo_id.report.budgets import Budget
from duo_id.report.leaderboard import leaderboards
from duo_id.report.summary import contenders, frame
from duo_id.report.tables import (
    Cell,
    contender_grid,
    headline,
    metric_cell,
    middle,
    of_generated,
    results_table,
    task_grid,
    task_table,
    terminal_table,
)
from tests.evaluate.saved import a_pattern, line_up, saved_results


def shown(table: TextTable, width: int = 120) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text, "something was cut off"
    return text


def test_contenders_stand_under_each_other() -> None:
    patterns = {"found": a_pattern(), "2026-11-24/03-23-49": a_pattern(1)}
    results = saved_results(samples=2, patterns=patterns)
    text = shown(results_table(results, "Tiny [bold]"))
    assert "Tiny [bold]" in text
    lines = [line.split() for line in text.splitlines()]
    masks, eviction = lines.index(["head", "patterns"]), lines.index(["token", "eviction"])
    assert lines[masks + 1][:4] == ["full", "attention", "0", "100.0"]
    names = [line[0] for line in lines[masks + 2 : eviction] if line]
    assert names == ["2026-11-24/03-23-49", "found", "random", "streaming", "window"] * 3
    assert [line[:2] for line in lines[eviction + 1 : eviction + 4]] == [
        ["snapkv", share] for share in ("25", "50", "75")
    ]
    assert "random (5 masks)" in text
    statistics = contenders(frame(results)).query("heads == 'found' and sparsity == 0.5").squeeze()
    (line,) = (line for line in text.splitlines() if line.split()[:2] == ["found", "50"])
    half = (statistics["loss_high"] - statistics["loss_low"]) / 2
    assert f"{100 * statistics['kept']:.1f}" in line
    assert f"{statistics['loss']:.3f} ± {half:.3f}" in line
    assert f"{100 * statistics['relative_score']:.1f} ± " in line


def test_tasks_stand_under_each_other() -> None:
    results = saved_results(samples=2)
    text = shown(task_table(results, "Tiny"))
    assert "Tiny: 50% of the KV heads stream" in text
    by_task = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert list(by_task)[-5:-1] == ["needle-words", "json-lookup", "language", "ruler-multivalue"]
    assert by_task["language"].split()[1:] == ["-"] * 6, "nothing is generated there"
    at_quarter = shown(task_table(results, "Tiny", "rise", 0.25))
    assert "25% of the KV heads" in at_quarter
    statistics = contenders(frame(results), ["task"]).query(
        "heads == 'found' and sparsity == 0.25 and task == 'language'"
    )
    assert f"{statistics['rise'].item():.3f}" in at_quarter


def test_turns_stand_beside_each_other_and_full_attention_in_absolute_terms() -> None:
    results = saved_results(samples=2, tasks=("json-lookup",), lengths=(1000,))
    for row in results["rows"]:
        row |= {"turn": row["question"] + 1, "score": 0.5 if row["kind"] == "full" else 0.4 - 0.3 * row["question"]}
        row["loss"] = row["tokens"] * (1.5 if row["kind"] == "full" else 2 + row["question"])
    ((_, grid),) = of_generated(frame(results)).items()
    assert grid.headings == ["heads", "stream\n%", "turn\n1", "turn\n2"]
    scores, rises = (
        {tuple(map(str, line[:2])): [cell.text for cell in line[2:]] for line in lines}
        for lines in grid.sections.values()
    )
    assert len(scores) == len(rises) == 1 + 3 * 5
    assert scores["full attention", "0"] == ["50.0", "50.0"]
    assert rises["full attention", "0"] == ["1.500", "1.500"]
    assert scores["found", "25"] == scores["random (5 masks)", "75"] == ["80.0", "20.0"]
    assert rises["found", "25"] == ["0.500", "1.500"]
    text = shown(terminal_table(grid, "By turn", spreads=False), 80)
    assert "±" not in text


def test_lines_of_long_answers_are_counted_by_thirds() -> None:
    results = saved_results(samples=2, tasks=("json-lookup",), lengths=(1000,))
    for row in results["rows"]:
        row["pieces"] = "1111111" if row["kind"] == "full" else "1110100"
    ((_, grid),) = of_generated(frame(results)).items()
    assert grid.headings[-3:] == ["first\nthird %", "middle\nthird %", "last\nthird %"]
    (full, found, *_) = ([cell.text for cell in line[-3:]] for line in grid.sections["head patterns"])
    assert full == ["100.0"] * 3
    assert found == ["100.0", "50.0", "33.3"]
    assert not of_generated(frame(saved_results(samples=1)))


@pytest.mark.parametrize("compared", [line_up(peers=False)[:1], line_up(sparsities=(0.5,))])
def test_little_was_measured(compared: list) -> None:
    results = saved_results(samples=1, tasks=("language",), lengths=(1000,), contenders=compared)
    text = shown(results_table(results, "x")) + shown(task_table(results, "x"))
    assert "full attention" in text
    assert "exact" not in text, "a column without a number is left out"
    assert headline(frame(results)) == "relative_accuracy"


def test_middle_budget() -> None:
    rows = frame(saved_results(samples=1, tasks=("language",), contenders=line_up(sparsities=(0.2, 0.55, 0.9))))
    assert middle(rows) == Budget(sparsity=0.55)
    assert middle(rows[rows["kind"] == "full"]) is None


def test_cells() -> None:
    row = {"score": 0.5, "score_low": 0.25, "score_high": 0.85}
    cell = metric_cell(row, "score")
    assert cell == Cell("50.0", 0.5, ("25.0", "85.0"), "30.0")
    assert str(cell) == "50.0 ± 30.0"
    assert str(metric_cell({"score": 0.5}, "score")) == "50.0"
    assert str(metric_cell({}, "score")) == "-"


def test_names_are_no_markup() -> None:
    results = saved_results(samples=1, tasks=("language",), patterns={"[red]x[/red]": a_pattern()})
    assert "[red]x[/red]" in shown(results_table(results, "t"))
    assert set(contender_grid(frame(results)).sections) == {"head patterns", "token eviction"}


def test_every_number_is_whole_in_a_terminal_of_80_columns() -> None:
    patterns = {"found": a_pattern(), "a rather long name of other heads": a_pattern(1)}
    results = saved_results(samples=2, patterns=patterns)
    rows = frame(results)
    for grid in (contender_grid(rows), task_grid(rows, "rise", Budget(sparsity=0.5)), *leaderboards(results).values()):
        words = Counter(shown(terminal_table(grid, "Tiny"), 80).split())
        cells = [str(cell) for lines in grid.sections.values() for line in lines for cell in line[2:]]
        assert Counter(" ".join(cells).split()) <= words
        assert set(" ".join(grid.headings[1:]).split()) <= words.keys()
