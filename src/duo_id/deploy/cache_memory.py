"""The memory of caches under head masks as a function of the context, computed and plotted."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from duo_id.attention.codes import Kv
from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, MARKERS, plain, set_title, style
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.patterns.pattern import HeadMask
from duo_id.patterns.spans import HeadSpans


def cache_bytes(
    model: PreTrainedModel, masks: Mapping[str, HeadMask | HeadSpans], contexts: Sequence[int], kv: Kv = "exact"
) -> pd.DataFrame:
    """Bytes of keys and values that one sample's cache keeps under each mask; the model is not run.

    Args:
        model: not under a mask; its dtype matters.
        masks: or spans, by name; one without streaming heads is full attention.
        contexts: lengths in tokens.
        kv: what retrieval heads keep; see `DualCache`.

    Returns:
        one row per context, one column per mask.

    Raises:
        UserError: a mask does not fit the model.
    """
    columns = {}
    for name, mask in masks.items():
        with duo_attention(model, mask, kv=kv):
            cache = dual_cache(model)
            cache.fill(1, 1, model.dtype, model.device)  # stores have no size before the first token
            columns[name] = [sum(layer.retained_bytes(tokens) for layer in cache.dual_layers) for tokens in contexts]
    return pd.DataFrame(columns, index=pd.Index(contexts, name="context"))


@style()
def plot_cache_bytes(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Cache memory over the context; the legend shows the saving relative to the first mask at the longest context.

    Args:
        table: as returned by `cache_bytes`, full attention first.
        title: above the figure.

    Raises:
        UserError: the table is empty.
    """
    if table.empty:
        raise UserError("there is nothing to plot: pass at least one mask and one context to cache_bytes")
    unit, size = ("GiB", 2**30) if table.to_numpy().max() >= 2**30 else ("MiB", 2**20)
    longest = table.sort_index().iloc[-1]
    figure = Figure(figsize=(4.8, 3.6))
    axes = figure.subplots()
    for (name, sizes), color, marker in zip(table.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        ratio = longest.iloc[0] / longest[name]
        label = plain(str(name)) + (f": {ratio:.2f}x less" if ratio > 1 else "")
        axes.plot(table.index / 1000, sizes / size, color=color, marker=marker, markersize=3.5, label=label)
    axes.set(xlabel="context (thousand tokens)", ylabel=f"KV cache of one sample ({unit})")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    set_title(figure, title)
    return figure
