"""The fields that head patterns, masks and spans share, checked: the heads, their window and the gated layers."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from duo_id.common.documents import MOST_TOKENS, excerpt
from duo_id.common.errors import UserError, check, one_line

MOST_HEADS = 2**12  # layers, and KV heads of a layer
ALL = -1  # the attention span of a head that sees all tokens

SIZES = {"sink_size": 0, "recent_size": 1}  # the smallest of each, in tokens


def numbers(name: str, values: Any, shape: str = "(layers, KV heads)") -> Tensor:
    """A tensor of real numbers, or of whatever holds them; `shape` is what a message says.

    Raises:
        UserError: the values are none, or rows differ in length.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be numbers of shape {shape}: {one_line(error)}") from error
    if tensor.is_complex():
        raise UserError(f"{name} must be real numbers, not {tensor.dtype}")
    return tensor


def fractions(name: str, values: Any) -> list[float]:
    """Several sparsities, ascending.

    Raises:
        UserError: they are not several, or one is no number.
    """
    several = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else None
    if several is None or not all(isinstance(value, Real) and not isinstance(value, bool) for value in several):
        raise UserError(f"{name}={values!r:.80} must be a list of numbers, such as {name}=[0.5]")
    return sorted(several)


def set_checked_fields(
    owner: Any, name: str, heads: Tensor, windows: Mapping[str, int] = SIZES, ungated: int = 1
) -> None:
    """Check and set the fields that patterns, masks and spans share.

    Args:
        owner: the pattern, mask or spans.
        name: of its field that holds `heads`.
        heads: (layers, KV heads), modified in place: rows of layers without gates become `ungated`.
        windows: the owner's fields that count tokens, with the smallest value of each.
        ungated: see `heads`.
    """
    if heads.dim() != 2 or heads.numel() == 0:
        raise UserError(f"{name} must have the shape (layers, KV heads), both at least 1, not {tuple(heads.shape)}")
    if max(heads.shape) > MOST_HEADS:
        raise UserError(
            f"{name} of shape {tuple(heads.shape)} are larger than any model: at most {MOST_HEADS} each way"
        )
    layers = range(len(heads))
    given = layers if owner.gated_layers is None else owner.gated_layers
    indices = list(given) if isinstance(given, Iterable) else []
    if not indices or any(not isinstance(layer, Integral) or layer not in layers for layer in indices):
        raise UserError(
            f"gated_layers={indices or given!s:.60} must name the gated layers, at least one, from 0 to {layers[-1]}"
        )
    gated = tuple(sorted({int(layer) for layer in indices}))
    heads[sorted({*layers} - {*gated})] = ungated
    object.__setattr__(owner, name, heads)
    object.__setattr__(owner, "gated_layers", gated)
    for window, smallest in windows.items():
        size = getattr(owner, window)
        if not isinstance(size, Integral) or isinstance(size, bool) or not smallest <= int(size) <= MOST_TOKENS:
            most = f", at most {MOST_TOKENS}" if isinstance(size, Integral) and int(size) > MOST_TOKENS else ""
            raise UserError(f"{window}={excerpt(size)} must be a whole number of tokens, at least {smallest}{most}")
        object.__setattr__(owner, window, int(size))


def check_length(length: Any) -> None:
    """Raise a `UserError` unless `length` counts the tokens of a context."""
    check(
        isinstance(length, Integral) and not isinstance(length, bool) and 1 <= int(length) <= MOST_TOKENS,
        f"length={excerpt(length)} must be a number of tokens from 1 to {MOST_TOKENS}",
    )


def check_fits(kind: str, heads: Tensor, layers: int, kv_heads: int, model_name: str) -> None:
    """Raise a `UserError` unless `heads` of a pattern or mask are those of the model `model_name`."""
    if tuple(heads.shape) != (layers, kv_heads):
        raise UserError(
            f"this head {kind} is for {heads.shape[0]} layers x {heads.shape[1]} KV heads, "
            f"but {model_name} has {layers} layers x {kv_heads} KV heads"
        )


def identity(owner: Any, heads: Tensor) -> tuple[Any, ...]:
    """What two equal patterns or masks share."""
    return heads.tolist(), owner.sink_size, owner.recent_size, owner.gated_layers


def summary(owner: Any, heads: Tensor) -> str:
    """Shape and sizes, for people."""
    layers, kv_heads = heads.shape
    gated = len(owner.gated_layers)
    some = "" if gated == layers else f" ({gated} layer{'s' * (gated > 1)} gated)"
    return f"{layers} layers x {kv_heads} KV heads{some}, sink_size={owner.sink_size}, recent_size={owner.recent_size}"
