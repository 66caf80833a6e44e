"""How large the tensors are that a computation makes and keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Inside the block, note the elements of the largest tensor that any operation returns.

    Attributes:
        elements: of the largest so far; views of the model's weights do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note what the weights are."""
        super().__init__()
        self.elements = 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
                self.elements = max(self.elements, tensor.numel())
        return output


@contextmanager
def saved_for_backward() -> Iterator[list[int]]:
    """Yield a list that gets the elements of each tensor which autograd keeps for the backward pass."""
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
