"""Whether a model may read a text in pieces: some lose or misplace their state where more than a token follows a past.

Layers of the dual cache give the same for any chunks; what lies beside them is the model's own. Some state-space layers
begin anew with every forward of several tokens, and some models count positions from 0 in each.
"""

import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.common.compat import cache_argument, cache_of
from duo_id.common.errors import UserError

PAST, CHUNK, CHUNKS = 20, 4, 3  # tokens of the check: a past, and what follows it; a short chunk is all near its border


@dataclass(frozen=True)
class Continuation:
    """How forwards must go on after a past, so that they give what one forward over the whole text gives.

    Attributes:
        positions: they are told their positions, which the model does not read off its cache.
        stepwise: each is of one token.
    """

    positions: bool = False
    stepwise: bool = False

    def options(self, ids: Tensor, past: int) -> dict[str, Tensor]:
        """What a forward of `ids` (batch, tokens) without padding is given beside them, after `past` tokens."""
        if not self.positions:
            return {}
        return {"position_ids": torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)}


_known: WeakKeyDictionary[PreTrainedModel, Continuation] = WeakKeyDictionary()


@torch.no_grad()
def continuation(model: PreTrainedModel, ids: Tensor) -> Continuation:
    """How a model goes on after a past: tried once, in five short forwards where any chunks do.

    Args:
        model: under a mask, as it is used.
        ids: (batch, tokens), real tokens of a text for it; the first are tried.

    Raises:
        UserError: whatever is tried, a cache gives other logits than no cache, or the model takes none but its own.
    """
    if model not in _known:
        try:
            _known[model] = _find(model, ids)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{_title(model)} takes no dual cache: {error}".partition("\n")[0]) from error
    return _known[model]


def check_chunks(model: PreTrainedModel, ids: Tensor, chunk_size: int, past: int) -> Continuation:
    """Raise a `UserError` if a text that is read in such chunks would give something else than in one.

    Args:
        model: under a mask.
        ids: (batch, tokens), what is to be read, without padding.
        chunk_size: tokens of a forward.
        past: tokens that the cache holds already.

    Returns:
        how its forwards go on.
    """
    tokens = ids.shape[1]
    if tokens <= chunk_size and not past:
        return Continuation()
    found = continuation(model, ids)
    if found.stepwise and min(chunk_size, tokens) > 1:
        least = "1 after a past" if past else f"{tokens}, all of the prompt,"
        raise UserError(
            f"chunk_size={chunk_size}: {_title(model)} has layers that lose their state where several tokens follow a "
            f"past, so that chunks change its logits: chunk_size={least} is right"
        )
    return found


def _find(model: PreTrainedModel, ids: Tensor) -> Continuation:
    total = PAST + CHUNKS * CHUNK
    text = ids[:1].repeat(1, -(-total // ids.shape[1]))[:, :total]
    whole = model(text, use_cache=False).logits
    tolerance = _tolerance(model, whole)
    told = (False, True) if "position_ids" in inspect.signature(model.forward).parameters else (False,)
    errors = []
    for stepwise, positions in product((False, True), told):
        how = Continuation(positions, stepwise)
        errors.append(_error(_in_pieces(model, text, how), whole[:, PAST:]))
        if errors[-1] <= tolerance:
            return how
    raise UserError(
        f"{_title(model)} computes other logits with a cache than without one, by {min(errors):.0%} even token by "
        "token, for layers beside attention lose their state: call it with use_cache=False on whole texts"
    )


def _in_pieces(model: PreTrainedModel, text: Tensor, how: Continuation) -> Tensor:
    """The logits of what follows a past, (1, tokens, vocabulary)."""
    name, found, cache, done = cache_argument(model), [], None, 0
    for part in (text[:, :PAST], *text[:, PAST:].split(1 if how.stepwise else CHUNK, 1)):
        given: dict[str, Any] = {} if cache is None else {name: cache}
        output = model(part, use_cache=True, **given, **how.options(part, done))
        cache, done = cache_of(output), done + part.shape[1]
        found.append(output.logits)
    return torch.cat(found[1:], 1)


def _error(found: Tensor, expected: Tensor) -> float:
    """The distance of logits (1, tokens, vocabulary), relative to how far they spread: the median over tokens.

    A token that a router of experts sends elsewhere for a rounding error is no fault of the cache.
    """
    found, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _tolerance(model: PreTrainedModel, logits: Tensor) -> float:
    """Half of the digits of the coarsest type that computes; at least 1%, for products of float32 may be TF32."""
    types = [dtype for dtype in (model.dtype, logits.dtype) if dtype.is_floating_point]
    if torch.is_autocast_enabled(logits.device.type):
        types.append(torch.get_autocast_dtype(logits.device.type))
    return max(0.01, *(torch.finfo(dtype).eps ** 0.5 for dtype in types))


def _title(model: PreTrainedModel) -> str:
    return model.config.get_text_config().name_or_path or type(model).__name__
