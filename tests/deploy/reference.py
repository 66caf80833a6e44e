"""A head mask by brute force: dense float64 scores over the whole sequence, no cache, no attention of the package."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id import HeadMask
from duo_id.attention.codes import Bits
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


@dataclass
class Coded:
    """What retrieval heads see as codes: groups that were complete before the forward that a token came in.

    Attributes:
        bits: of keys and values.
        group: tokens.
        past: (batch, tokens), the number of real tokens of the sample before the forward that a token came in.
    """

    bits: Sequence[Bits | None]
    group: int
    past: Tensor

    def see(self, queries: Tensor, real: Tensor) -> Tensor:
        """Which keys each query sees as codes, (batch, queries, tokens) bool."""
        complete = self.past[:, -queries.shape[2] :] // self.group * self.group
        return (real.cumsum(-1) - 1)[:, None, :] < complete[:, :, None]

    def meant(self, x: Tensor, real: Tensor, bits: int, across: int) -> Tensor:
        """(batch, tokens, dim) as codes mean it, token by token; scales are shared along `across` within a group."""
        out = x.clone()
        for sample, mask in enumerate(real.bool()):
            tokens = mask.nonzero()[:, 0]
            for start in range(0, len(tokens) - self.group + 1, self.group):
                group = tokens[start : start + self.group]
                numbers = x[sample, group]
                low, high = numbers.amin(across, keepdim=True), numbers.amax(across, keepdim=True)
                scale = (high - low) * (1 / (2**bits - 1))
                codes = torch.floor((numbers - low) / scale + 0.5).clamp(0, 2**bits - 1)
                out[sample, group] = torch.where(scale == 0, low, codes * scale + low)
        return out


@dataclass
class Evicted:
    """What retrieval heads no longer see once a context is read.

    Attributes:
        hidden: by layer, (batch, KV heads, columns of the context) bool.
    """

    hidden: dict[int, Tensor]

    def see(self, layer: int, head: int, seen: Tensor) -> Tensor:
        """What is left of `seen` (batch, tokens, tokens); queries inside the context see all of it."""
        hidden = self.hidden[layer][:, head]
        seen = seen.clone()
        seen[:, hidden.shape[1] :, : hidden.shape[1]] &= ~hidden[:, None]
        return seen


@contextmanager
def brute_force(
    model: PreTrainedModel, mask: HeadMask | HeadSpans, coded: Coded | None = None, evicted: Evicted | None = None
) -> Iterator[None]:
    """Let `model` attend by brute force for a block: retrieval heads in full, the others over the sink and what each of
    them sees of the latest tokens, and layers with a sliding window over that. Call it with use_cache=False. If `coded`
    is given, retrieval heads see what codes mean where they would see codes; if `evicted`, not what was evicted."""
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
        group, everything = heads // key.shape[1], (tokens, tokens)
        bits = None if coded is None else coded.bits[module.layer_idx]
        out = torch.zeros(batch, heads, tokens, dim, dtype=torch.float64)
        for head in range(heads):
            kv_head = head // group
            if sliding_window is not None:
                window = (0, sliding_window)
            elif mask.retrieval[module.layer_idx, kv_head]:
                window = everything
            elif isinstance(mask, HeadMask):
                window = (sink, mask.recent_size)
            else:
                window = (sink, int(mask.spans[module.layer_idx, kv_head]))
            seen = visible(real, *window)
            if evicted is not None and window == everything:
                seen = evicted.see(module.layer_idx, kv_head, seen)

            def scores_of(keys: Tensor, head: int = head) -> Tensor:
                scores = query[:, head].double() @ keys.double().mT * (dim**-0.5 if scaling is None else scaling)
                return scores if softcap is None else softcap * torch.tanh(scores / softcap)

            keys, values = key[:, kv_head], value[:, kv_head].double()
            scores, as_codes = scores_of(keys), torch.zeros_like(seen)
            if coded is not None and bits is not None and window == everything:
                as_codes = coded.see(query, real)
                scores = torch.where(as_codes, scores_of(coded.meant(keys, real, bits.keys, 0)), scores)
            shares = scores.masked_fill(~seen, -torch.inf).exp()
            total = shares.sum(-1, keepdim=True) + (0 if s_aux is None else s_aux[head].double().exp())
            out[:, head] = (shares / total * ~as_codes) @ values
            if coded is not None and bits is not None and as_codes.any():
                out[:, head] += (shares / total * as_codes) @ coded.meant(values, real, bits.values, 1)
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
