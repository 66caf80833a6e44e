"""Figures show the statistics; missing data breaks nothing."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from duo_id.common.figures import GREY
from duo_id.patterns.agreement import agreement, plot_agreement, plot_patterns
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.budgets import budgets_of
from duo_id.report.figures import (
    figures,
    line_styles,
    plot_budget,
    plot_depths,
    plot_position,
    plot_tasks,
)
from duo_id.report.summary import contenders, frame
from tests.evaluate.saved import DEPTHS, LENGTHS, SPARSITIES, a_pattern, line_up, saved_results

NAMES = ["found", "random", "streaming", "window", "snapkv"]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return frame(saved_results(samples=2))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def meshes(figure: Figure) -> dict[int, np.ndarray]:
    """The values of heatmaps by the number of their axes."""
    by_title = {}
    for number, axes in enumerate(figure.axes):
        values = [
            item.get_array() for item in axes.collections if isinstance(item, QuadMesh) and item.get_array().ndim == 2
        ]
        if values and axes.get_label() != "<colorbar>":
            by_title[number] = np.asarray(values[0])
    return by_title


@pytest.mark.parametrize(("metric", "factor"), [("score", 100), ("rise", 1)])
def test_quality_over_the_budget(rows: pd.DataFrame, metric: str, factor: int) -> None:
    figure = plot_budget(rows, metric)
    (axes,) = figure.axes
    assert legend(figure) == [*NAMES, "full attention"]
    statistics = contenders(rows)
    for name, line in zip(NAMES, axes.lines, strict=False):
        points = statistics[statistics["heads"] == name].sort_values("kept")
        assert line.get_xdata().tolist() == pytest.approx((100 * points["kept"]).tolist())
        assert line.get_ydata().tolist() == pytest.approx((factor * points[metric]).tolist())
    dashed = axes.lines[len(NAMES)]
    assert set(dashed.get_ydata()) == {factor * statistics.loc[0, metric]}
    assert dashed.get_linestyle() == "--"
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert len(bands) == len(NAMES)
    snapkv = factor * statistics.loc[statistics["heads"] == "snapkv", [f"{metric}_low", f"{metric}_high"]].to_numpy()
    assert (bands[-1].min(), bands[-1].max()) == pytest.approx((snapkv.min(), snapkv.max()))


def test_a_single_point_gets_a_bar(rows: pd.DataFrame) -> None:
    figure = plot_budget(rows[rows["sparsity"].isin([0, 0.5]) | (rows["heads"] == "found")], "score")
    bands = [type(item).__name__ for item in figure.axes[0].collections]
    assert bands.count("LineCollection") == len(NAMES) - 1


def test_depths_as_heatmaps(rows: pd.DataFrame) -> None:
    figure = plot_depths(rows, "needle-words")
    heatmaps = meshes(figure)
    assert len(heatmaps) == 1 + len(SPARSITIES) * len(NAMES)
    of_task = rows[rows["task"] == "needle-words"]
    means = of_task.groupby(["heads", "sparsity", "depth", "length"])["score"].mean()
    for line, heads in enumerate(["full", *NAMES]):
        for column, sparsity in enumerate([0.0] if heads == "full" else SPARSITIES):
            number = line * len(SPARSITIES) + column
            expected = [[100 * means[heads, sparsity, depth, length] for length in LENGTHS] for depth in DEPTHS]
            assert heatmaps[number].tolist() == [pytest.approx(cells) for cells in expected]
            axes = figure.axes[number]
            assert [text.get_text() for text in axes.texts] == [f"{value:.0f}" for cells in expected for value in cells]
            assert axes.yaxis_inverted(), "the beginning of the context is on top"
    title = figure.axes[len(SPARSITIES)].get_title(loc="left")
    assert title.startswith("found\n")
    assert title.endswith("% KV")
    panels = [item for number in heatmaps for item in figure.axes[number].collections]
    assert {panel.get_clim() for panel in panels} == {(0, 100)}, "one colour scale"


def test_many_depths_become_tenths(rows: pd.DataFrame) -> None:
    placed = rows[(rows["task"] == "needle-words") & (rows["kind"] == "full")]
    many = pd.concat([placed.assign(depth=depth, index=n) for n, depth in enumerate(np.linspace(0, 1, 40))])
    figure = plot_depths(many, "needle-words")
    assert next(iter(meshes(figure).values())).shape == (10, len(LENGTHS))


def test_depths_that_fall_into_one_tenth_draw_nothing() -> None:
    results = saved_results(4, tasks=("language",), patterns={})
    for number, row in enumerate(results["rows"]):
        row["depth"] = 0.09 * number / len(results["rows"])
    assert "position-language" not in figures(results)


def test_loss_over_the_place(rows: pd.DataFrame) -> None:
    figure = plot_position(rows, "language")
    assert len(figure.axes) == len(SPARSITIES)
    assert sorted(legend(figure)) == sorted(["full attention", *NAMES])
    statistics = contenders(rows[rows["task"] == "language"], ["depth"]).query("heads == 'found' and sparsity == 0.75")
    line = figure.axes[2].lines[1]
    assert line.get_xdata().tolist() == [100 * depth for depth in DEPTHS]
    assert line.get_ydata().tolist() == pytest.approx(statistics["loss"].tolist())


def test_points_of_tasks(rows: pd.DataFrame) -> None:
    tasks = ["needle-words", "json-lookup", "ruler-multivalue"]
    figure = plot_tasks(rows)
    assert len(figure.axes) == len(SPARSITIES)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == tasks
    assert legend(figure) == NAMES
    statistics = contenders(rows, ["task"]).query("heads == 'snapkv' and sparsity == 0.5").set_index("task")
    (points,) = (line for line in figure.axes[1].lines if line.get_label() == "snapkv")
    assert points.get_xdata().tolist() == pytest.approx(
        [100 * statistics.loc[task, "relative_score"] for task in tasks]
    )
    intervals = [item for item in figure.axes[1].collections if isinstance(item, LineCollection)][NAMES.index("snapkv")]
    ends = [segment[:, 0].tolist() for segment in intervals.get_segments()]
    bounds = statistics.loc[tasks, ["relative_score_low", "relative_score_high"]].to_numpy()
    assert np.allclose(ends, 100 * bounds)


def test_two_points_are_not_joined(rows: pd.DataFrame) -> None:
    for sparsities, dash in (SPARSITIES, "-"), (SPARSITIES[:2], "None"):
        axes = plot_budget(rows[rows["sparsity"].isin([0.0, *sparsities])], "rise").axes[0]
        assert {(len(line.get_xdata()), line.get_linestyle()) for line in axes.lines[:-1]} == {(len(sparsities), dash)}


def test_a_wide_range_is_logarithmic_and_a_narrow_one_is_not(rows: pd.DataFrame) -> None:
    for scale, factor in (("symlog", 3.0), ("linear", 0.1)):
        scaled = rows.assign(loss=rows["loss"] * factor)
        budget, tasks = plot_budget(scaled, "rise").axes[0], plot_tasks(scaled, "rise").axes[0]
        assert budget.get_yscale() == tasks.get_xscale() == scale
        assert ("logarithmic" in budget.get_ylabel()) == (scale == "symlog")


def test_where_full_attention_scores_nothing_accuracy_is_shown(rows: pd.DataFrame) -> None:
    results = saved_results(1, tasks=("needle-words", "json-lookup"), lengths=(1000,))
    for row in results["rows"]:
        row["score"] = 0.0 if row["score"] is not None else None
    by_name = figures(results)
    assert "budget-score" not in by_name
    assert by_name["tasks"].get_supxlabel() == "accuracy / full's (%)"
    assert by_name["depths-needle-words"].axes[-1].get_xlabel().endswith("token accuracy (%)")


def test_contenders_are_told_apart_however_many() -> None:
    lineup = line_up(tuple(f"pattern {number}" for number in range(14)), sparsities=(0.5,), peers=False)
    looks = [tuple(look.values()) for _, _, look in line_styles(pd.DataFrame(lineup))]
    assert len(set(looks)) == len(looks) == 14
    colors = [color for color, _, _ in looks]
    assert len(set(colors[:6])) == 6
    assert {*colors[6:]} == {GREY}, "a colour is never repeated"


def test_agreement_by_hand() -> None:
    first = HeadPattern(torch.tensor([[0.1, 0.2], [0.3, 0.9]]), 4, 8)
    second = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2]]), 4, 8)
    agreements = agreement({"one": first, "other": second}, [0.5, 0.25, 1.0])
    ranks, half, quarter, none = (values.to_numpy()[0, 1] for values in agreements.values())
    assert ranks == pytest.approx(1 - 6 * (2**2 + 2**2) / (4 * 15))
    assert half == 1 / 3  # {2, 3} and {1, 2}
    assert quarter == 1.0  # the same three
    assert none == 1.0  # nothing to disagree about
    assert all(np.diag(values).tolist() == [1, 1] for values in agreements.values())
    figure = plot_agreement({"one": first, "other": second}, [0.5])
    assert [text.get_text() for text in figure.axes[1].texts] == ["1.00", "0.33", "0.33", "1.00"]


def test_agreement_looks_at_layers_that_both_gate() -> None:
    first = HeadPattern(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 4, 8, gated_layers=(0,))
    second = HeadPattern(torch.tensor([[0.1, 0.2], [0.4, 0.3]]), 4, 8)
    (ranks,) = agreement({"one": first, "other": second}, []).values()
    assert ranks.to_numpy().tolist() == [[1, 1], [1, 1]]


def test_patterns_side_by_side() -> None:
    hybrid = HeadPattern(a_pattern(1).scores, 4, 8, gated_layers=(0, 2))
    patterns = {"a": a_pattern(), "b": hybrid, **{str(number): a_pattern(number) for number in range(4)}}
    figure = plot_patterns(patterns)
    heatmaps = meshes(figure)
    assert len(heatmaps) == 6
    for values, pattern in zip(heatmaps.values(), patterns.values(), strict=True):
        assert np.array_equal(values, pattern.scores.numpy())
    assert len(figure.axes[1].patches) == 2, "layers without gates are hatched"
    assert figure.axes[0].get_title(loc="left") == "a"


def test_all_figures_of_results() -> None:
    results = saved_results(
        samples=1,
        lengths=(1000,),
        contenders=line_up(("found", "_$x$\n"), (0.25, 0.5)),
        patterns={"found": a_pattern(), "_$x$\n": a_pattern(1)},
    )
    rc_params = dict(mpl.rcParams)
    by_name = figures(results)
    assert dict(mpl.rcParams) == rc_params
    assert list(by_name) == [
        *("budget-score", "budget-accuracy", "budget-rise", "budget-kl", "tasks", "depths-needle-words"),
        *("position-language", "gates", "agreement"),
    ]
    assert r" _\$x\$?" in legend(by_name["budget-score"])
    by_name["budget-score"].savefig(io.BytesIO(), format="svg")


@pytest.mark.parametrize("task", ["needle-words", "json-lookup", "language"])
@pytest.mark.parametrize(
    "compared", [line_up(peers=False)[:1], line_up(peers=False)[:2], line_up(sparsities=(0.5,))[1:]]
)
def test_little_was_measured(task: str, compared: list) -> None:
    results = saved_results(samples=1, tasks=(task,), lengths=(1000,), contenders=compared)
    expected = {"needle-words": {"depths-needle-words"}, "json-lookup": set(), "language": {"position-language"}}[task]
    assert figures(results).keys() == {"gates", *expected}
    assert figures(results | {"patterns": {}}).keys() == expected


def test_who_generated_nothing_is_not_drawn_where_answers_are_scored() -> None:
    rows = frame(saved_results())
    silent = rows["heads"].eq("random") | rows["sparsity"].eq(0.75)
    rows.loc[silent, "score"] = float("nan")
    depths = plot_depths(rows, "needle-words")
    assert "random" not in " ".join(axes.get_title(loc="left") for axes in depths.axes)
    assert len(plot_tasks(rows, "relative_score").axes) == len(budgets_of(rows)) - 1


def test_legends_lie_inside_their_figures(rows: pd.DataFrame) -> None:
    renamed = rows[rows["sparsity"].isin([0, 0.5])].replace({"heads": {"found": "SmolLM2-135M-Instruct at 8K tokens"}})
    for figure in (plot_tasks(renamed), plot_budget(renamed, "rise"), plot_position(renamed, "language")):
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_ranks_put_methods_of_other_scales_side_by_side() -> None:
    scores = torch.tensor([[0.2, 0.9], [0.5, 0.1], [7.0, 7.0]])
    patterns = {"gates": HeadPattern(scores, 4, 8, (0, 1)), "tiny": HeadPattern(scores / 1e6, 4, 8, (0, 1))}
    figure = plot_patterns(patterns, ranks=True)
    for axes in figure.axes[:2]:
        mesh = next(item for item in axes.collections if isinstance(item, QuadMesh))
        np.testing.assert_allclose(mesh.get_array(), [[1 / 3, 1], [2 / 3, 0], [1, 1]])
        assert mesh.get_clim() == (0, 1)
    assert figure.axes[2].get_xlabel() == "rank of the head (1 = the last to stream)"
