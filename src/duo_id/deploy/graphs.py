"""A step that is repeated, as one CUDA graph: its kernels are launched at once."""

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.padding import first_position
from duo_id.common.compat import cache_argument
from duo_id.common.errors import one_line
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation


def capture_graph(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Run a step once more and capture it as a CUDA graph; on the CPU, the step itself.

    Args:
        step: which must have run before. It never synchronises the device, and always reads and writes the same
            tensors.
        device: where it runs.

    Returns:
        a function that replays the graph.
    """
    if device.type != "cuda":
        step()
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # on its own stream, where libraries allocate the workspaces that the graph will use
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class DecodeSteps:
    """Decode steps with a cache, one token of each sample at a time; with a static cache, from the third on one graph.

    Layers that keep something other than keys and values of their own, and models that take no positions, are never
    captured.

    Args:
        model: under a mask.
        cache: its own, without padding, of which nothing is evicted or reordered between steps.
        how: what forwards after a past need.
        graph: whether to capture at all.
    """

    def __init__(self, model: PreTrainedModel, cache: DualCache, how: Continuation, graph: bool = True) -> None:
        self.model, self.cache, self.how = model, cache, how
        self.captures = graph and cache.max_length is not None and can_capture(model, cache, how)
        self.name, self.done = cache_argument(model), 0
        self.first = first_position(model) if self.captures else 0
        self.replay: Callable[[], object] | None = None
        self.ids = self.positions = self.logits = torch.empty(0)

    def __call__(self, ids: Tensor, past: int) -> Tensor:
        """Logits (batch, vocabulary) after new tokens (batch, 1) that follow `past` tokens."""
        if not self.captures:
            options = {self.name: self.cache} | self.how.options(ids, past)
            return self.model(ids, use_cache=True, **options).logits[:, -1]
        if not self.done:
            self.ids, self.positions = ids.clone(), torch.empty_like(ids)
        self.ids.copy_(ids)
        self.positions.fill_(past + self.first)
        if self.done == 1:
            self._capture()
        elif self.replay is not None:
            self.replay()
        else:
            self._forward()
        return self.logits.clone()

    def _forward(self) -> None:
        options = {self.name: self.cache, "position_ids": self.positions}
        logits = self.model(self.ids, use_cache=True, **options).logits[:, -1]
        if not self.done:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.done += 1

    def _capture(self) -> None:
        """Run one step and make a graph of it."""
        try:
            replay = capture_graph(self._forward, self.ids.device)
            self.replay = None if replay == self._forward else replay  # a method of its own would keep the cache alive
        except RuntimeError as error:
            if self.done == 1:  # the step itself failed
                raise
            self.cache.tokens.forget_interruption()
            warnings.warn(f"a step cannot be captured, so writing is slower: {one_line(error)}", stacklevel=4)


def can_capture(model: PreTrainedModel, cache: DualCache, how: Continuation) -> bool:
    """Whether decode steps of a model can be one graph, with a static cache."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return takes_positions and not how.stepwise and len(cache.dual_layers) == len(cache.layers)
