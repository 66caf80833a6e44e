"""The store of retrieval heads that keeps codes: most of the past in 8 or 4 bits, its end exactly."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from duo_id.attention import codes
from duo_id.attention.codes import Bits, dequantise_keys, dequantise_values, quantise_keys, quantise_values
from duo_id.attention.full import attention_in_parts
from duo_id.attention.padding import reorder
from duo_id.attention.softmax import Softmax
from duo_id.deploy.stores import Heads, Store, with_slack

SLICE = 8192  # tokens that are numbers again, or become codes, at the same time


class QuantisedStore(Store):
    """Every token of the retrieval heads, whole groups of them as codes; see `duo_id.attention.codes`.

    A forward sees the groups that were complete before it by their codes, and all later tokens exactly: those of the
    unfinished group, and its own. So a decode step sees the group that it is in exactly, and prefill a chunk of tokens.
    `key` and `value`, (batch, heads, 2 * group, head_dim), hold the unfinished group and the one before it, token t in
    slot t % (2 * group), so that as many tokens can be removed again as a group has.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: KV heads, ascending.
        capacity: tokens to make room for, in a store of fixed size; None for one that grows.
        backend: see `full_attention`.
        bits: of keys and of values.

    Attributes:
        listed: (heads,) int32 on the device, the KV heads.
        key_codes: (batch, heads, groups, planes, group, head_dim / 2) uint8.
        key_scales: (batch, heads, groups, head_dim, 2), scale and zero.
        value_codes: (batch, heads, groups, planes, head_dim / 2, group) uint8.
        value_scales: (batch, heads, groups, group, 2), scale and zero.
    """

    coded = "key_codes", "key_scales", "value_codes", "value_scales"
    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor

    def __init__(self, like: Tensor, heads: Iterable[int], capacity: int | None, backend: str, bits: Bits) -> None:
        self.heads, self.backend, self.bits, self.group = Heads(heads), backend, bits, codes.GROUP
        shape = (like.shape[0], len(self.heads), 2 * self.group, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.listed = torch.tensor(self.heads.indices, dtype=torch.int32, device=like.device)
        groups = (capacity or 0) // self.group
        for name, new in zip(self.coded, self._encode(self.key[:, :, : self.group]), strict=True):
            setattr(self, name, new.new_zeros(*new.shape[:2], groups, *new.shape[3:]))

    def _encode(self, key: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of whole groups of tokens."""
        value = key if value is None else value
        return *quantise_keys(key, self.bits.keys, self.group), *quantise_values(value, self.bits.values, self.group)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Store.tensors`."""
        return super().tensors | {name: getattr(self, name) for name in self.coded}

    @property
    def overwritten(self) -> dict[str, Tensor]:
        """See `Store.overwritten`."""
        return super().tensors

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Grow to the whole groups of `tokens` tokens plus some slack, if there is no room."""
        groups = self.key_codes.shape[2]
        if tokens // self.group <= groups:
            return
        for name in self.coded:
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], with_slack(tokens) // self.group, *old.shape[3:])
            new[:, :, :groups] = old
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`; the past becomes numbers again slice by slice, and never all of it at once."""
        own = self.heads.select(key), self.heads.select(value)

        def attend(queries: Tensor, softmax: Softmax) -> Tensor:
            parts = self._parts(own, past, sample)
            return attention_in_parts(queries, parts, softmax, self.backend)

        self.heads.attend(query, out, key.shape[1], softmax, attend)
        self.put(key, value, past, sample)

    def _parts(self, own: tuple[Tensor, Tensor], past: int, sample: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of new tokens, of the unfinished group before them, and of slices of the groups."""
        yield own
        complete = past // self.group
        if past % self.group:
            yield self._tail(complete * self.group, past, sample)
        step = max(1, SLICE // self.group)
        for start in range(0, complete, step):
            part = sample, slice(None), slice(start, min(start + step, complete))
            keys = dequantise_keys(self.key_codes[part], self.key_scales[part])
            yield keys, dequantise_values(self.value_codes[part], self.value_scales[part])

    def _tail(self, start: int, end: int, sample: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens from `start` to `end`, all of one group that is exact."""
        slots = slice(start % (2 * self.group), start % (2 * self.group) + end - start)
        return self.key[sample, :, slots], self.value[sample, :, slots]

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        key, value, end = self.heads.select(key), self.heads.select(value), past + key.shape[2]
        first, last = past // self.group, end // self.group
        step = max(1, SLICE // self.group)
        for group in range(first, last, step):
            stop = min(group + step, last)
            start = max(past, group * self.group)
            keys, values = (x[:, :, start - past : stop * self.group - past] for x in (key, value))
            if group == first and past % self.group:
                tail = self._tail(first * self.group, past, sample)
                keys, values = (torch.cat(pair, 2) for pair in zip(tail, (keys, values), strict=True))
            for name, new in zip(self.coded, self._encode(keys, values), strict=True):
                getattr(self, name)[sample, :, group:stop] = new
        kept = torch.arange(max(past, (last - 1) * self.group), end, device=key.device)
        for stored, new in ((self.key, key), (self.value, value)):
            stored[sample][:, :, kept % (2 * self.group)] = new[:, :, kept - past]

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`; groups beyond a sample's tokens are masked, and overwritten later."""
        key, value = self.heads.select(key), self.heads.select(value)
        groups, last = min(key.shape[2] // self.group, self.key_codes.shape[2]), lengths[:, None] - 1
        step = max(1, SLICE // self.group)
        for start in range(0, groups, step):
            stop = min(start + step, groups)
            part = slice(start * self.group, stop * self.group)
            for name, new in zip(self.coded, self._encode(key[:, :, part], value[:, :, part]), strict=True):
                getattr(self, name)[:, :, start:stop] = new
        slot = torch.arange(2 * self.group, device=key.device)
        token = (last - (last - slot) % (2 * self.group)).clamp(0, key.shape[2] - 1)  # unused slots are masked
        for stored, new in ((self.key, key), (self.value, value)):
            stored.copy_(reorder(new, token))

    @torch.inference_mode(False)
    def fill(self, generator: torch.Generator) -> None:
        """See `Store.fill`; the numbers are spread evenly, from -3 to 3."""
        super().fill(generator)
        for name, bits in (("key", self.bits.keys), ("value", self.bits.values)):
            getattr(self, f"{name}_codes").random_(0, 256, generator=generator)
            scales = getattr(self, f"{name}_scales")
            scales[..., 0], scales[..., 1] = 6 / (2**bits - 1), -3

    def retained_bytes(self, tokens: int) -> int:
        """See `Store.retained_bytes`."""
        dim, itemsize = self.key.shape[3], self.key.element_size()
        coded = codes.kept_bytes(tokens // self.group * self.group, dim, itemsize, self.bits, self.group)
        return len(self.heads) * (coded + codes.kept_bytes(min(tokens, 2 * self.group), dim, itemsize, None))

    def exact_from(self, tokens: int) -> int:
        """See `Store.exact_from`."""
        return max(0, (tokens // self.group - 1) * self.group)
