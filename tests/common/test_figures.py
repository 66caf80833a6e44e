"""One look for all figures: colours that stay apart, and names as they are drawn."""

import colorsys
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from duo_id.common.figures import COLORS, GATES, label_values, name_points, plain, style

SOURCE = Path(__file__).parents[2] / "src" / "duo_id"


def grey(color: str) -> float:
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_differ_in_hue_or_in_grey() -> None:
    for first, second in combinations(COLORS, 2):
        hues = [
            colorsys.rgb_to_hsv(*(int(c[start : start + 2], 16) / 255 for start in (1, 3, 5)))[0]
            for c in (first, second)
        ]
        assert abs(hues[0] - hues[1]) > 0.05 or abs(grey(first) - grey(second)) > 0.1, (first, second)


def test_the_scale_of_gates_darkens_steadily() -> None:
    levels = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in (GATES(step / 20) for step in range(21))]
    assert levels == sorted(levels, reverse=True)


def test_every_module_that_draws_takes_the_one_style() -> None:
    drawing = [path for path in SOURCE.rglob("*.py") if re.search(r"\bFigure\(figsize", path.read_text())]
    assert len(drawing) >= 6
    for path in drawing:
        text = path.read_text()
        assert "from duo_id.common.figures import" in text, path
        assert "rc_context" not in text
        assert text.count("Figure(figsize") <= text.count("@style()"), path


@style()
def test_labels_of_points_cover_neither_points_nor_each_other() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    for number in range(6):
        axes.plot(1 + 0.01 * number, 0.02 * number, "o", label=f"point {number}")
    axes.set_xlim(0, 2)
    name_points(figure, axes)
    boxes = [text.get_window_extent() for text in axes.texts]
    points = [axes.transData.transform(line.get_xydata()[0]) for line in axes.lines]
    assert len(boxes) == 6
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert not any(box.contains(*point) for box in boxes for point in points)


@pytest.mark.parametrize(("values", "scale"), [((-0.2, 0.9, np.nan), "linear"), ((0.01, -2.0), "symlog")])
def test_an_axis_is_logarithmic_where_a_linear_one_hides_the_small(values: tuple[float, ...], scale: str) -> None:
    axes = Figure().subplots()
    label_values(axes, "x", np.array(values), "rise")
    assert axes.get_xscale() == scale
    assert axes.get_xlabel() == ("rise" if scale == "linear" else "rise, logarithmic beyond 0.1")


def test_plain_names() -> None:
    assert plain("a$b$") == r"a\$b\$"
    assert plain("x" * 50 + "end", 10) == "…xxxxxxend"
    assert plain("a\x00\ud800b") == "a??b"
