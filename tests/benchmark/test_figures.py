"""Figures show what was saved: curves of time and memory, dashed floors, and OOM marks."""

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from duo_id.benchmark.figures import CARDS, largest_contexts, plot_benchmark, plot_largest_contexts, plotted_axes
from duo_id.benchmark.step_tables import plot_steps
from duo_id.common.errors import UserError
from duo_id.common.figures import save_figure
from tests.benchmark import saved


def curves(panel: Axes, dash: str) -> list[dict[float, float]]:
    """The lines of a panel drawn with this dash, without gaps; "-": also points too few to be joined."""
    dashes = ("-", "None") if dash == "-" else (dash,)
    lines = [line for line in panel.lines if line.get_linestyle() in dashes and len(line.get_xdata())]
    curves_by_label = [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]
    return [{x: y for x, y in line.items() if y == y} for line in curves_by_label]


def test_decode_over_context_has_both_panels_and_floors() -> None:
    figure = plot_benchmark(saved.decode(), "context")
    time, memory = figure.axes
    assert curves(time, "-") == [{1.0: 6.0}, {1.0: 2.0, 2.0: 4.0}, {1.0: 1.0, 2.0: 2.0}]
    assert curves(time, "--") == [{1.0: 2.0, 2.0: 3.0}, {1.0: 1.5, 2.0: 2.0}, {1.0: 1.25, 2.0: 1.5}]
    assert curves(memory, "-")[1] == {1.0: 2.0, 2.0: 3.0}
    assert [text.get_text() for panel in figure.axes for text in panel.texts] == ["OOM", "OOM"]
    assert time.get_xlabel() == "context (thousand tokens)"
    assert (time.get_ylabel(), memory.get_ylabel()) == ("time of a decode step (ms)", "memory (GiB)")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["full attention", "duo, 50% retrieval heads", "duo, 25% retrieval heads", "floor"]


def test_over_the_retrieval_ratio_full_attention_is_a_level() -> None:
    rows = [row for row in saved.decode()["rows"] if row["context"] == 1000]
    figure = plot_benchmark(saved.results("decode", rows), "retrieval")
    level, duo = curves(figure.axes[0], "-")
    assert level == {25.0: 6.0, 50.0: 6.0, 100.0: 6.0}
    assert figure.axes[0].lines[0].get_marker() == "", "it was measured once"
    assert duo == {25.0: 1.0, 50.0: 2.0}


def test_lines_join_three_points_or_more() -> None:
    rows = [saved.row("duo", 0.5, context, context / 1e3, 2**31) for context in (1000, 2000, 3000)]
    rows += [saved.row("full", 0.0, context, context / 5e2, 2**32) for context in (1000, 2000)]
    full, duo = (line for line in plot_benchmark(saved.results("decode", rows), "context").axes[0].lines[::2][:2])
    assert (full.get_linestyle(), full.get_marker()) == ("None", "o")
    assert (duo.get_linestyle(), duo.get_marker()) == ("-", "s")


def test_prefill_over_chunk_size_is_in_seconds() -> None:
    figure = plot_benchmark(saved.prefill(), "chunk_size")
    full, duo = curves(figure.axes[0], "-")
    assert full == pytest.approx({1.0: 9.024, 4.0: 12.096})
    assert duo == pytest.approx({1.0: 5.024, 4.0: 8.096})
    assert "1,000 tokens" in figure.get_suptitle()


def test_figures_are_drawn_over_what_varies() -> None:
    assert plotted_axes(saved.decode()) == ["context", "retrieval"]
    assert plotted_axes(saved.prefill()) == ["chunk_size"]
    alone = saved.prefill()["rows"][:1]
    assert plotted_axes(saved.results("prefill", alone)) == ["chunk_size"]
    assert plotted_axes(saved.results("decode", saved.decode()["rows"][:1])) == ["context"]


def test_the_task_memory_has_one_panel(tmp_path: Path) -> None:
    figure = plot_benchmark(saved.decode() | {"task": "memory"}, "context")
    assert [panel.get_ylabel() for panel in figure.axes] == ["memory (GiB)"]
    save_figure(figure, tmp_path / "memory.png")


def test_a_figure_of_rows_that_all_ran_out_of_memory_can_be_saved(tmp_path: Path) -> None:
    rows = [saved.row("full", 0.0, 1000, None, 0), saved.row("duo", 0.5, 1000, None, 0)]
    save_figure(plot_benchmark(saved.results("decode", rows), "context"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_results_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(saved.decode()))
    assert len(plot_benchmark(path, "context").axes) == 2
    with pytest.raises(UserError, match=r"other\.json cannot be read"):
        plot_benchmark(tmp_path / "other.json", "context")
    with pytest.raises(UserError, match="nothing to plot"):
        plot_benchmark(saved.results("decode", []), "context")


def test_bars_of_steps_show_their_values() -> None:
    shared = {"blend": "student", "floor_ms": 500.0, "status": "ok"}
    rows = [
        shared | {"step": "ours", "context": 8192, "ms": 763.0, "peak_bytes": 43.5 * 2**30},
        shared | {"step": "ours", "context": 131072, "ms": 54200.0, "peak_bytes": 2**30},
        shared | {"step": "paper", "context": 131072, "status": "OOM", "peak_bytes": None},
    ]
    time, memory = plot_steps({"rows": rows, "model": {"name": "a model"}, "device": "a device"}).axes
    assert [text.get_text() for text in time.texts if text.get_text()] == ["0.763", "54.2", "OOM"]
    assert [text.get_text() for text in memory.texts if text.get_text()] == ["43.5", "1", "OOM"]


def test_the_largest_context_is_what_a_card_has_room_for() -> None:
    """A line through the two longest contexts that were measured; a contender that does not grow has none."""
    gibi, rows = 2**30, []
    for kv, weights, each in (("exact", 16, 20), ("int4", 16, 5)):
        for context in (10**5, 10**6, 2 * 10**6):
            status = "OOM" if (kv, context) == ("exact", 2 * 10**6) else "ok"
            row = {"attention": "duo", "sparsity": 0.5, "kv": kv, "context": context, "chunk_size": None}
            size = {"peak_bytes": (weights + each * context // 10**6) * gibi, "weights_bytes": 0, "cache_bytes": 0}
            rows.append(row | {"batch_size": 1, "status": status} | size)
    rows.append(rows[0] | {"attention": "spans", "kv": "exact"})
    results = {"task": "memory", "model": {"name": "a model"}, "device": "a card", "rows": rows}
    found = largest_contexts(results)
    assert list(found) == ["duo, 50% retrieval heads", "duo, 50% retrieval heads, int4"]
    exact, codes = (dict(zip(CARDS, tokens, strict=True)) for tokens in found.values())
    assert exact[16] == pytest.approx(0, abs=1)
    assert exact[96] == pytest.approx(4e6)
    assert codes[96] == pytest.approx(16e6)
    (axes,) = plot_largest_contexts(results).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [list(CARDS)] * 2
    assert axes.lines[1].get_ydata()[CARDS.index(96)] == pytest.approx(16)
