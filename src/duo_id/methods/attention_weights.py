"""Attention weights of chosen queries, a few at a time: no tokens x tokens matrix is ever built."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.functions import AttendFunction
from duo_id.attention.interface import bound
from duo_id.attention.softmax import Softmax
from duo_id.models.gated_model import GatedModel

ROWS = 64  # queries whose weights are held at once
Reduce = Callable[[Iterator[tuple[Tensor, Tensor]]], Tensor]
ScoreLayer = Callable[[int, Tensor, Tensor, Tensor, Softmax], Tensor]  # of a layer's index, query, key, value, softmax


def score_attention(gated_model: GatedModel, ids: Tensor, queries: Tensor, reduce: Reduce, reduction: str) -> Tensor:
    """Scores from the attention weights of full attention: (..., gated layers, KV heads) float32 CPU.

    Args:
        gated_model: the model.
        ids: (tokens,), one text.
        queries: (n,) positions of the queries.
        reduce: maps blocks of queries and their weights, (queries,) and (heads, queries, tokens) float32, to one or
            several values per query head, (..., heads).
        reduction: over the query heads of a KV head: max | mean.
    """
    queries = queries.to(gated_model.device)
    return score_layers(
        gated_model,
        ids,
        lambda index, query, key, value, softmax: reduce(attention_rows(query, key, queries, softmax)),
        reduction,
    )


def score_layers(gated_model: GatedModel, ids: Tensor, score: ScoreLayer, reduction: str) -> Tensor:
    """Scores from what the heads of each layer get under full attention: (..., gated layers, KV heads) float32 CPU.

    Args:
        gated_model: the model.
        ids: (tokens,), one text.
        score: one or several values per query head, (..., heads); called again for each module that shares keys.
        reduction: over the query heads of a KV head: max | mean.
    """
    collected: dict[int, list[Tensor]] = {layer.index: [] for layer in gated_model.layers}

    def recording(index: int) -> AttendFunction:
        def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            values = score(index, query, key, value, softmax)
            collected[index].append(values.unflatten(-1, (key.shape[1], -1)))  # one entry per layer that shares keys
            return full_attention(query, key, value, softmax, gated_model.backends.full)

        return attend

    with (
        torch.no_grad(),
        bound(gated_model.layers, {layer.index: recording(layer.index) for layer in gated_model.layers}),
    ):
        gated_model.model.hidden_states({"input_ids": ids.to(gated_model.device)[None]})
    heads = [torch.cat(collected[layer.index], -1) for layer in gated_model.layers]
    return (
        torch.stack([values.amax(-1) if reduction == "max" else values.mean(-1) for values in heads], -2).float().cpu()
    )


def attention_rows(query: Tensor, key: Tensor, queries: Tensor, softmax: Softmax) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention weights of some queries, `ROWS` at a time.

    Args:
        query: (1, heads, tokens, head_dim).
        key: (1, KV heads, tokens, head_dim).
        queries: (n,) positions.
        softmax: of the layer.

    Yields:
        positions (rows,) and weights (heads, rows, tokens) float32.
    """
    positions = torch.arange(key.shape[2], device=key.device)
    for rows in queries.split(ROWS):
        visible = positions <= rows[:, None]
        yield rows, softmax.weights(query[:, :, rows].float(), key.float(), visible)[0]
