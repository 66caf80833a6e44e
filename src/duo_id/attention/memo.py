"""Results of full attention, kept so that a layer that is recomputed for its gradient need not attend again.

`functools.cache` would not do: the second pass has its own tensors, and only the order of its calls is the same.
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
    """Records the results of SDPA's operators, call by call, and replays them when the same calls are repeated.

    It works below autograd: a call answered from the memo has a gradient like any other. Selective checkpointing does
    the same for all operators of a layer, compiled ones included; this covers attention alone.

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
            return _detach(next(self._next))
        results = func(*args, **(kwargs or {}))
        self.results.append(_detach(results))
        return results

    @contextmanager
    def noting(self, replay: bool) -> Iterator[None]:
        """Full attention inside the block records to this memo or replays it.

        Args:
            replay: whether the same calls have been recorded before.
        """
        self._next = iter(self.results) if replay else None
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: ContextVar[Memo | None] = ContextVar("memo", default=None)


def memo() -> AbstractContextManager[Any]:
    """The context for a call of SDPA: the active memo, if there is one."""
    return _active.get() or nullcontext()


def _detach(results: Any) -> Any:
    """Detached views of the tensors, because autograd adds the originals to its graph."""
    return tree_map_only(Tensor, Tensor.detach, results)
