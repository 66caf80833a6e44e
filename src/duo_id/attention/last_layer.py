"""The last layer at selected tokens: a training step needs it only for the scored ones, as no layer comes after it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention.layers import BOUND, AttentionLayer, blocks, layer_list, norms_and_mlp
from duo_id.attention.softmax import Softmax

MIN_RATIO = 16  # split only up to 1/16 of the tokens: beyond, the masked kernel takes longer than all tokens at once


@dataclass(frozen=True)
class AtRows:
    """A layer's attention for the queries of some tokens; the output of all others is 0.

    Attributes:
        attend: an attention function that takes the positions of its queries as its last argument.
        rows: (n,) positions in the one sample of the batch, which may repeat.
        own: (m,) positions among the tokens that this process computes, which include all of `rows` that it has.
    """

    attend: Any
    rows: Tensor
    own: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Attention, (1, heads, tokens, head_dim)."""
        output = self.attend(query.index_select(2, self.rows), key, value, softmax, rows=self.rows)
        return scatter_rows(output, self.rows, query.shape[2], 2)


def worth_splitting(rows: Tensor, tokens: int) -> bool:
    """Whether computing `rows` alone is faster than computing all `tokens`."""
    return MIN_RATIO * len(rows) <= tokens


def scatter_rows(values: Tensor, rows: Tensor, tokens: int, dim: int) -> Tensor:
    """Scatter the `values` of `rows` to their positions among `tokens` along `dim`; zero elsewhere.

    A gather does it, not a scatter, so that a row that occurs more than once gets its gradient only once.
    """
    source = rows.new_full((tokens,), len(rows))
    source[rows] = torch.arange(len(rows), device=rows.device)
    zero = values.new_zeros(()).expand(*values.shape[:dim], 1, *values.shape[dim + 1 :])
    return torch.cat([values, zero], dim).index_select(dim, source)


def last_layer(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> AttentionLayer | None:
    """The gated layer in the last transformer block, if it has one."""
    stack = list(model.get_submodule(layer_list(layers[-1].name)).children())
    return layers[-1] if blocks(model, layers[-1:]) == stack[-1:] else None


@contextmanager
def last_mlp_at_rows(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> Iterator[None]:
    """While the last layer's bound function is `AtRows`, its MLP computes only these rows too.

    MLPs are recognised by the names of their classes; other modules, which might mix tokens, see all tokens.

    Args:
        model: the language model.
        layers: its gated layers.
    """
    layer = last_layer(model, layers)
    if layer is None:
        yield
        return
    attention, num_tokens = layer.module, list[int]()  # of the running call; empty if it computes all tokens

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        function = getattr(attention, BOUND)
        selected = isinstance(function, AtRows) and bool(args) and args[0].dim() == 3
        num_tokens[:] = [args[0].shape[1]] if selected else []
        return tuple(x.index_select(1, function.own) if torch.is_tensor(x) else x for x in args) if selected else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not num_tokens:
            return output
        hidden, *others = output if isinstance(output, tuple) else (output,)  # a router's logits come second
        scattered = scatter_rows(hidden, getattr(attention, BOUND).own, num_tokens[0], 1)
        return (scattered, *others) if isinstance(output, tuple) else scattered

    hooks = []
    for part in norms_and_mlp(blocks(model, [layer])[0], layer):
        if type(part).__name__.endswith("MLP"):
            hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
