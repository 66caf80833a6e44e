"""One look for all figures: colours that stay apart, and names as they are drawn."""

import colorsys
import re
from itertools import combinations
from pathlib import Path

from duo_id.common.figures import COLORS, GATES, plain

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


def test_plain_names() -> None:
    assert plain("a$b$") == r"a\$b\$"
    assert plain("x" * 50 + "end", 10) == "…xxxxxxend"
    assert plain("a\x00\ud800b") == "a??b"
