"""The store of retrieval heads that keep unequally many tokens of a context, each as many as it needs."""

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.softmax import Softmax
from duo_id.deploy.stores import SLACK, FullStore, Heads, Store, with_slack


class RaggedStore(Store):
    """What an eviction left: keys and values (batch, rows, head_dim), the slots of one head after the other.

    The tokens of a head that stayed come first, in their order, and later ones follow: token t in slot t - dropped.
    Each head of each sample has dropped its own number of tokens, and all have room for equally many later ones.

    Args:
        full: the store of the retrieval heads before the eviction.
        kept: (batch, heads, stored tokens) bool, what stays.
        tokens: of each sample so far.
        grows: otherwise as much room is left as before.

    Attributes:
        listed: (heads,) int32 on the device, the KV heads.
        places: (batch, 3, heads) int32 on the device: first row, slots and dropped tokens of each head.
        since: the tokens of each sample at the eviction.
        room: later tokens for which each head has slots.
    """

    places: Tensor

    @torch.inference_mode(False)
    def __init__(self, full: FullStore, kept: Tensor, tokens: int, grows: bool) -> None:
        self.heads, self.backend, self.listed = full.heads, full.backend, full.listed
        self.since, counts = tokens, kept.sum(-1)
        self.room = SLACK if grows else full.key.shape[2] - kept.shape[2]
        self.dropped = tokens - int(counts.min())
        slots = counts + self.room
        self.places = torch.stack([slots.cumsum(-1) - slots, slots, tokens - counts], 1).int()
        rows = int(slots.sum(-1).max())
        sample, head, slot = kept.nonzero(as_tuple=True)
        row = self.places[sample, 0, head] + (kept.cumsum(-1) - 1)[sample, head, slot]
        for name in ("key", "value"):
            old = getattr(full, name)
            new = old.new_zeros(len(old), rows, old.shape[3])
            new[sample, row] = old[sample, head, slot]
            setattr(self, name, new)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Store.tensors`."""
        return super().tensors | {"places": self.places}

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Give each head more slots, if there is no room; as few steps copy as with `FullStore.reserve`."""
        later = tokens - self.since
        if later <= self.room:
            return
        average = self.key.shape[1] // len(self.heads) - self.room
        more = with_slack(later + average) - average - self.room
        first, slots, dropped = self.places.unbind(1)
        shift = more * torch.arange(len(self.heads), device=first.device, dtype=torch.int32)
        rows = torch.arange(self.key.shape[1] + more * len(self.heads), device=first.device)
        head = torch.searchsorted(first + shift, rows.int().expand(len(first), -1).contiguous(), right=True) - 1
        source = (rows - shift[head]).clamp(max=self.key.shape[1] - 1)  # new slots repeat numbers: none may be a NaN
        for name in ("key", "value"):
            old = getattr(self, name)
            setattr(self, name, old.gather(1, source[..., None].expand(*source.shape, old.shape[2])))
        self.places, self.room = torch.stack([first + shift, slots + more, dropped], 1), self.room + more

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`; head by head and sample by sample, and the host waits for the device."""
        self.put(key, value, past, sample)
        keys, values = self.key[sample][:, None], self.value[sample][:, None]
        end = past + key.shape[2]
        for number, (first, _, dropped) in enumerate(self.places[sample].tolist()):
            one = slice(number, number + 1)
            for head, start, gone in zip(self.heads, first, dropped, strict=True):
                own = one, slice(None), slice(start, start + end - gone)

                def attend(q: Tensor, s: Softmax, k: Tensor = keys[own], v: Tensor = values[own]) -> Tensor:
                    return full_attention(q, k, v, s, self.backend)

                Heads([head]).attend(query[one], out[one], key.shape[1], softmax, attend)

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        first, _, dropped = self.places[sample].long().unbind(1)
        rows = (first - dropped + past)[..., None] + torch.arange(key.shape[2], device=key.device)
        samples = torch.arange(len(rows), device=key.device)[:, None, None]
        for stored, new in ((self.key, key), (self.value, value)):
            stored[sample][samples, rows] = self.heads.select(new)

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Never called: what was evicted came first."""
        raise AssertionError("a store of which tokens were evicted is not empty")

    def retained_bytes(self, tokens: int) -> int:
        """See `Store.retained_bytes`; layer by layer samples differ, but not in all layers together."""
        kept = len(self.heads) * tokens - int(self.places[0, 2].sum())
        return 2 * kept * self.key.shape[2] * self.key.element_size()
