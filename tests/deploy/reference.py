"""A head mask by brute force: dense float64 scores over the whole sequence, no cache, no attention of the package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id import HeadMask
from duo_id.patterns.spans import HeadSpans

NAME = "brute_force"


def padding(attention_mask: Tensor | None = None, **unused: Any) -> Tensor | None:
    """The mask function: (batch, tokens), whatever the layer's pattern, which the attention function builds itself."""
    return attention_mask


def visible(real: Tensor, sink: int, recent: int) -> Tensor:
    """Which keys each query sees, (batch, tokens, tokens) bool, for `real` (batch, tokens) 0 or 1.

    Positions count a sample's real tokens; a query that is padding sees itself, so that softmax has something.
    """
    position = real.cumsum(-1) - 1
    query, key = position[:, :, None], position[:, None, :]
    pattern = (key <= query) & ((key < sink) | (query - key < recent))
    return pattern & (real[:, None, :] == 1) & (real[:, :, None] == 1) | torch.eye(real.shape[1], dtype=torch.bool)


@contextmanager
def brute_force(model: PreTrainedModel, mask: HeadMask | HeadSpans) -> Iterator[None]:
    """Let `model` attend by brute force for a block: retrieval heads in full, the others over the sink and what each of
    them sees of the latest tokens, and layers with a sliding window over that. Call it with use_cache=False."""
    sink = mask.sink_size

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        assert query.shape[2] == key.shape[2], "the reference has no cache"
        batch, heads, tokens, dim = query.shape
        real = torch.ones(batch, tokens, dtype=torch.long) if attention_mask is None else attention_mask.long()
        group = heads // key.shape[1]
        out = torch.zeros(batch, heads, tokens, dim, dtype=torch.float64)
        for head in range(heads):
            kv_head = head // group
            if sliding_window is not None:
                seen = visible(real, 0, sliding_window)
            elif mask.retrieval[module.layer_idx, kv_head]:
                seen = visible(real, tokens, tokens)
            elif isinstance(mask, HeadMask):
                seen = visible(real, sink, mask.recent_size)
            else:
                seen = visible(real, sink, int(mask.spans[module.layer_idx, kv_head]))
            scores = query[:, head].double() @ key[:, kv_head].double().mT * (dim**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            shares = scores.masked_fill(~seen, -torch.inf).exp()
            total = shares.sum(-1, keepdim=True) + (0 if s_aux is None else s_aux[head].double().exp())
            out[:, head] = shares / total @ value[:, kv_head].double()
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    name = (
        before if before == "duo_id" else NAME
    )  # under a mask no other name may be set, so the function takes its place
    kinds = (AttentionInterface, AttentionMaskInterface)
    kept = [kind()._global_mapping.get(name) for kind in kinds]
    for kind, function in zip(kinds, (attend, padding), strict=True):
        kind.register(name, function)
    if before != name:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)
        for kind, function in zip(kinds, kept, strict=True):
            if function is not None:
                kind.register(name, function)
