"""A step's loss and gradient as one CUDA graph: small models spend their time launching kernels.

`torch.cuda.make_graphed_callables` takes only tensors, of one set of shapes, and makes two graphs, one of each pass;
torch.compile's `reduce-overhead` would compile the model too, which is for `step.compile` to say.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duo_id.models.gated_model import GatedModel

LossFunction = Callable[[Tensor, dict[str, Any]], Tensor]
Shapes = tuple[tuple[str, torch.Size], ...]
LAUNCH_SHARE = 0.8  # of a step's time: a device that is done so soon after the last launch has waited for launches
WARM_UPS = 2  # runs before a capture, for libraries to choose and load their kernels


class GraphedLoss:
    """Replays `loss(alpha, batch)` and its gradient with respect to alpha; each batch shape is captured once.

    On the CPU it simply calls the function. To be captured, the function must never wait for the device, and its
    kernels may depend only on the batch's shapes.

    Attributes:
        room: bytes that all graphs may take together; steps that find no room run without.
    """

    def __init__(self, loss: LossFunction, always: bool = True) -> None:
        """Wrap `loss`.

        Args:
            loss: a function of the gates (layers, KV heads) and a batch, to a scalar.
            always: capture every shape; otherwise those that can be captured and whose launches take longer than
                their kernels, which each shape's second step shows.
        """
        self.loss, self.always, self.room = loss, always, math.inf
        self._captured: dict[Shapes, _Capture] = {}
        self._worthwhile: dict[Shapes, bool | None] = {}  # None: seen once, with libraries still loading
        self._bytes = 0

    def __call__(self, alpha: Tensor, batch: dict[str, Any], num_bytes: int = 0) -> Tensor:
        """The loss; its backward pass gives alpha the gradient.

        Args:
            alpha: the gates.
            batch: its tensors' shapes choose the graph.
            num_bytes: that a graph of such a batch takes at most.
        """
        if not alpha.is_cuda:
            return self.loss(alpha, batch)
        shapes = tuple((key, value.shape) for key, value in sorted(batch.items()) if torch.is_tensor(value))
        if shapes not in self._captured:
            if not self.always and not self._worthwhile.get(shapes):
                return self._plain(shapes, alpha, batch)
            if self._bytes + num_bytes > self.room:
                return self.loss(alpha, batch)
            pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
            torch.cuda.empty_cache()  # as a capture does, which would hide what the graph takes
            before = torch.cuda.memory_reserved(alpha.device)
            self._captured[shapes] = _Capture(self.loss, alpha, batch, pool)
            self._bytes += torch.cuda.memory_reserved(alpha.device) - before
        return _Replay.apply(alpha, self._captured[shapes], batch)

    def _plain(self, shapes: Shapes, alpha: Tensor, batch: dict[str, Any]) -> Tensor:
        """The loss without a graph; a shape's second time decides whether a graph is worthwhile."""
        if shapes not in self._worthwhile:
            self._worthwhile[shapes] = None
        elif self._worthwhile[shapes] is None:
            value, self._worthwhile[shapes] = _timed(self.loss, alpha, batch)
            if value is not None:
                return value
        return self.loss(alpha, batch)

    def release(self) -> None:
        """Free the memory of all graphs; later calls capture new ones."""
        self._captured.clear()
        self._bytes = 0


def graphs_of(loss: LossFunction, choice: bool | str, gated_model: GatedModel) -> GraphedLoss | None:
    """The graphs of a loss by `step.cuda_graphs`; None if there are none, as with auto on a CPU or several devices."""
    if choice == "auto":
        allowed = gated_model.device.type == "cuda" and gated_model.model.ranks.world == 1
        return GraphedLoss(loss, always=False) if allowed else None
    return GraphedLoss(loss) if choice else None


def _timed(loss: LossFunction, alpha: Tensor, batch: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """The loss, and whether a graph would be faster; no loss if it waits for the device, so no graph is possible."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        value = loss(alpha, batch)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return None, False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    return value, launched > LAUNCH_SHARE * (time.perf_counter() - start)


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
