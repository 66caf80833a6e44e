"""The models, masks and prompts that the tests of deployment share, and how results are compared."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id import HeadMask
from duo_id.attention import codes
from duo_id.deploy import chunks
from duo_id.patterns.spans import ALL, HeadSpans
from tests.deploy.reference import Coded, brute_force
from tests.support.tiny import FAMILIES, tiny_model

SINK, RECENT = 3, 8
SPANS = (ALL, 1, 2, 5, RECENT, 21, 40, 500)  # around prompts and chunks; the last is longer than every text
PROMPT, TOKENS = 48, 58  # each prompt, and with what is decoded after it: five windows
LENGTHS = (PROMPT, 33, 5)  # real tokens of the prompts of a padded batch; the last fits into the window
GROUP = 16  # tokens, in place of 128, so that prompts have several groups of codes
HYBRID = ["sliding_attention", "full_attention"] * 2
EVERY_FAMILY: dict[str, dict[str, Any]] = FAMILIES | {
    "mixtral": {"sliding_window": None},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3},
    "gpt2": {},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 10, "sliding_window": 9},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 9, "layer_types": HYBRID},
    "gpt_oss": {
        "head_dim": 16, "sliding_window": 9, "layer_types": HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
WITH_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "head_dim": 16,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
HYBRIDS = ("gemma2", "gemma3_text", "gpt_oss")
ONE_HEAD_EACH = ("gpt_neox", "gpt2")  # keys of their own for every query head


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of four layers: enough for every kind of row in a mask."""
    return tiny_model(family, **{"num_hidden_layers": 4, **EVERY_FAMILY[family], **changes})


def mask_for(
    model: PreTrainedModel, sink: int = SINK, recent: int = RECENT, kind: str = "mixed"
) -> HeadMask | HeadSpans:
    """Rows that alternate, stream, keep all and alternate the other way; or all rows full ("all") or not ("none").

    Or a random span for each head ("spans"), or one longer than every text ("long").
    """
    config = model.config
    heads = config.num_attention_heads if config.model_type in ONE_HEAD_EACH else config.num_key_value_heads
    even = torch.arange(heads) % 2 == 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    gated = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    rows = {index: (even, even & ~even, even | ~even, ~even)[order % 4] for order, index in enumerate(gated)}
    if len(gated) == 2:  # a hybrid: both ways to alternate
        rows = dict(zip(gated, (even, ~even), strict=True))
    retrieval = torch.stack([rows.get(index, even | ~even) for index in range(len(kinds))])
    if kind in ("spans", "long"):
        drawn = torch.randint(len(SPANS), retrieval.shape, generator=torch.Generator().manual_seed(heads))
        return HeadSpans(torch.tensor(SPANS)[drawn if kind == "spans" else drawn * 0 - 1], sink, gated)
    if kind != "mixed":
        retrieval = torch.full_like(retrieval, kind == "all")
    return HeadMask(retrieval, sink, recent, gated)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def padded_ids() -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of unequal lengths, padded on the left, and as many tokens after each: ids, mask and positions."""
    ids = random_ids(len(LENGTHS), TOKENS)
    mask = torch.ones_like(ids)
    for sample, length in enumerate(LENGTHS):
        mask[sample, : PROMPT - length] = 0
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Case:
    """A model, a mask, and the reference's logits (samples, TOKENS, vocabulary) for equal and for padded prompts."""

    model: PreTrainedModel
    mask: HeadMask | HeadSpans
    ids: Tensor
    logits: Tensor
    padded_logits: Tensor


@functools.cache
def case(family: str, kind: str = "mixed", sink: int = SINK, recent: int = RECENT) -> Case:
    model = build(family)
    mask, ids = mask_for(model, sink, recent, kind), random_ids(2, TOKENS)
    padded, real, positions = padded_ids()
    with reference(model, mask):
        logits = model(ids, use_cache=False).logits
        padded_logits = model(padded, attention_mask=real, position_ids=positions, use_cache=False).logits
    return Case(model, mask, ids, logits, padded_logits)


def reference(model: PreTrainedModel, mask: HeadMask | HeadSpans, coded: Coded | None = None) -> Any:
    return brute_force(model, mask, coded)


def short_groups(patch: pytest.MonkeyPatch) -> None:
    """Let caches make codes of `GROUP` tokens; the check of chunks must stay below that."""
    patch.setattr(codes, "GROUP", GROUP)
    patch.setattr(chunks, "PAST", 7)
    patch.setattr(chunks, "CHUNK", 2)


def check_equal(found: Tensor, expected: Tensor) -> None:
    """The greatest error is 1e-5, of the greatest logit where that is above 1: float32 has seven digits."""
    assert found.shape == expected.shape
    error = (found.float() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= 1e-5, f"error {error:.1e}"


def run(model: PreTrainedModel, ids: Tensor, cache: Any, chunk: int, mask: Tensor | None = None) -> Tensor:
    """The logits of all tokens: the prompt in chunks, then token by token."""
    edges = [*range(0, PROMPT, chunk), *range(PROMPT, ids.shape[1] + 1)]
    parts = []
    for start, end in itertools.pairwise(edges):
        options = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            options = {"attention_mask": mask[:, :end], "position_ids": positions}
        parts.append(model(ids[:, start:end], past_key_values=cache, **options).logits)
    return torch.cat(parts, 1)
