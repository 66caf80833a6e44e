"""What a step needs of each device's memory, by calculation, before anything is loaded."""

from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from duo_id.budget import memory_bytes
from duo_id.config import StepSettings, require
from duo_id.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What of a step decides how much memory it needs.

    Attributes:
        tokens: of a sample, at most.
        samples: of a step.
        data: groups of devices that take different samples.
        sequence: devices that share a sample's tokens.
        sharded: whether all devices share the weights.
        recompute: whether the backward pass computes each layer again.
        teacher_outputs: whether the teacher's attention outputs are kept.
    """

    tokens: int
    samples: int = 1
    data: int = 1
    sequence: int = 1
    sharded: bool = True
    recompute: bool = True
    teacher_outputs: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
        weights: this device's share, and with it what is gathered at once: two layers and what lies outside them.
        activations: what a forward keeps for its backward pass.
        buffers: what the layer at work needs beside, forward and backward.
    """

    weights: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.buffers

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {getattr(self, name) / GIB:.3g}" for name in ("weights", "activations", "buffers"))
        return f"memory on each device, by calculation: {parts} = {self.total / GIB:.3g} GiB"

    def table(self, title: str) -> Table:
        """For the terminal."""
        table = Table(title=title, title_justify="left")
        table.add_column("on each device")
        table.add_column("GiB", justify="right")
        for name in ("weights", "activations", "buffers", "total"):
            table.add_row(name, f"{getattr(self, name) / GIB:.1f}", style="bold" if name == "total" else None)
        return table

    def check(self, capacity: int | None) -> None:
        """Raise a `UserError` if a device with `capacity` bytes (None: no limit) cannot hold the plan."""
        if capacity is not None and self.total > capacity:
            parts = ", ".join(
                f"{name} {getattr(self, name) / GIB:.1f}" for name in ("weights", "activations", "buffers")
            )
            raise UserError(
                f"not enough memory: a step needs {self.total / GIB:.1f} GiB on each device ({parts}) of which it has "
                f"{capacity / GIB:.1f}: more trainer.devices, step.sequence_parallel, step.memory=least or fewer "
                "tokens (data.length_max; of the benchmark context) need less"
            )


def capacity(memory: str, device: torch.device) -> int | None:
    """The bytes of a device that `step.memory` lets a step have; None where nothing limits it.

    Raises:
        UserError: `memory` is neither auto, least nor a budget.
    """
    budget = memory_bytes(memory)
    if budget is not None or device.type != "cuda":
        return budget
    return torch.cuda.get_device_properties(device).total_memory


def fitted(
    model: PreTrainedModel, step: StepSettings, shape: Shape, capacity: int | None
) -> tuple[StepSettings, MemoryPlan]:
    """A step that several devices share, as it fits them: with step.memory=least if layers cannot keep everything.

    Args:
        model: of its weights; the meta device will do.
        step: what is asked for.
        shape: of the step; whether it recomputes is decided here.
        capacity: bytes of each device; None: no limit.

    Returns:
        the step's settings, and its plan, which nevertheless may not fit: see `MemoryPlan.check`.

    Raises:
        UserError: it is for one device alone.
    """
    require(not step.cuda_graphs, "step.cuda_graphs=true works on 1 device alone")
    require(step.shape == "fast", f"step.shape={step.shape} works on 1 device alone")
    plan = memory_plan(model, replace(shape, recompute=step.memory == "least"))
    if capacity is not None and plan.total > capacity:
        return replace(step, memory="least"), memory_plan(model, replace(shape, recompute=True))
    return step, plan


def memory_plan(model: PreTrainedModel, shape: Shape) -> MemoryPlan:
    """The plan of a step.

    The weights are counted exactly. Of a layer the widest tensors are: its queries, keys and values, the outputs of
    full and streaming attention, and what its feed-forward network is as wide as; in the backward pass each has a
    gradient. With recomputation a layer keeps its input alone. Logits at scored tokens come on top.

    Args:
        model: of these weights; the meta device will do.
        shape: of the step.
    """
    config = model.config.get_text_config()
    size = next(model.parameters()).element_size()
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=_bytes)
    whole, layer = _bytes(model), max(_bytes(block) for block in layers)
    world = shape.data * shape.sequence
    weights = whole
    if shape.sharded and world > 1:
        weights = -(-whole // world) + 2 * layer + whole - _bytes(layers)
    rows = -(-shape.tokens // shape.sequence) * -(-shape.samples // shape.data)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = (heads + 2 * (getattr(config, "num_key_value_heads", None) or heads)) * width
    inner = 4 * config.hidden_size + 2 * attention + 3 * heads * width + 3 * config.intermediate_size
    kept = config.hidden_size if shape.recompute else inner
    kept += heads * width * shape.teacher_outputs
    exchange = 2 * (attention + heads * width) * (shape.sequence > 1)
    return MemoryPlan(weights, rows * kept * size * len(layers), rows * (2 * inner + exchange) * size)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
