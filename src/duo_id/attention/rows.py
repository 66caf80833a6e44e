"""The last layer at some tokens alone: a step looks at its scored tokens, and nothing comes after the last layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention.probe import AttentionLayer, beside, blocks, layer_list
from duo_id.attention.softmax import Softmax

SHARE = 16  # up to 1/16 of the tokens are taken apart: their kernel looks at a mask, so that of many all come sooner


@dataclass(frozen=True)
class AtRows:
    """What a layer does, for the queries of some tokens alone; the output of all others is 0.

    Attributes:
        attend: an attention function that takes the positions of its queries as its last argument.
        rows: (n,) positions in the one sample of the batch; one may come more than once.
    """

    attend: Any
    rows: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Attention, (1, heads, tokens, head_dim)."""
        found = self.attend(query.index_select(2, self.rows), key, value, softmax, rows=self.rows)
        return spread(found, self.rows, query.shape[2], 2)


def few(rows: Tensor, tokens: int) -> bool:
    """Whether to compute these of so many tokens by themselves."""
    return SHARE * len(rows) <= tokens


def spread(found: Tensor, rows: Tensor, tokens: int, dim: int) -> Tensor:
    """What was found at `rows`, at its place among `tokens` along `dim`; elsewhere 0.

    It is read, not written, into place, so that a row that comes more than once gets its gradient once.
    """
    place = rows.new_full((tokens,), len(rows))
    place[rows] = torch.arange(len(rows), device=rows.device)
    nothing = found.new_zeros(()).expand(*found.shape[:dim], 1, *found.shape[dim + 1 :])
    return torch.cat([found, nothing], dim).index_select(dim, place)


def last_layer(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> AttentionLayer | None:
    """The gated layer in the last transformer block, if it has one."""
    stack = list(model.get_submodule(layer_list(layers[-1].name)).children())
    return layers[-1] if blocks(model, layers[-1:]) == stack[-1:] else None


@contextmanager
def last_mlp_at_rows(model: PreTrainedModel, layers: Sequence[AttentionLayer], bound: str) -> Iterator[None]:
    """While the last layer's bound function is `AtRows`, let its MLP compute these rows alone too.

    MLPs are known by the names of their classes; what is named otherwise, as a mixer of tokens might be, sees all.

    Args:
        model: the language model.
        layers: its gated layers.
        bound: the attribute of an attention module that holds what it does.
    """
    layer = last_layer(model, layers)
    parts = beside(blocks(model, layers[-1:])[0], layer) if layer else []
    mlps = [part for part in parts if type(part).__name__.endswith("MLP")]
    tokens: list[int] = []  # of the call at work, empty where all are computed

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        assert layer is not None
        function = getattr(layer.module, bound)
        tokens[:] = [args[0].shape[1]] if isinstance(function, AtRows) else []
        if not tokens:
            return None
        return tuple(x.index_select(1, function.rows) if torch.is_tensor(x) else x for x in args), kwargs

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        assert layer is not None
        return spread(output, getattr(layer.module, bound).rows, tokens[0], 1) if tokens else None

    hooks = [mlp.register_forward_pre_hook(before, with_kwargs=True) for mlp in mlps]
    hooks += [mlp.register_forward_hook(after, with_kwargs=True) for mlp in mlps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
