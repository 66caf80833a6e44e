"""Values of heads as figures draw them: what lies between head patterns and their heatmap."""

from typing import NamedTuple

import numpy as np


class Cells(NamedTuple):
    """Values of heads.

    Attributes:
        values: (layers, KV heads).
        gated_layers: those whose values count; the others are hatched.
        label: of the values; of a mask, its title.
        limits: of the colours.
        spans: whether these are attention spans, on a logarithmic scale; those of all tokens lie beyond the limits.
    """

    values: np.ndarray
    gated_layers: tuple[int, ...]
    label: str
    limits: tuple[float, float]
    spans: bool = False
