"""Where single heads look in one sample: attention from its answers over its context, computed and plotted."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.full import full_attention
from duo_id.attention.functions import AttendFunction, Backends
from duo_id.attention.interface import attached, bound
from duo_id.attention.padding import no_padding
from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, GATES, style
from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import attention_rows
from duo_id.methods.needles import needles
from duo_id.patterns.pattern import HeadPattern

Head = tuple[int, int]  # layer, KV head
PARTS = {"needle": COLORS[1], "elsewhere": "#BBBBBB", "recent": COLORS[4], "sink": COLORS[0]}  # of a context


def answer_attention(
    model: PreTrainedModel, sample: Sample, heads: Collection[Head] | None = None
) -> dict[Head, Tensor]:
    """Full attention's weights from the tokens that predict the answers; no other queries are computed.

    Args:
        model: not under a mask.
        sample: with answers that occur in its context.
        heads: None: all heads of the gated layers.

    Returns:
        for each head, (answer tokens, tokens) float32 on the CPU, the mean over its query heads; rows in the order of
        `needles`.

    Raises:
        UserError: a head does not exist, or an answer does not occur in the context.
    """
    ids, backends = sample["input_ids"].to(model.device)[None], Backends()
    queries = torch.cat([answer for answer, _ in needles(sample)]).to(model.device) - 1
    collected: dict[Head, list[Tensor]] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, layer: int) -> Tensor:
        rows = torch.cat([weights for _, weights in attention_rows(query, key, queries, softmax)], 1)
        kv_heads = rows.unflatten(0, (key.shape[1], -1)).mean(1).cpu()  # (KV heads, queries, tokens)
        for head in (head for head in collected if head[0] == layer):
            collected[head].append(kv_heads[head[1]])  # one entry per layer that shares the keys
        return full_attention(query, key, value, softmax, backends.full)

    with torch.no_grad(), attached(model, backends) as layers:
        gated_heads = [(layer.index, head) for layer in layers for head in range(layer.kv_heads)]
        collected |= {head: [] for head in (gated_heads if heads is None else heads)}
        if unknown := [head for head in collected if head not in gated_heads]:
            raise UserError(
                f"layer {unknown[0][0]} has no KV head {unknown[0][1]} with a gate: gated heads are {gated_heads[0]} "
                f"to {gated_heads[-1]}"
            )
        functions: dict[int, AttendFunction] = {layer: partial(attend, layer=layer) for layer, _ in collected}
        with bound(layers, functions):
            model.base_model(input_ids=ids, attention_mask=no_padding(ids), use_cache=False)
    return {head: torch.stack(parts).mean(0) for head, parts in collected.items()}


def attention_shares(maps: Mapping[Head, Tensor], sample: Sample, window: Window) -> pd.DataFrame:
    """How a head's attention divides over the parts of the context, mean over the answer tokens.

    Args:
        maps: from `answer_attention`.
        sample: the same sample.
        window: sink and recent size.

    Returns:
        one row per head (layer, head); columns `needle` (the answer's source, beyond the window), `elsewhere`,
        `recent` and `sink` sum to 1.
    """
    spans = needles(sample)
    queries = torch.cat([answer for answer, _ in spans])[:, None] - 1
    keys = torch.arange(len(sample["input_ids"]))
    sink, in_view = keys < window.sink_size, window.sees(queries, keys)
    needle = torch.cat([torch.isin(keys, source).expand(len(answer), -1) for answer, source in spans])
    parts = {
        "needle": needle & ~in_view,
        "elsewhere": ~needle & ~in_view,
        "recent": in_view & ~sink,
        "sink": in_view & sink,
    }
    rows = {
        head: {name: float((weight * part).sum(-1).mean()) for name, part in parts.items()}
        for head, weight in maps.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["layer", "head"])
    return table


@style()
def plot_attention(maps: Mapping[Head, Tensor], sample: Sample, window: Window, pattern: HeadPattern) -> Figure:
    """One panel per head: from each answer token (down) over the context (to the right), needles marked above.

    Args:
        maps: from `answer_attention`, of a few heads.
        sample: the same sample.
        window: sink and recent size; tokens right of the stepped line are recent.
        pattern: of the same model, for the scores in the titles.
    """
    spans, shares = needles(sample), attention_shares(maps, sample, window)
    queries = torch.cat([answer for answer, _ in spans]).numpy() - 1
    tokens = int(queries[-1]) + 1
    figure = Figure(figsize=(5.2, 1.0 + 1.55 * len(maps)))
    grid = figure.subplots(len(maps), squeeze=False, sharex=True)[:, 0]
    top = max(float(weight.max()) for weight in maps.values())
    scale = PowerNorm(0.5, 0, top)  # makes the many small weights visible beside the few large ones
    for axes, (head, weight) in zip(grid, maps.items(), strict=True):
        columns, rows = np.arange(tokens + 1) - 0.5, np.arange(len(queries) + 1) - 0.5
        mesh = axes.pcolormesh(columns, rows, weight[:, :tokens].numpy(), cmap=GATES, norm=scale, rasterized=True)
        for _, source in spans:
            axes.plot([source[0] - 0.5, source[-1] + 0.5], [-1.1, -1.1], color=PARTS["needle"], linewidth=3.5)
        axes.axvline(window.sink_size - 0.5, color=PARTS["sink"], linewidth=1.0)
        recent = np.append(queries, queries[-1]) - window.recent_size + 0.5
        axes.step(recent, rows, where="pre", color=PARTS["recent"], linewidth=1.2)
        axes.set_ylim(len(queries) - 0.5, -1.6)
        axes.set_yticks([])
        axes.set_ylabel("answer tokens", fontsize=8)
        share = shares.loc[head]
        shares_text = ", ".join(f"{100 * share[name]:.0f}% {name}" for name in ("needle", "sink", "recent"))
        title = f"layer {head[0]}, KV head {head[1]}, score {pattern.scores[head]:.2f}: {shares_text}"
        axes.set_title(title, loc="left", fontsize=8)
    grid[-1].set_xlabel("position in the context (tokens)")
    bar = figure.colorbar(mesh, ax=list(grid), location="bottom", label="attention weight", aspect=40, shrink=0.7)
    bar.outline.set_visible(False)
    marks = [("needles", PARTS["needle"]), ("end of the sink", PARTS["sink"]), ("recent window", PARTS["recent"])]
    figure.legend(handles=_keys(marks), loc="outside lower center", ncols=3)
    return figure


@style()
def plot_shares(shares: pd.DataFrame, pattern: HeadPattern) -> Figure:
    """Scores against attention beyond sink and window, and the attention of the heads with the highest and the lowest.

    Args:
        shares: from `attention_shares`, preferably of all heads.
        pattern: of the same model.
    """
    scores = np.array([float(pattern.scores[head]) for head in shares.index])
    far = 100 * (shares["needle"] + shares["elsewhere"])
    figure = Figure(figsize=(5.2, 3.4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.scatter(scores, 100 * shares["needle"], s=14, color=PARTS["needle"], marker="o", label="on the needle")
    left.scatter(scores, far, s=14, facecolor="none", edgecolor="#555555", marker="o", label="beyond the window")
    left.set(xlabel=pattern.cells().label, ylabel="attention (%)", ylim=(-2, 102))
    left.grid(axis="y")
    left.legend(loc="upper left")
    ranking = scores.argsort(kind="stable")[::-1]
    extremes = [*ranking[: min(5, len(ranking))], *ranking[max(5, len(ranking) - 5) :]]
    offsets = np.zeros(len(extremes))
    for name, color in PARTS.items():
        part = 100 * shares[name].to_numpy()[extremes]
        right.barh(range(len(extremes)), part, left=offsets, color=color, label=name, height=0.75)
        offsets += part
    right.set_yticks(range(len(extremes)), [f"{layer}.{head}" for layer, head in shares.index[extremes]])
    right.set(
        ylim=(len(extremes) - 0.4, -0.6),
        xlim=(0, 100),
        xlabel="attention (%)",
        ylabel="layer.head by score, highest on top",
    )
    figure.legend(handles=_keys(PARTS.items()), loc="outside lower center", ncols=4)
    return figure


def _keys(marks: Iterable[tuple[str, str]]) -> list[Patch]:
    return [Patch(facecolor=color, label=name) for name, color in marks]
