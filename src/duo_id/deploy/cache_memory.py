"""How much memory the caches of head masks take over the context, computed and drawn."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, MARKERS, plain, set_title, style
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.patterns.pattern import HeadMask


def cache_bytes(model: PreTrainedModel, masks: Mapping[str, HeadMask], contexts: Sequence[int]) -> pd.DataFrame:
    """Bytes of the keys and values that one sample's cache keeps under each mask; nothing is run.

    Args:
        model: under no mask; its data type counts.
        masks: by name; one without streaming heads is full attention.
        contexts: tokens.

    Returns:
        one row a context, one column a mask.

    Raises:
        UserError: a mask does not fit the model.
    """
    found = {}
    for name, mask in masks.items():
        with duo_attention(model, mask):
            cache = dual_cache(model)
            cache.fill(1, 1, model.dtype, model.device)  # its stores know their sizes from the first token on
            found[name] = [sum(layer.retained_bytes(tokens) for layer in cache.dual_layers) for tokens in contexts]
    return pd.DataFrame(found, index=pd.Index(contexts, name="context"))


@style()
def plot_cache_bytes(table: pd.DataFrame, title: str | None = None) -> Figure:
    """The caches' memory over the context; the legend says how much less than the first each takes at the longest.

    Args:
        table: as of `cache_bytes`, full attention first.
        title: above the figure.

    Raises:
        UserError: there is no context or no mask.
    """
    if table.empty:
        raise UserError("there is nothing to plot: give cache_bytes at least one mask and one context")
    unit, size = ("GiB", 2**30) if table.to_numpy().max() >= 2**30 else ("MiB", 2**20)
    longest = table.sort_index().iloc[-1]
    figure = Figure(figsize=(4.8, 3.6))
    axes = figure.subplots()
    for (name, held), color, marker in zip(table.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        less = longest.iloc[0] / longest[name]
        label = plain(str(name)) + (f": {less:.2f}x less" if less > 1 else "")
        axes.plot(table.index / 1000, held / size, color=color, marker=marker, markersize=3.5, label=label)
    axes.set(xlabel="context (thousand tokens)", ylabel=f"KV cache of one sample ({unit})")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    set_title(figure, title)
    return figure
