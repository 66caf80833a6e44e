"""Figures hold what was saved, leave matplotlib's global state alone, and are written whole."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, save_figure, style
from duo_id.patterns.heatmap import ALL_TOKENS
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.plots import plot_histogram, plot_spans, plot_thresholds
from duo_id.patterns.spans import HeadSpans
from duo_id.train.plots import plot_history, plot_training, read_metrics


def make(layers: int, kv_heads: int, gated: tuple[int, ...] | None = None) -> HeadPattern:
    scores = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(0))
    return HeadPattern(scores, 4, 8, tuple(range(layers)) if gated is None else gated)


def cells(figure: Figure, panel: int) -> np.ndarray:
    """The values of a heatmap, rows from the top of the figure down."""
    axes = figure.axes[panel]
    mesh = next(item for item in axes.collections if isinstance(item, QuadMesh))
    assert axes.yaxis_inverted()
    return np.asarray(mesh.get_array())


@pytest.mark.parametrize(("layers", "kv_heads", "flat"), [(30, 3, True), (32, 8, True), (32, 32, False), (2, 1, False)])
def test_gates_show_every_head_in_a_sensible_direction(layers: int, kv_heads: int, flat: bool) -> None:
    pattern = make(layers, kv_heads)
    mask = pattern.binarize(sparsity=0.5)
    figure = pattern.plot(title="a model", mask=mask)
    expected = (pattern.scores.T, mask.retrieval.T) if flat else (pattern.scores, mask.retrieval)
    assert np.array_equal(cells(figure, 0), expected[0].numpy())
    assert np.array_equal(cells(figure, 1), expected[1].numpy())
    bottom = figure.axes[1]
    assert (bottom.get_xlabel(), figure.axes[0].get_ylabel()) == (
        ("layer", "KV head") if flat else ("KV head", "layer")
    )
    assert figure.axes[2].get_xlabel() == "gate α (1 = retrieval)"
    assert figure.get_suptitle() == "a model"
    assert "50% of the heads stream" in bottom.get_title(loc="left")
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"retrieval", "streaming"}


@pytest.mark.parametrize(
    "method", [{"name": "duo", "gate": "nested"}, {"name": "search"}, {"name": "attention_profile"}]
)
def test_scores_that_are_no_gates_have_a_scale_of_their_own(method: dict[str, str]) -> None:
    told = replace(make(30, 3), provenance={"settings": {"method": method}})
    for pattern in (told, replace(make(30, 3), scores=5 * make(30, 3).scores)):
        figure = pattern.plot()
        assert figure.axes[1].get_xlabel() == "score (higher = retrieval)"
        ends = next(item for item in figure.axes[0].collections if isinstance(item, QuadMesh)).get_clim()
        assert ends == tuple(value.item() for value in pattern.scores.aminmax())


@pytest.mark.parametrize("settings", [None, {}, {"method": None}, {"method": {"gate": "clamp"}}])
def test_patterns_of_any_provenance_are_drawn(settings: Any) -> None:
    figure = replace(make(30, 3), provenance={"settings": settings}).plot()
    assert figure.axes[1].get_xlabel() == "gate α (1 = retrieval)"


def test_one_panel_without_a_mask() -> None:
    figure = make(32, 32).plot()
    assert len(figure.axes) == 2  # the heatmap and its colour bar
    assert not figure.legends


@pytest.mark.parametrize("kv_heads", [3, 32])
def test_layers_without_gates_are_hatched(kv_heads: int) -> None:
    pattern = make(32, kv_heads, gated=tuple(range(8, 32)))
    figure = pattern.plot(mask=pattern.binarize(sparsity=0.5))
    for axes in figure.axes[:2]:
        hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
        corners = sorted(patch.get_x() if kv_heads == 3 else patch.get_y() for patch in hatched)
        assert corners == [layer - 0.5 for layer in range(8)]
    assert "no gates" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_gates_share_one_colour_scale_and_other_scores_say_so() -> None:
    pattern = HeadPattern(torch.tensor([[0.2, 0.4], [0.3, 0.3]]), 4, 8)
    assert pattern.plot().axes[0].collections[0].get_clim() == (0, 1)
    other = HeadPattern(torch.tensor([[0.0, 7.0], [-2.0, 3.0]]), 4, 8)
    figure = other.plot()
    assert figure.axes[0].collections[0].get_clim() == (-2, 7)
    assert figure.axes[1].get_xlabel() == "score (higher = retrieval)"
    assert plot_histogram(other).axes[0].get_xlabel() == "score (higher = retrieval)"


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="30 layers x 3 KV heads"):
        make(32, 8).plot(mask=make(30, 3).binarize(sparsity=0.5))


@pytest.mark.parametrize(("layers", "kv_heads", "flat"), [(9, 3, True), (4, 3, False)], ids=["flat", "tall"])
def test_spans_stand_on_a_logarithmic_scale_and_all_tokens_apart(layers: int, kv_heads: int, flat: bool) -> None:
    spans = torch.tensor([64, 256, 1024, -1]).repeat(layers * kv_heads)[: layers * kv_heads].view(layers, kv_heads)
    figure = HeadSpans(spans, 4, tuple(range(layers - 1))).plot("a model")
    mesh = next(item for item in figure.axes[0].collections if isinstance(item, QuadMesh))
    assert isinstance(mesh.norm, LogNorm)
    drawn = np.asarray(mesh.get_array())
    drawn = drawn.T if flat else drawn
    gated = spans[:-1].numpy()
    assert np.array_equal(drawn[:-1][gated != -1], gated[gated != -1])
    colors = mesh.cmap(mesh.norm(drawn[:-1]))
    is_all = (colors == to_rgba(ALL_TOKENS)).all(-1)
    assert np.array_equal(is_all, gated == -1)
    bar = figure.axes[1]
    assert [label.get_text() for label in bar.get_xticklabels()] == ["64", "256", "1024"]
    assert "all" in {text.get_text() for text in bar.texts}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"no gates"}


def test_many_spans_are_numbered_by_powers_of_2() -> None:
    bar = HeadSpans(torch.arange(100, 31_000, 100)[:256].view(64, 4), 4).plot().axes[1]
    labels = [label.get_text() for label in bar.get_xticklabels()]
    assert labels == ["128", "512", "2048", "8192", "32K"], "at most eight"


@pytest.mark.parametrize("span", [64, -1], ids=["one window", "full"])
def test_equal_spans_are_drawn(span: int) -> None:
    spans = HeadSpans(torch.full((3, 2), span), 0)
    spans.plot().draw_without_rendering()
    bars = plot_spans(spans).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 6


def test_bars_count_the_heads_of_each_span() -> None:
    spans = HeadSpans(torch.tensor([[64, -1], [1024, 64], [-1, 5]]), 4, (0, 1))
    axes = plot_spans(spans, "a model").axes[0]
    heights = {
        label.get_text(): bar.get_height() for label, bar in zip(axes.get_xticklabels(), axes.patches, strict=True)
    }
    assert heights == {"64": 2, "1,024": 1, "all": 1}
    assert axes.get_ylabel() == "KV heads (of 4)"
    many = plot_spans(HeadSpans(torch.arange(1, 33).view(8, 4), 4)).axes[0]
    names = [label.get_text() for label in many.get_xticklabels()]
    assert names == ["to 1", "to 2", "to 4", "to 8", "to 16", "to 32", "all"]
    assert [bar.get_height() for bar in many.patches] == [1, 1, 2, 4, 8, 16, 0]


def test_spans_beside_scores_are_refused() -> None:
    with pytest.raises(UserError, match="mask: a HeadSpans is not a HeadMask; spans have a plot"):
        make(3, 2).plot(mask=HeadSpans(torch.full((3, 2), 8), 4))  # type: ignore[arg-type]


def test_histogram_counts_gated_heads_and_draws_the_thresholds() -> None:
    pattern = make(8, 4, gated=(0, 1, 2, 3, 4))
    axes = plot_histogram(pattern).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 20
    ordered = pattern.scores[:5].flatten().sort().values.tolist()
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([ordered[5], ordered[10], ordered[15]])


@pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")
def test_histogram_of_equal_scores() -> None:
    lines = plot_histogram(HeadPattern(torch.ones(1, 2), 4, 8), sparsities=(0.5, 1.0)).axes[0].lines
    assert [line.get_xdata()[0] for line in lines] == [1]  # at 100% no head is kept, so there is no threshold


@pytest.mark.parametrize(("layers", "kv_heads"), [(30, 3), (32, 32)])
def test_thresholds_show_a_mask_each(layers: int, kv_heads: int) -> None:
    pattern, thresholds = make(layers, kv_heads, gated=tuple(range(2, layers))), (0.1, 0.5, 0.9, 2.0)
    figure = plot_thresholds(pattern, thresholds, title="a model")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for place, (axes, threshold) in enumerate(zip(shown, thresholds, strict=True)):
        retrieval = pattern.binarize(threshold=threshold).retrieval.numpy()
        np.testing.assert_array_equal(cells(figure, place), retrieval.T if kv_heads == 3 else retrieval)
        title = axes.get_title(loc="left")
        assert title.startswith(f"below {threshold:g}:")
        assert f"{int((~retrieval).sum())} of {pattern.gated_heads} stream" in title
    assert "no gates" in {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown[-1].get_xlabel() == ("layer" if kv_heads == 3 else "KV head")
    with pytest.raises(UserError, match="thresholds"):
        plot_thresholds(pattern, ())


def test_history_shows_every_gate_in_the_colour_of_what_becomes_of_it() -> None:
    columns = pd.MultiIndex.from_tuples([(0, 0), (0, 1), (2, 0), (2, 1)])
    history = pd.DataFrame([[1, 1, 1, 1], [0.9, 0.2, 0.7, 0.6], [0.8, 0.1, 0.4, 0.5]], [0, 5, 10], columns)
    lines = plot_history(history, sparsity=0.25).axes[0].lines
    retrieval, streaming = (
        [list(line.get_ydata()) for line in lines if line.get_color() == color] for color in COLORS[:2]
    )
    medians = retrieval.pop(), streaming.pop()
    assert sorted(retrieval) == [[1, 0.6, 0.5], [1, 0.7, 0.4], [1, 0.9, 0.8]]
    assert streaming == [[1, 0.2, 0.1]]
    assert medians == ([1, 0.7, 0.5], [1, 0.2, 0.1])
    assert {line.get_label() for line in lines if not str(line.get_label()).startswith("_")} == {
        "3 retrieval heads, median",
        "1 streaming heads, median",
    }
    assert len(plot_history(history, sparsity=0).axes[0].lines) == 5


METRICS = pd.DataFrame(
    {
        "step": [0, 0, 10, 20, 20],
        "train/distill": [0.5, None, 0.4, 0.3, None],
        "train/penalty": [0.05, None, 0.04, 0.03, None],
        "train/mean_gate": [1.0, None, 0.9, 0.8, None],
        "train/tokens_per_s": [100.0, None, 100.0, 100.0, None],
        "val/answer_loss_50": [None, 0.9, None, None, 0.2],
        "val/answer_loss_75": [None, 1.9, None, None, 0.7],
        "val/answer_loss_25": [None] * 5,
        "val/answer_loss_0": [None, 0.1, None, None, 0.1],
        "val/token_accuracy_50": [None, 0.5, None, None, 0.9],
        "val/distill": [None, 0.6, None, None, 0.25],
    }
)


def curves(figure: Figure) -> list[dict[str, list[list[float]]]]:
    return [
        {str(line.get_label()): [list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines}
        for axes in figure.axes
    ]


def test_training_curves_skip_what_was_not_logged() -> None:
    loss, gate, answer = curves(plot_training(METRICS))
    assert loss["distillation"] == [[0, 10, 20], [0.5, 0.4, 0.3]]
    assert loss["penalty"] == [[0, 10, 20], [0.05, 0.04, 0.03]]
    assert loss["distillation, validation"] == [[0, 20], [0.6, 0.25]]
    assert list(gate.values()) == [[[0, 10, 20], [1.0, 0.9, 0.8]]]
    assert answer == {
        "full attention": [[0, 20], [0.1, 0.1]],
        "50% stream": [[0, 20], [0.9, 0.2]],
        "75% stream": [[0, 20], [1.9, 0.7]],
    }


def test_training_panels_without_data_are_left_out() -> None:
    figure = plot_training(METRICS[["step", "train/mean_gate"]])
    assert [axes.get_ylabel() for axes in figure.axes] == ["mean gate α"]
    assert figure.axes[0].get_xlabel() == "step"
    with pytest.raises(UserError, match="hold none of"):
        plot_training(METRICS[["step", "train/tokens_per_s"]])


def test_zeros_of_a_loss_are_left_out_of_its_log_scale() -> None:
    zero_at_first = METRICS.assign(**{"train/distill": METRICS["train/distill"].mask(METRICS["step"] == 0, 0.0)})
    panel = plot_training(zero_at_first).axes[0]
    assert panel.get_yscale() == "log"
    assert 0 < panel.get_ylim()[0] < 0.05
    nothing = METRICS[["step"]].assign(**{"train/penalty": 0.0})
    assert plot_training(nothing).axes[0].get_yscale() == "linear"


def test_long_noisy_curves_are_smoothed_by_their_median() -> None:
    steps = np.arange(400)
    frame = pd.DataFrame({"step": steps, "train/distill": np.where(steps % 7 == 0, 100.0, 1.0)})
    raw, smooth = plot_training(frame).axes[0].lines
    assert max(raw.get_ydata()) == 100
    assert set(smooth.get_ydata()[10:-10]) == {1.0}


def write_version(run: Path, version: int, text: str) -> Path:
    path = run / "metrics" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_the_latest_version_of_a_step_wins(tmp_path: Path) -> None:
    write_version(tmp_path, 2, "step,train/distill,val/distill\n10,2,\n20,2,\n")
    write_version(tmp_path, 10, "step,train/distill\n20,10\n30,10\n")
    write_version(tmp_path, 0, "step,val/distill,train/distill\n20,7,0\n0,,0\n10,,0\n0,5,\n")
    write_version(tmp_path, 11, "")  # a run that has only just been resumed
    metrics = read_metrics(tmp_path)
    assert metrics["step"].tolist() == [0, 10, 20, 30]
    assert metrics["train/distill"].tolist() == [0, 2, 10, 10]
    assert metrics["val/distill"].fillna(-1).tolist() == [5, -1, 7, -1]
    assert curves(plot_training(tmp_path))[0]["distillation"] == [[0, 10, 20, 30], [0, 2, 10, 10]]


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for version in (3, 12, 7, 0, 11, 5, 1, 9, 2, 10, 4, 8, 6):
        write_version(tmp_path, version, f"step,train/distill\n{version},0.5\n100,{version}\n")
    metrics = read_metrics(tmp_path)
    assert metrics["step"].tolist() == [*range(13), 100]
    assert metrics["train/distill"].iloc[-1] == 12


def test_a_csv_is_read_as_the_frame_is(tmp_path: Path) -> None:
    path = write_version(tmp_path, 0, METRICS.to_csv(index=False))
    assert curves(plot_training(path)) == curves(plot_training(METRICS))


def test_what_holds_no_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no metrics yet"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"nowhere.csv cannot be read"):
        plot_training(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="no column named step"):
        plot_training(write_version(tmp_path, 0, "a,b\n1,2\n"))
    with pytest.raises(UserError, match="'b' holds values other than numbers"):
        plot_training(write_version(tmp_path, 1, "step,b\n1,x\n"))
    with pytest.raises(UserError, match="is not a metrics CSV: Error tokenizing data"):
        plot_training(write_version(tmp_path, 2, "step,b\n1,2,3,4\n1\n2,2,2,2,2,2\n"))
    with pytest.raises(UserError, match="these metrics hold none of"):
        plot_training(write_version(tmp_path, 3, "step,val/answer_loss_x\n1,2\n"))
    (tmp_path / "metrics.csv").write_bytes(b"step,\xff\n")
    with pytest.raises(UserError, match="is not a text file"):
        plot_training(tmp_path / "metrics.csv")
    (tmp_path / "run" / "metrics" / "version_x").mkdir(parents=True)
    (tmp_path / "run" / "metrics" / "version_x" / "metrics.csv").write_text("step,b\n1,2\n")
    with pytest.raises(UserError, match="has no metrics yet"):
        read_metrics(tmp_path / "run")


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_written_whole(suffix: str, magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / "figures" / f"gates.{suffix}"
    save_figure(make(4, 4).plot(), path)
    assert path.read_bytes().startswith(magic)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["gates", "gates.tsv"])
def test_a_figure_needs_a_format(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.png"):
        save_figure(make(4, 4).plot(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_style_ends_with_the_call() -> None:
    before = dict(mpl.rcParams)
    plot_histogram(make(4, 4))
    with style():
        assert mpl.rcParams["figure.dpi"] == 160
    assert dict(mpl.rcParams) == before


def test_no_display_is_asked_for() -> None:
    code = "import sys, duo_id.patterns.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
