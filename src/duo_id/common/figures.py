"""The common style of all figures: a palette safe for colour blindness, sizes, and how heads are drawn.

Notebooks, run folders, evaluations, benchmarks and the report's page use it. Sizes are chosen so that text stays
legible when a figure is as wide as one column of a page.
"""

from base64 import b64encode
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from duo_id.common.errors import UserError, check
from duo_id.common.files import atomic_path

# From Okabe and Ito's palette, distinguishable with all common kinds of colour blindness (jfly.uni-koeln.de/color).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
GREY = "#8A8A8A"  # of everything beyond these colours: a seventh would be taken for one of the six
MARKERS, DASHES = "os^Dv<", ("-", "--", ":", "-.")
LINEAR, TICKS = 0.1, (0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of axes that are logarithmic further out
GATES = mpl.colormaps["YlGnBu"]  # light to dark, so that it also works in greyscale
UNGATED: dict[str, Any] = {"facecolor": "#DDDDDD", "edgecolor": "#999999", "hatch": "//////", "linewidth": 0.0}


@contextmanager
def style() -> Iterator[None]:
    """Apply the common style to a block or a decorated function, and restore the previous one afterwards."""
    with mpl.rc_context(
        {
            "figure.dpi": 160,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.06,
            "figure.constrained_layout.w_pad": 0.06,
            "figure.titlesize": 10,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.6,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "lines.linewidth": 1.4,
            "hatch.linewidth": 0.5,
        }
    ):
        yield


def draw_cells(axes: Axes, values: np.ndarray, scale: Normalize, form: str = "", colors: Colormap = GATES) -> QuadMesh:
    """Draw one cell per value (rows, columns), the first row on top; `form` formats the numbers written into them."""
    rows, columns = (np.arange(size + 1) - 0.5 for size in values.shape)
    line = min(0.4, 16 / max(values.shape) ** 1.2)
    mesh = axes.pcolormesh(columns, rows, values, cmap=colors, norm=scale, edgecolors="white", linewidth=line)
    axes.set_ylim(rows[-1], rows[0])
    axes.spines[:].set(visible=True, linewidth=0.5, color="#555555")
    if form:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if scale(value) > 0.55 else "black"
                axes.text(column, row, form.format(value), color=color, ha="center", va="center", fontsize=7)
    return mesh


def hatch_ungated(axes: Axes, layers: int, kv_heads: int, gated: Collection[int], flat: bool = False) -> None:
    """Hatch the layers without gates in a grid of one cell per head; `flat`: layers run to the right, not down."""
    for layer in sorted(set(range(layers)) - set(gated)):
        corner, size = ((layer - 0.5, -0.5), (1, kv_heads)) if flat else ((-0.5, layer - 0.5), (kv_heads, 1))
        axes.add_patch(Rectangle(corner, *size, **UNGATED))


def number_heads(axes: Axes, flat: bool = False) -> None:
    """Label the axes of a grid of one cell per head; inner panels of a figure stay without labels."""
    axes.set(xlabel="layer" if flat else "KV head", ylabel="KV head" if flat else "layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.label_outer()


def label_values(axes: Axes, which: str, values: np.ndarray, label: str) -> None:
    """Label an axis ("x" or "y"), logarithmic beyond ± `LINEAR` if any value reaches ten times that.

    Next to 2 on a linear axis, 0.01 and 0.05 look the same.
    """
    values, axis = values[np.isfinite(values)], axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(label)
    if not np.any(np.abs(values) >= 10 * LINEAR):
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=LINEAR, linscale=0.8)
    low, high = min(values.min(), 0), values.max()
    axis.set_ticks([sign * tick for tick in TICKS for sign in (-1, 1) if low <= sign * tick <= high] + [0.0])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:g}")
    axis.set_label_text(f"{label}{', ' if which == 'x' else chr(10)}logarithmic beyond {LINEAR:g}")


def name_points(figure: Figure, axes: Axes) -> None:
    """Write the label of each labelled point next to it, where it covers neither another point nor its label."""
    figure.draw_without_rendering()  # fixes the layout
    labelled = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    points = {str(line.get_label()): np.asarray(line.get_xydata())[0] for line in labelled}
    pixels = {label: axes.transData.transform(point) for label, point in points.items()}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels.values()]
    for label, (x, y) in pixels.items():
        text = axes.text(points[label][0], points[label][1], label, fontsize=7, va="center", in_layout=False)
        size = text.get_window_extent()
        spots = [(offset, rise) for rise in (0, 12, -12, 24, -24, 36, -36, 48, -48) for offset in (9, -9 - size.width)]
        boxes = [Bbox.from_bounds(x + right, y + up - size.height / 2, size.width, size.height) for right, up in spots]
        inside = [box for box in boxes if axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1]
        free = [box for box in inside if not any(box.overlaps(other) for other in taken)]
        spot = next(iter(free or inside or boxes))
        left, middle = axes.transData.inverted().transform((spot.x0, (spot.y0 + spot.y1) / 2))
        text.set_position((left, middle))
        taken.append(spot)


def set_title(figure: Figure, title: str | None) -> None:
    """Set a figure's title, if there is one, verbatim: names in it are not parsed as formulas."""
    check(title is None or isinstance(title, str), f"title={title!r:.80} must be a text")
    if title:
        lines = ("".join(char if char.isprintable() else "?" for char in line) for line in title.split("\n"))
        figure.suptitle("\n".join(lines), parse_math=False)


def plain(name: str, limit: float = 32) -> str:
    """A name that matplotlib draws verbatim: formulas escaped, printable, at most `limit` characters."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    name = name if len(name) <= limit else "…" + name[1 - int(limit) :]  # names of runs differ in their last part
    return name.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` to `path`, whole or not at all; the suffix chooses the format (png, pdf, svg)."""
    kind = Path(path).suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: a figure needs a suffix that names its format, such as .png, .pdf or .svg")
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def as_html(figure: Figure, caption: str) -> str:
    """What notebooks show of an object: its figure, and a caption below it."""
    image = b64encode(as_png(figure)).decode()
    return f'<img src="data:image/png;base64,{image}" style="max-width: 480px"><br>{escape(caption)}'


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
