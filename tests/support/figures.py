"""Runs whose figures nobody looks at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from matplotlib.figure import Figure


@contextmanager
def blank_figures() -> Iterator[None]:
    """Let files hold empty figures for a block: to lay out and draw one takes as long as a tiny step of training."""
    draw, blank = Figure.savefig, Figure(figsize=(1, 1))

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        draw(blank, *arguments, **options)

    with patch.object(Figure, "savefig", save):
        yield
