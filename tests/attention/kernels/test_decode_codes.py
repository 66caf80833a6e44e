"""The Triton kernel of decode steps over codes against dense attention over what the codes mean.

`TRITON_INTERPRET=1 pytest -m gpu` runs the small tests on a CPU.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from duo_id.attention.codes import (
    GROUP,
    Bits,
    dequantise_keys,
    dequantise_values,
    quantise_keys,
    quantise_values,
)
from tests.attention.past import Past

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, K8V4, INT4 = Bits(8, 8), Bits(8, 4), Bits(4, 4)
formats = pytest.mark.parametrize("bits", [INT8, K8V4, INT4], ids=["int8", "k8v4", "int4"])
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # which the interpreter cannot multiply
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass
class Coded:
    """The stores of a past whose retrieval heads keep codes of whole groups of `size` tokens."""

    past: Past
    bits: Bits
    size: int

    def stores(self, after: bool = False) -> list[Tensor]:
        """Codes and scales of keys and values, their tails, and the rings, before the new token or after."""
        full, values, recent, recent_values = self.past.stores(after)
        groups = full.shape[2] // self.size
        found = []
        for x, bits, quantise in ((full, self.bits.keys, quantise_keys), (values, self.bits.values, quantise_values)):
            codes, scales = quantise(x[:, :, : groups * self.size], bits, self.size)
            codes, scales = codes.contiguous(), scales.contiguous()
            tail = x.new_full((*x.shape[:2], 2 * self.size, x.shape[3]), 7)
            for sample, count in enumerate(self.past.past):
                end = count + after
                codes[sample, :, end // self.size :] = 7
                scales[sample, :, end // self.size :] = 7
                for token in range(max(0, (count // self.size - 1) * self.size), end):
                    tail[sample, :, token % (2 * self.size)] = x[sample, :, token]
            found += [codes, scales, tail]
        return [*found[:2], *found[3:5], found[2], found[5], recent, recent_values]

    def meant(self) -> Past:
        """The past with the numbers that its codes mean."""
        meant = copy.copy(self.past)
        meant.keys, meant.values = self.past.keys.clone(), self.past.values.clone()
        for sample, count in enumerate(self.past.past):
            end = count // self.size * self.size
            if end:
                keys, values = (x[sample, self.past.full, :end] for x in (meant.keys, meant.values))
                keys = dequantise_keys(*quantise_keys(keys, self.bits.keys, self.size))
                values = dequantise_values(*quantise_values(values, self.bits.values, self.size))
                meant.keys[sample, self.past.full, :end] = keys
                meant.values[sample, self.past.full, :end] = values
        return meant


def decode(past: Past, stores: list[Tensor], **tuning: int) -> Tensor:
    from duo_id.attention.kernels.decode_codes import decode_codes

    given = (past.query, past.key, past.value, *stores, past.retrieval, past.listed, past.lengths, past.arrived)
    return decode_codes(*given, past.slots, past.sink, past.scale, **tuning)


def check_decode(past: Past, bits: Bits, size: int = GROUP, **tuning: int) -> None:
    coded = Coded(past, bits, size)
    stores = coded.stores()
    coded.meant().check(decode(past, stores, **tuning))
    for name, found, expected in zip(
        "key_codes key_scales value_codes value_scales tail_key tail_value recent_key recent_value".split(),
        stores,
        coded.stores(after=True),
        strict=True,
    ):
        assert torch.equal(found, expected), f"{name}: the new token is stored, and nothing else has changed"
    assert past.arrived.eq(0).all()


@formats
@dtypes
@pytest.mark.parametrize("lengths", [[126, 127, 128], [129, 255, 0], [300, 1, 383]], ids=str)
def test_around_the_edges_of_groups(lengths: list[int], dtype: torch.dtype, bits: Bits) -> None:
    """Batches of unequal lengths; a group is complete with the new token, or it is the first of another."""
    check_decode(Past(lengths, 1, 3, 8, group=4, dim=32, dtype=dtype, device=DEVICE, capacity=400), bits)


@formats
@dtypes
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (2, 64), (7, 64), (4, 16), (4, 24), (4, 80), (4, 128), (20, 16)])
def test_shapes(group: int, dim: int, dtype: torch.dtype, bits: Bits) -> None:
    for lengths in ([0, 11, 100], [15, 63, 50]):
        past = Past(lengths, 1, 3, 8, group=group, dim=dim, dtype=dtype, device=DEVICE, capacity=111)
        check_decode(past, bits, 16)


@formats
@pytest.mark.parametrize("pattern", ["mixed", "all", "none", "one", "spans", "rings"])
def test_patterns(pattern: str, bits: Bits) -> None:
    for lengths in ([0, 1, 2], [40, 47, 44], [383, 384, 500]):
        check_decode(Past(lengths, 1, 3, 8, pattern=pattern, device=DEVICE, capacity=600), bits, 16, block=16)


@formats
@pytest.mark.parametrize("programs", [1, 16])
def test_any_number_of_programs(programs: int, bits: Bits) -> None:
    for lengths in ([0, 15, 31], [700, 3, 95]):
        check_decode(Past(lengths, 1, 3, 8, "one", device=DEVICE, capacity=800), bits, 16, programs=programs)


@formats
def test_what_is_free_is_not_read(bits: Bits) -> None:
    coded = Coded(Past([5, 100, 0, 128], 1, 3, 8, device=DEVICE, capacity=500), bits, 16)
    stores = [x if x.dtype == torch.uint8 else x.masked_fill(x == 7, torch.nan) for x in coded.stores()]
    coded.meant().check(decode(coded.past, stores))


@formats
def test_with_no_room_left_no_codes_are_written(bits: Bits) -> None:
    """As a captured step does whose cache is full."""
    past = Past([47, 20, 63], 1, 3, 8, device=DEVICE, capacity=64)
    stores = Coded(past, bits, 16).stores()
    short = [x[:, :, :2].contiguous() if i < 4 else x for i, x in enumerate(stores)]
    before = [x.clone() for x in short]
    decode(past, short)
    assert all(torch.equal(x, y) for x, y in zip(short[:4], before[:4], strict=True))


@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e30], ids=str)
@formats
def test_groups_of_extreme_numbers(bits: Bits, spread: float) -> None:
    """Equal numbers, whose scale is 0, and very small and large ones: the codes of the reference."""
    past = Past([127], 1, 3, 8, "all", device=DEVICE, capacity=128)
    for x in (past.keys, past.values):
        x.mul_(spread).add_(0 if spread else 2)
    past.key, past.value = past.keys[:, :, 127:], past.values[:, :, 127:]
    coded = Coded(past, bits, GROUP)
    stores = coded.stores()
    decode(past, stores)
    assert all(torch.equal(x, y) for x, y in zip(stores[:4], coded.stores(after=True)[:4], strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@formats
@dtypes
def test_a_long_past_again_and_again(dtype: torch.dtype, bits: Bits) -> None:
    """Many programs share a head, and the last adds up: the same bits each time."""
    past = Past([20_000, 13, 8191], 1, 64, 256, "rings", group=4, dim=128, dtype=dtype, device=DEVICE)
    coded = Coded(past, bits, GROUP)
    first = decode(past, coded.stores())
    coded.meant().check(first)
    for _ in range(20):
        assert torch.equal(decode(past, coded.stores()), first)
        assert past.arrived.eq(0).all()
    check_decode(past, bits)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of CUDA")
@formats
def test_replay_of_a_captured_decode_step(bits: Bits) -> None:
    """Across the end of a group: each replay has new tokens in the old places."""
    past = Past([125, 300, 0], 1, 3, 8, dtype=torch.bfloat16, device=DEVICE, capacity=400)
    stores, again = Coded(past, bits, GROUP).stores(), Coded(past, bits, GROUP).stores()
    decode(past, [x.clone() for x in stores])
    graph, start = torch.cuda.CUDAGraph(), past.lengths.clone()
    with torch.cuda.graph(graph):
        out = decode(past, stores)
        past.lengths.add_(1)
    for step in range(5):
        for tensor in (past.query, past.key, past.value):
            tensor.normal_()
        past.lengths.copy_(start + step)
        expected = decode(past, again)
        graph.replay()
        assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(stores, again, strict=True))
