"""Read a long prompt in chunks, so that activations take the memory of a single chunk."""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import Cache, PreTrainedModel

from duo_id.attention import codes
from duo_id.attention.padding import first_position
from duo_id.common.compat import cache_argument, keeps_logits
from duo_id.common.errors import UserError, check
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation, check_chunks, continuation
from duo_id.deploy.eviction import PADDED, Eviction, evicting
from duo_id.deploy.install import deployment_of


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: DualCache,
    chunk_size: int = 32768,
    attention_mask: Tensor | None = None,
    progress: bool = False,
    evict: Eviction | None = None,
) -> Tensor:
    """Run a prompt through a model under `duo_attention` and into a cache; any chunk size gives the same result.

    Where the cache keeps codes, chunks differ a little, because each sees its own tokens exactly.

    Args:
        model: under a mask.
        input_ids: (batch, tokens).
        cache: `dual_cache(model)`, empty or with a past.
        chunk_size: tokens per forward.
        attention_mask: (batch, tokens so far), 0 for padding.
        progress: show a progress bar.
        evict: which tokens retrieval heads keep afterwards; None: all of them.

    Returns:
        the logits after each sample's last real token, (batch, vocabulary), wherever its padding is; few others are
        computed. NaN for a sample without any real token.

    Raises:
        UserError: the model is not under a mask, the cache is not its own, sizes do not match, or chunks would change
            what the model computes; or tokens cannot be evicted.
    """
    deployment_of(model).check(cache)
    check_ids("input_ids", input_ids)
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask)
    check(isinstance(chunk_size, Integral), f"chunk_size={chunk_size!r:.80} must be a whole number of tokens")
    how = Continuation()
    if input_ids.shape[1] and chunk_size > 0:
        how = check_chunks(model, input_ids, chunk_size, int(cache.get_seq_length()))
    if evict is not None:
        given = f"evict={evict!r:.80}"
        check(isinstance(evict, Eviction), f"{given} must be an Eviction, such as duo_id.Eviction(keep=0.5)")
        check(attention_mask is None or bool(attention_mask.all()), PADDED)
    with evicting(model, cache, evict, input_ids):
        return read_in_chunks(model, input_ids, cache, chunk_size, attention_mask, progress, how)


def check_ids(name: str, values: Any) -> None:
    """Raise a `UserError` unless an argument is a tensor of token ids (batch, tokens)."""
    _check_tensor(name, values)
    is_whole = not values.is_floating_point() and not values.is_complex()
    check(is_whole, f"{name} are {values.dtype}, not whole numbers")


def _check_tensor(name: str, values: Any) -> None:
    """Raise a `UserError` unless an argument is a tensor (batch, tokens)."""
    check(isinstance(values, Tensor), f"{name}: a {type(values).__name__} is no tensor (batch, tokens)")
    check(values.dim() == 2, f"{name} must be (batch, tokens), not {tuple(values.shape)}")


@torch.no_grad()
def read_in_chunks(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    chunk_size: int,
    attention_mask: Tensor | None = None,
    progress: bool = False,
    how: Continuation = Continuation(),  # noqa: B008  # frozen
) -> Tensor:
    """`prefill` for any model and any of its caches; `how` says what forwards after a past need."""
    if chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size} must be at least 1 token")
    if attention_mask is not None and attention_mask.shape[1] < input_ids.shape[1]:
        raise UserError(f"attention_mask has {attention_mask.shape[1]} columns for {input_ids.shape[1]} tokens")
    tokens = input_ids.shape[1]
    past = 0 if attention_mask is None else attention_mask.shape[1] - tokens
    position = int(cache.get_seq_length()) if how.positions else 0
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, past:].to(input_ids.device)
    last = (real * torch.arange(1, tokens + 1, device=real.device)).argmax(-1) if tokens else real.sum(-1)
    if not bool(real.any()):
        raise UserError("prefill needs a prompt of at least one token")
    has_logits_to_keep = keeps_logits(model)
    name, options, logits = cache_argument(model), dict[str, Any](), None
    for start in track(range(0, tokens, chunk_size), "prefill", disable=not progress, transient=True):
        end = min(tokens, start + chunk_size)
        if attention_mask is not None:
            mask = attention_mask[:, : past + end]
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past + start :] + first_position(model)
            options |= {"attention_mask": mask, "position_ids": positions}
        else:
            options |= how.options(input_ids[:, start:end], position + start)
        ends_here = (last >= start) & (last < end) & real.any(-1).bool()  # samples whose last token is in this chunk
        columns = (last[ends_here] - start).unique()
        if not len(columns):
            columns = columns.new_zeros(1)
        if has_logits_to_keep:
            options["logits_to_keep"] = 1 if columns.tolist() == [end - start - 1] else columns
        chunk_logits = model(input_ids[:, start:end], **{name: cache}, use_cache=True, **options).logits
        if not has_logits_to_keep:
            chunk_logits = chunk_logits[:, columns.to(chunk_logits.device)]
        logits = torch.full_like(chunk_logits[:, 0], torch.nan) if logits is None else logits
        column_indices = torch.searchsorted(columns, last[ends_here] - start).to(chunk_logits.device)
        rows = ends_here.nonzero()[:, 0].to(chunk_logits.device)
        logits[rows] = chunk_logits[rows, column_indices]
    assert logits is not None
    return logits


@torch.no_grad()
def logits_in_groups(model: PreTrainedModel, input_ids: Tensor, cache: DualCache) -> Iterator[Tensor]:
    """The logits of a text, group by group as the cache makes codes, (batch, tokens of the group, vocabulary).

    Each token sees what a decode step in its place would see: its own group exactly, and earlier ones by their codes.

    Args:
        model: under a mask.
        input_ids: (batch, tokens), without padding.
        cache: empty.
    """
    name, how = cache_argument(model), continuation(model, input_ids)
    for start in range(0, input_ids.shape[1], codes.GROUP):
        group, logits = input_ids[:, start : start + codes.GROUP], []
        for part in group.split(1 if how.stepwise else codes.GROUP, 1):
            known = {name: cache} | how.options(part, int(cache.get_seq_length()))
            logits.append(model(part, use_cache=True, **known).logits)
        yield torch.cat(logits, 1)
