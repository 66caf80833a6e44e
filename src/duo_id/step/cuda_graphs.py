"""A step's loss and gradient as one CUDA graph: small models spend their time launching kernels.

`torch.cuda.make_graphed_callables` takes only tensors, of one set of shapes, and makes two graphs, one of each pass;
torch.compile's `reduce-overhead` would compile the model too, which is for `step.compile` to say.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LossFunction = Callable[[Tensor, dict[str, Any]], Tensor]
WARM_UPS = 2  # runs before a capture, for libraries to choose and load their kernels


class GraphedLoss:
    """Replays `loss(alpha, batch)` and its gradient with respect to alpha; each batch shape is captured once.

    On the CPU it simply calls the function. To be captured, the function must never wait for the device, and its
    kernels may depend only on the batch's shapes.
    """

    def __init__(self, loss: LossFunction) -> None:
        """Wrap `loss`, a function of the gates (layers, KV heads) and a batch, to a scalar."""
        self.loss = loss
        self._captured: dict[tuple[Any, ...], _Capture] = {}

    def __call__(self, alpha: Tensor, batch: dict[str, Any]) -> Tensor:
        """The loss; its backward pass gives alpha the captured gradient."""
        if not alpha.is_cuda:
            return self.loss(alpha, batch)
        shapes = tuple((key, value.shape) for key, value in sorted(batch.items()) if torch.is_tensor(value))
        if shapes not in self._captured:
            pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
            self._captured[shapes] = _Capture(self.loss, alpha, batch, pool)
        return _Replay.apply(alpha, self._captured[shapes], batch)

    def release(self) -> None:
        """Free the memory of all graphs; later calls capture new ones."""
        self._captured.clear()


class _Capture:
    """One graph with the tensors that it reads and writes. Graphs never run at once, so they share a memory pool."""

    def __init__(self, loss: LossFunction, alpha: Tensor, batch: dict[str, Any], pool: Any) -> None:
        self.alpha = alpha.detach().clone().requires_grad_()
        self.batch = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.enable_grad():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    torch.autograd.grad(loss(self.alpha, self.batch), self.alpha)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                value = loss(self.alpha, self.batch)
                (self.gradient,) = torch.autograd.grad(value, self.alpha)
                self.value = value.detach()

    def replay(self, alpha: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self.alpha.data.copy_(alpha)
        for key, value in batch.items():
            if torch.is_tensor(value):
                self.batch[key].copy_(value)
        self.graph.replay()
        return self.value.clone(), self.gradient.clone()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, capture: _Capture, batch: dict[str, Any]) -> Tensor:
        value, gradient = capture.replay(alpha, batch)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None
