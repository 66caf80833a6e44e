"""Where single heads look in one sample: the attention from its answers over its context, computed and drawn."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.functions import AttendFunction
from duo_id.attention.interface import bound
from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, GATES, style
from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import weights
from duo_id.methods.needles import needles
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern

Head = tuple[int, int]  # layer, KV head
PARTS = {"needle": COLORS[1], "elsewhere": "#BBBBBB", "recent": COLORS[4], "sink": COLORS[0]}  # of a context


def answer_attention(
    gated_model: GatedModel, sample: Sample, heads: Collection[Head] | None = None
) -> dict[Head, Tensor]:
    """Attention weights of full attention from the tokens that predict the answers; no other queries are computed.

    Args:
        gated_model: the model.
        sample: whose answers stand in its context.
        heads: which ones; None: all of the gated layers.

    Returns:
        for each head (answer tokens, tokens) float32 on the CPU, the mean over the query heads that share it; the
        rows are those of `needles`, in its order.

    Raises:
        UserError: a head does not exist, or an answer stands nowhere in the context.
    """
    known = [(layer.index, head) for layer in gated_model.layers for head in range(layer.kv_heads)]
    chosen = known if heads is None else list(heads)
    if missing := [head for head in chosen if head not in known]:
        layer, head = missing[0]
        raise UserError(f"layer {layer} has no KV head {head} with a gate: they are {known[0]} to {known[-1]}")
    ids = sample["input_ids"].to(gated_model.device)
    queries = torch.cat([answer for answer, _ in needles(sample)]).to(gated_model.device) - 1
    found: dict[Head, list[Tensor]] = {head: [] for head in chosen}

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, layer: int) -> Tensor:
        rows = torch.cat([part for _, part in weights(query, key, queries, softmax)], 1)  # (heads, queries, tokens)
        of_head = rows.unflatten(0, (key.shape[1], -1)).mean(1).cpu()
        for head in (head for head in chosen if head[0] == layer):
            found[head].append(of_head[head[1]])  # once more for each layer that shares the keys
        return full_attention(query, key, value, softmax, gated_model.backends.full)

    watching: dict[int, AttendFunction] = {layer: partial(attend, layer=layer) for layer, _ in chosen}
    with torch.no_grad(), bound(gated_model.layers, watching):
        gated_model.model.hidden_states({"input_ids": ids[None]})
    return {head: torch.stack(parts).mean(0) for head, parts in found.items()}


def attention_shares(maps: Mapping[Head, Tensor], sample: Sample, window: Window) -> pd.DataFrame:
    """How much of a head's attention falls on which part of the context, mean over the answer tokens.

    Args:
        maps: as of `answer_attention`.
        sample: the same.
        window: which tokens are sink and recent.

    Returns:
        one row a head (layer, head), columns `needle` (what answers, beyond the window), `elsewhere`, `recent` and
        `sink`, which sum to 1.
    """
    found = needles(sample)
    queries = torch.cat([answer for answer, _ in found])[:, None] - 1
    keys = torch.arange(len(sample["input_ids"]))
    sink, seen = keys < window.sink_size, window.sees(queries, keys)
    needle = torch.cat([torch.isin(keys, source).expand(len(answer), -1) for answer, source in found])
    parts = {"needle": needle & ~seen, "elsewhere": ~needle & ~seen, "recent": seen & ~sink, "sink": seen & sink}
    rows = {
        head: {name: float((weight * part).sum(-1).mean()) for name, part in parts.items()}
        for head, weight in maps.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["layer", "head"])
    return table


@style()
def plot_attention(maps: Mapping[Head, Tensor], sample: Sample, window: Window, pattern: HeadPattern) -> Figure:
    """One panel a head: from each answer token (down) over the context (to the right); the needles are marked above.

    Args:
        maps: as of `answer_attention`, of a few heads.
        sample: the same.
        window: which tokens are sink and recent; what lies right of the stepped line is recent.
        pattern: says how open the heads' gates are.
    """
    found, shares = needles(sample), attention_shares(maps, sample, window)
    queries = torch.cat([answer for answer, _ in found]).numpy() - 1
    tokens = int(queries[-1]) + 1
    figure = Figure(figsize=(5.2, 1.0 + 1.55 * len(maps)))
    grid = figure.subplots(len(maps), squeeze=False, sharex=True)[:, 0]
    top = max(float(weight.max()) for weight in maps.values())
    scale = PowerNorm(0.5, 0, top)  # the many small weights are seen beside the few large ones
    for axes, (head, weight) in zip(grid, maps.items(), strict=True):
        places = np.arange(tokens + 1) - 0.5, np.arange(len(queries) + 1) - 0.5
        mesh = axes.pcolormesh(*places, weight[:, :tokens].numpy(), cmap=GATES, norm=scale, rasterized=True)
        for _, source in found:
            axes.plot([source[0] - 0.5, source[-1] + 0.5], [-1.1, -1.1], color=PARTS["needle"], linewidth=3.5)
        axes.axvline(window.sink_size - 0.5, color=PARTS["sink"], linewidth=1.0)
        recent = np.append(queries, queries[-1]) - window.recent_size + 0.5
        axes.step(recent, places[1], where="pre", color=PARTS["recent"], linewidth=1.2)
        axes.set_ylim(len(queries) - 0.5, -1.6)
        axes.set_yticks([])
        axes.set_ylabel("answer tokens", fontsize=8)
        share = shares.loc[head]
        told = ", ".join(f"{100 * share[name]:.0f}% {name}" for name in ("needle", "sink", "recent"))
        axes.set_title(
            f"layer {head[0]}, KV head {head[1]}, α = {pattern.scores[head]:.2f}: {told}", loc="left", fontsize=8
        )
    grid[-1].set_xlabel("place in the context (tokens)")
    bar = figure.colorbar(mesh, ax=list(grid), location="bottom", label="attention weight", aspect=40, shrink=0.7)
    bar.outline.set_visible(False)
    marks = [("needles", PARTS["needle"]), ("end of the sink", PARTS["sink"]), ("recent window", PARTS["recent"])]
    figure.legend(handles=_keys(marks), loc="outside lower center", ncols=3)
    return figure


@style()
def plot_shares(shares: pd.DataFrame, pattern: HeadPattern) -> Figure:
    """Every head's gate against its attention beyond sink and window, and how the attention of the extremes divides.

    Args:
        shares: as of `attention_shares`, best of all heads.
        pattern: of the same model.
    """
    gates = np.array([float(pattern.scores[head]) for head in shares.index])
    far = 100 * (shares["needle"] + shares["elsewhere"])
    figure = Figure(figsize=(5.2, 3.4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.scatter(gates, 100 * shares["needle"], s=14, color=PARTS["needle"], marker="o", label="on the needle")
    left.scatter(gates, far, s=14, facecolor="none", edgecolor="#555555", marker="o", label="beyond the window")
    left.set(xlabel="gate α (1 = retrieval)", ylabel="attention (%)", ylim=(-2, 102))
    left.grid(axis="y")
    left.legend(loc="upper left")
    order = gates.argsort(kind="stable")[::-1]
    ends = [*order[: min(5, len(order))], *order[max(5, len(order) - 5) :]]
    begun = np.zeros(len(ends))
    for name, color in PARTS.items():
        part = 100 * shares[name].to_numpy()[ends]
        right.barh(range(len(ends)), part, left=begun, color=color, label=name, height=0.75)
        begun += part
    right.set_yticks(range(len(ends)), [f"{layer}.{head}" for layer, head in shares.index[ends]])
    right.set(
        ylim=(len(ends) - 0.4, -0.6), xlim=(0, 100), xlabel="attention (%)", ylabel="layer.head by gate, highest on top"
    )
    figure.legend(handles=_keys(PARTS.items()), loc="outside lower center", ncols=4)
    return figure


def _keys(marks: Iterable[tuple[str, str]]) -> list[Patch]:
    return [Patch(facecolor=color, label=name) for name, color in marks]
