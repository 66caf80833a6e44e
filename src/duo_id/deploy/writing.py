"""Let a model write after prompts, greedily or by chance: each step, where a GPU allows it, as one CUDA graph."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.common.errors import check
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import continuation
from duo_id.deploy.graphs import DecodeSteps
from duo_id.deploy.install import dual_cache
from duo_id.deploy.prefill import read_in_chunks

CHECK_EVERY = 32  # steps between checks whether all samples have ended, each of which waits for the device


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: Tensor,
    limit: int,
    temperatures: Tensor,
    ends: Collection[int],
    *,
    words: int | None = None,
    seed: int = 0,
    chunk_size: int = 32768,
    graph: bool = True,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """What a model under `duo_attention` writes after prompts, without any other change of its probabilities.

    A token is drawn by adding Gumbel noise, times the temperature, to the logits (Gumbel 1954; Maddison et al. 2014,
    arXiv 1411.0030), so that a temperature of 0 is greedy. Draws repeat on the same kind of device alone.

    Args:
        model: under a mask.
        prompts: (batch, tokens), without padding.
        limit: tokens that are written at most.
        temperatures: (batch,) float32, at least 0.
        ends: tokens that end a text, at least one; the end is part of it.
        words: tokens that may be written, the first ones; None: all that the model has logits of.
        seed: of the draws.
        chunk_size: tokens of a prompt per forward, where the model can continue after a chunk.
        graph: whether decode steps are captured, on a GPU as a CUDA graph.
        on_tokens: called with how many tokens each sample has got: those of its prompt, then one at a time.

    Returns:
        the tokens of each sample.

    Raises:
        UserError: nothing ends a text, or the model cannot continue after a past.
    """
    check(bool(ends), "the model has no end-of-text token, so nothing that it writes ends")
    batch, past = prompts.shape
    how, cache = continuation(model, prompts), _new_cache(model, past + limit)
    logits = read_in_chunks(model, prompts, cache, past if how.stepwise else chunk_size, how=how)
    step = DecodeSteps(model, cache, how, graph)
    on_tokens(past)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    scale = temperatures.to(prompts.device, torch.float32)[:, None]
    ending = torch.tensor(sorted(ends), device=prompts.device)
    ended, written = torch.zeros(batch, dtype=torch.bool, device=prompts.device), list[Tensor]()
    for number in range(limit):
        scores = logits[:, :words].float()
        noise = torch.empty_like(scores).exponential_(generator=generator).log()
        written.append((scores - scale * noise).argmax(-1))
        ended |= torch.isin(written[-1], ending)
        on_tokens(1)
        if number == limit - 1 or (number % CHECK_EVERY == CHECK_EVERY - 1 and bool(ended.all())):
            break
        logits = step(written[-1][:, None], past + number)
    return [_until_end(row, ends) for row in torch.stack(written, 1).tolist()]


def _new_cache(model: PreTrainedModel, tokens: int) -> DualCache:
    """A static cache, or a growing one for a model with layers that keep something other than keys and values."""
    cache = dual_cache(model)
    return dual_cache(model, tokens) if len(cache.dual_layers) == len(cache.layers) else cache


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first that ends a text."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]
