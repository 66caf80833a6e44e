"""What full attention gave once, so that a layer which is computed again for its gradient need not attend again.

No `functools.cache`: the second pass has tensors of its own, of which only the order of the calls is the same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ATEN = torch.ops.aten
OPERATORS = {
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


class Memo(TorchDispatchMode):
    """Notes what SDPA's operators give, call by call, and gives it again when the same calls come once more.

    It lies below autograd: a call that is answered from the memo has its gradient like any other. Selective
    checkpointing does the same, but sees all operators of a layer, compiled ones among them; this sees SDPA alone.

    Attributes:
        results: of the calls, each with its log-sums and whatever else the backward pass needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self._next: Iterator[Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one operator."""
        if func not in OPERATORS:
            return func(*args, **(kwargs or {}))
        if self._next is not None:
            return _copied(next(self._next))
        found = func(*args, **(kwargs or {}))
        self.results.append(_copied(found))
        return found

    @contextmanager
    def noting(self, again: bool) -> Iterator[None]:
        """Let full attention ask this memo for a block.

        Args:
            again: whether the same calls have been noted before.
        """
        self._next = iter(self.results) if again else None
        token = _at_work.set(self)
        try:
            yield
        finally:
            _at_work.reset(token)


_at_work: ContextVar[Memo | None] = ContextVar("memo", default=None)


def memo() -> AbstractContextManager[Any]:
    """What a call of SDPA is to be made under: the memo at work, if there is one."""
    return _at_work.get() or nullcontext()


def _copied(results: Any) -> Any:
    """The same numbers in tensors of their own, for autograd makes those that it is given part of its graph."""
    return tree_map_only(Tensor, Tensor.detach, results)
