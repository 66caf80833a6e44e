"""Whether a model can read a text in chunks: some lose their state or misplace tokens when several follow a past.

Layers of the dual cache give the same result for any chunks, but other layers are the model's own. Some state-space
layers restart with every forward of several tokens, and some models count positions from 0 in each forward.
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

# Tokens of the check: in short chunks every token is close to a boundary, and all are fewer than are kept as codes.
PAST, CHUNK, CHUNKS = 20, 4, 3


@dataclass(frozen=True)
class Continuation:
    """What forwards after a past need to give the same logits as one forward over the whole text.

    Attributes:
        positions: explicit positions, because the model does not derive them from its cache.
        stepwise: one token per forward.
    """

    positions: bool = False
    stepwise: bool = False

    def options(self, ids: Tensor, past: int) -> dict[str, Tensor]:
        """Extra arguments of a forward of `ids` (batch, tokens), without padding, after `past` tokens."""
        if not self.positions:
            return {}
        return {"position_ids": torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)}


_continuations: WeakKeyDictionary[PreTrainedModel, Continuation] = WeakKeyDictionary()


@torch.no_grad()
def continuation(model: PreTrainedModel, ids: Tensor) -> Continuation:
    """What a model needs after a past, tested once; takes five short forwards if any chunks work.

    Args:
        model: under a mask, as it is used.
        ids: (batch, tokens), real tokens of a text; the first ones are used.

    Raises:
        UserError: logits with a cache differ from those without in every mode, or the model takes only its own cache.
    """
    if model not in _continuations:
        try:
            _continuations[model] = _find_continuation(model, ids)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{_title(model)} does not accept a dual cache: {error}".partition("\n")[0]) from error
    return _continuations[model]


def check_chunks(model: PreTrainedModel, ids: Tensor, chunk_size: int, past: int) -> Continuation:
    """Raise a `UserError` if reading a text in such chunks would change the result.

    Args:
        model: under a mask.
        ids: (batch, tokens), the text, without padding.
        chunk_size: tokens per forward.
        past: tokens already in the cache.

    Returns:
        what its forwards need.
    """
    tokens = ids.shape[1]
    if tokens <= chunk_size and not past:
        return Continuation()
    how = continuation(model, ids)
    if how.stepwise and min(chunk_size, tokens) > 1:
        suggestion = "1 after a past" if past else f"{tokens}, the whole prompt"
        raise UserError(
            f"chunk_size={chunk_size}: {_title(model)} has layers that lose their state when several tokens follow a "
            f"past, so chunks would change its logits: use chunk_size={suggestion}"
        )
    return how


def _find_continuation(model: PreTrainedModel, ids: Tensor) -> Continuation:
    total = PAST + CHUNKS * CHUNK
    text = ids[:1].repeat(1, -(-total // ids.shape[1]))[:, :total]
    expected = model(text, use_cache=False).logits
    tolerance = _tolerance(model, expected)
    choices = (False, True) if "position_ids" in inspect.signature(model.forward).parameters else (False,)
    errors = []
    for stepwise, positions in product((False, True), choices):
        how = Continuation(positions, stepwise)
        errors.append(_error(_logits_in_chunks(model, text, how), expected[:, PAST:]))
        if errors[-1] <= tolerance:
            return how
    raise UserError(
        f"{_title(model)}: logits with a cache differ from those without by {min(errors):.0%}, even token by token, "
        "because layers other than attention lose their state: call it with use_cache=False on whole texts"
    )


def _logits_in_chunks(model: PreTrainedModel, text: Tensor, how: Continuation) -> Tensor:
    """The logits of the tokens after a past, (1, tokens, vocabulary)."""
    name, logits, cache, past = cache_argument(model), [], None, 0
    for part in (text[:, :PAST], *text[:, PAST:].split(1 if how.stepwise else CHUNK, 1)):
        options: dict[str, Any] = {} if cache is None else {name: cache}
        output = model(part, use_cache=True, **options, **how.options(part, past))
        cache, past = cache_of(output), past + part.shape[1]
        logits.append(output.logits)
    return torch.cat(logits[1:], 1)


def _error(actual: Tensor, expected: Tensor) -> float:
    """The distance of logits (1, tokens, vocabulary), relative to their spread; the median over tokens.

    The median, because rounding may make a router send single tokens to another expert, which is no fault of the cache.
    """
    actual, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (actual, expected))
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _tolerance(model: PreTrainedModel, logits: Tensor) -> float:
    """Half the digits of the coarsest dtype involved; at least 1%, because float32 products may use TF32."""
    types = [dtype for dtype in (model.dtype, logits.dtype) if dtype.is_floating_point]
    if torch.is_autocast_enabled(logits.device.type):
        types.append(torch.get_autocast_dtype(logits.device.type))
    return max(0.01, *(torch.finfo(dtype).eps ** 0.5 for dtype in types))


def _title(model: PreTrainedModel) -> str:
    return model.config.get_text_config().name_or_path or type(model).__name__
