"""What codes cost in single layers, against brute force, and the formats that are chosen by it."""

import itertools

import pytest
import torch
from torch import Tensor

from duo_id import HeadMask, duo_attention, kv_costs
from duo_id.attention.codes import bits_by_layer
from duo_id.common.errors import UserError
from duo_id.deploy.kv_costs import CODED, KvCosts
from duo_id.patterns.random_masks import random_mask
from tests.deploy.cases import GROUP, build, mask_for, random_ids, reference, short_groups
from tests.deploy.reference import Coded

BITS = {"int4": 4, "k8v4": 6, "int8": 8}


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    short_groups(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_costs_are_those_of_brute_force(family: str) -> None:
    """Every token sees what a step of its own would see; layers with a window keep no codes."""
    model = build(family).double()
    mask = mask_for(model)
    texts = [random_ids(2, 3 * GROUP + 5), random_ids(1, 2 * GROUP, seed=2)]
    found = kv_costs(model, mask, texts)

    def chances(ids: Tensor, kv: list[str]) -> Tensor:
        coded = Coded(bits_by_layer(kv, 4), GROUP, torch.arange(ids.shape[1]).expand(ids.shape))
        with reference(model, mask, coded):
            return model(ids, use_cache=False).logits[:, GROUP:].log_softmax(-1).flatten(0, 1)

    exact = torch.cat([chances(ids, ["exact"] * 4) for ids in texts])
    for layer, (level, name) in itertools.product(range(4), enumerate(CODED)):
        kv = ["exact"] * 4
        kv[layer] = name
        coded = torch.cat([chances(ids, kv) for ids in texts])
        wanted = (exact.exp() * (exact - coded)).sum(-1).mean()
        torch.testing.assert_close(found.costs[layer, level], wanted, rtol=1e-4, atol=1e-12)
    kinds = getattr(model.config, "layer_types", ["full_attention"] * 4)
    width = model.config.head_dim
    retrieval = [
        int(row.sum()) * width * (kind == "full_attention") for row, kind in zip(mask.retrieval, kinds, strict=True)
    ]
    assert list(found.widths) == retrieval
    assert [bool(row.any()) for row in found.costs] == [bool(width) for width in retrieval]
    assert not hasattr(model, "duo_id_deployment")


def test_formats_of_least_cost() -> None:
    """By hand: a step is worth what it saves a bit, and the layer with two heads pays for both."""
    costs = torch.tensor([[9, 3, 0], [8, 7, 6], [0, 0, 0], [9, 3, 0]], dtype=torch.float64)
    found = KvCosts(costs, [16, 16, 0, 32])
    assert found.allocate(4) == ["int4", "int4", "exact", "int4"]
    assert found.allocate(4.5) == ["k8v4", "int4", "exact", "int4"]
    assert found.allocate(5) == ["int8", "int4", "exact", "int4"]
    assert found.allocate(5.5) == ["k8v4", "int4", "exact", "k8v4"]
    assert found.allocate(6) == ["int8", "int4", "exact", "k8v4"]
    assert found.allocate(8) == ["int8", "int8", "exact", "int8"]


def test_a_larger_budget_costs_less_and_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(12, 3, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    found, before = KvCosts(costs, [8, 24, 16] * 4), float("inf")
    for bits in [4, 4.3, 5, 5.7, 6, 6.6, 7, 7.9, 8]:
        formats = found.allocate(bits)
        spent = sum(width * BITS[name] for width, name in zip(found.widths, formats, strict=True))
        assert bits - 1 < spent / sum(found.widths) <= bits
        cost = sum(costs[layer, CODED.index(name)] for layer, name in enumerate(formats))
        assert cost < before
        before = cost


def test_a_cost_that_rises_with_bits_is_noise() -> None:
    assert KvCosts(torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.5, 2.0]]), [8, 8]).allocate(5) == ["int4", "k8v4"]


def test_the_formats_are_deployed() -> None:
    model = build("llama")
    mask = random_mask(4, model.config.num_key_value_heads, 0.5, seed=0, sink_size=2, recent_size=4)
    kv = kv_costs(model, mask, [random_ids(1, 2 * GROUP)]).allocate(6)
    with duo_attention(model, mask, kv=kv):
        assert model(random_ids(1, 40)).past_key_values.kv == kv


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.zeros(1, GROUP, dtype=torch.long)], "samples: 16 tokens see no codes, which are made of 16"),
        ([torch.zeros(20, dtype=torch.long)], r"samples must be \(batch, tokens\), not \(20,\)"),
        ([torch.zeros(1, 20)], "samples are torch.float32, not whole numbers"),
        ([[1, 2]], r"samples: a list is no tensor \(batch, tokens\)"),
        ([], "samples: give at least one text"),
    ],
    ids=["short", "one-dimension", "floating", "list", "none"],
)
def test_samples_that_tell_nothing_are_refused(samples: list[Tensor], message: str) -> None:
    model = build("llama")
    with pytest.raises(UserError, match=message):
        kv_costs(model, mask_for(model), samples)


@pytest.mark.parametrize("bits", [3.9, 8.1, float("nan"), "6", True, None], ids=str)
def test_budgets_that_codes_cannot_have_are_refused(bits: object) -> None:
    found = KvCosts(torch.ones(1, 3), [8])
    with pytest.raises(UserError, match=r"bits=.* must be a number from 4 to 8"):
        found.allocate(bits)  # type: ignore[arg-type]


def test_a_mask_of_streaming_heads_alone_needs_no_codes() -> None:
    model = build("llama")
    heads = torch.zeros(4, model.config.num_key_value_heads, dtype=torch.bool)
    found = kv_costs(model, HeadMask(heads, 2, 4, (0, 1, 2, 3)), [random_ids(1, 2 * GROUP)])
    assert found.allocate(5) == ["exact"] * 4
