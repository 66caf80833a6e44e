"""A model with one retrieval head, planted by hand, and samples that only this head can answer."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.data.samples import UNSCORED, Sample

HEADS = [(0, 1), (1, 0), (2, 1)]  # (layer, KV head) of the planted head
PAYLOADS, QUERY, FILLERS = range(3, 11), 11, range(12, 96)


def planted_model(make_model: Callable[..., PreTrainedModel], layer: int, kv_head: int) -> PreTrainedModel:
    """One head dominates: at a QUERY token it attends to the payload token, at any distance, and copies it.

    Hidden dimensions 0 and 1 mean "payload" and "query", 2 to 9 identify the payload. The head matches query and key in
    the pair of its dimensions that rotary position embeddings rotate least.
    """
    model = make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.05)
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, 10:] = torch.randn(96, 22, generator=torch.Generator().manual_seed(0)) * 0.3
        embedding[list(PAYLOADS), 0] = embedding[QUERY, 1] = 1.0
        embedding[list(PAYLOADS), range(2, 10)] = 1.0
        attention, slowest, first = model.model.layers[layer].self_attn, 7, 2 * kv_head * 16  # first of two query heads
        attention.q_proj.weight[first + slowest, 1] = 8.0
        attention.k_proj.weight[kv_head * 16 + slowest, 0] = 8.0
        attention.v_proj.weight[range(kv_head * 16, kv_head * 16 + 8), range(2, 10)] = 1.0
        attention.o_proj.weight[range(20, 28), range(first, first + 8)] = 1.0
    return model


def planted_sample(seed: int, answered: bool = False) -> Sample:
    """80 tokens with one payload, and QUERY as the last and only labelled token.

    With `answered`, the payload is repeated after QUERY, and labelled instead.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FILLERS.start, FILLERS.stop, (80,), generator=generator)
    position = int(torch.randint(5, 60, (), generator=generator))
    ids[position] = PAYLOADS[seed % 8]
    ids[-1] = QUERY
    if answered:
        ids = torch.cat([ids, ids[position, None]])
    return sample_of(ids, 1)


def random_sample(tokens: int, seed: int, scored: int = 5) -> Sample:
    """Random tokens, of which the last are labelled."""
    return sample_of(torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(seed)), scored)


def sample_of(ids: Tensor, scored: int) -> Sample:
    """A sample whose last tokens are labelled, as one answer."""
    labels = torch.full_like(ids, UNSCORED)
    labels[-scored:] = ids[-scored:]
    return Sample(input_ids=ids, labels=labels, answers=(labels != UNSCORED).long())


def assert_first(scores: Tensor, layer: int, kv_head: int) -> None:
    """The planted head has the highest score, by a margin."""
    assert scores.shape == (3, 2)
    assert scores.dtype == torch.float32
    assert int(scores.argmax()) == layer * 2 + kv_head, scores
    ranked = scores.flatten().sort().values
    assert ranked[-1] - ranked[-2] > 0.02 * ranked[-1], scores
