"""The last layer at some tokens alone: a step looks at its scored tokens, and nothing comes after the last layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention.layers import BOUND, AttentionLayer, blocks, layer_list, norms_and_mlp
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


def worth_splitting(rows: Tensor, tokens: int) -> bool:
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
def last_mlp_at_rows(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> Iterator[None]:
    """While the last layer's bound function is `AtRows`, let its MLP compute these rows alone too.

    MLPs are known by the names of their classes; what is named otherwise, as a mixer of tokens might be, sees all.

    Args:
        model: the language model.
        layers: its gated layers.
    """
    layer = last_layer(model, layers)
    if layer is None:
        yield
        return
    attention, tokens = layer.module, list[int]()  # of the call at work, empty where all are computed

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        function = getattr(attention, BOUND)
        apart = isinstance(function, AtRows) and bool(args) and args[0].dim() == 3
        tokens[:] = [args[0].shape[1]] if apart else []
        return tuple(x.index_select(1, function.rows) if torch.is_tensor(x) else x for x in args) if apart else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not tokens:
            return output
        found, *others = output if isinstance(output, tuple) else (output,)  # what a router says comes beside
        whole = spread(found, getattr(attention, BOUND).rows, tokens[0], 1)
        return (whole, *others) if isinstance(output, tuple) else whole

    hooks = []
    for part in norms_and_mlp(blocks(model, [layer])[0], layer):
        if type(part).__name__.endswith("MLP"):
            hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
