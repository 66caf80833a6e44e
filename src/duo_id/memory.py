"""What a training step keeps for its backward pass: as much as the memory holds, chosen before anything is computed.

Bytes are counted, not guessed: a short pass of the real model shows what autograd saves in each transformer layer at
each level of `Keep`, for any family, blend and kernel. All of that grows with the tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from duo_id.attention.probe import AttentionLayer
from duo_id.budget import memory_bytes
from duo_id.distillation import Distillation
from duo_id.errors import UserError
from duo_id.recompute import Keep, Recomputation

PROBED_BEYOND = 256  # tokens of the short pass beyond the windows
LIBRARIES = 2**30  # bytes that a GPU's libraries and the gaps between tensors take
SPARED = 0.06  # of a GPU's budget: by so much steps have come out above what was counted (docs/performance.md)
GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """What a model's step needs.

    Attributes:
        weights: bytes of parameters and buffers.
        kept: for each layer, bytes a token that it keeps at each level of `Keep`.
        other: bytes a token that are kept outside the layers, the teacher's recorded outputs among them.
        again: for each layer, floating-point operations to compute again at each level, of a given number of tokens.
        reserve: bytes for libraries.
    """

    weights: int
    kept: Sequence[Sequence[float]]
    other: float
    again: Callable[[int], Sequence[Sequence[float]]]
    reserve: int = 0

    def plan(self, tokens: int, budget: int | None) -> "Plan":
        """The levels that fit into `budget` bytes with the fewest operations to do again; None: everything is kept.

        Early layers keep the least: the backward pass comes to them last, when the later ones have freed theirs.

        Raises:
            UserError: not even the least fits.
        """
        layers = len(self.kept)
        usable = 1 - SPARED * (self.reserve > 0)  # of the budget
        buffers = int(2 * tokens * max(row[Keep.ALL] for row in self.kept)) + self.reserve
        base = self.weights + int(self.other * tokens) + buffers
        kept, again = (
            [list(accumulate((row[level] for row in table), initial=0.0)) for level in Keep]
            for table in (self.kept, self.again(tokens))
        )
        best: tuple[float, int, int] | None = None
        for least in range(layers + 1):
            for middle in range(least, layers + 1):
                spent, work = (
                    sums[Keep.INPUT][least]
                    + sums[Keep.ATTENTION][middle] - sums[Keep.ATTENTION][least]
                    + sums[Keep.ALL][-1] - sums[Keep.ALL][middle]
                    for sums in (kept, again)
                )  # fmt: skip
                if (budget is None or base + tokens * spent <= usable * budget) and (best is None or work < best[0]):
                    best = work, least, middle
        if best is None:
            assert budget is not None
            sizes = (self.weights, self.other * tokens + tokens * kept[Keep.INPUT][-1], buffers)
            needed, weights, activations, rest, there = (size / GIB for size in (sum(sizes) / usable, *sizes, budget))
            raise UserError(
                f"step.memory: a step of {tokens:,} tokens needs at least {needed:.3g} GiB "
                f"(weights {weights:.3g}, activations {activations:.3g}, buffers {rest:.3g}), and "
                f"there are {there:.3g}: raise step.memory or lower data.length_max"
            )
        _, least, middle = best
        levels = [Keep.INPUT] * least + [Keep.ATTENTION] * (middle - least) + [Keep.ALL] * (layers - middle)
        activations = tokens * (self.other + sum(row[level] for row, level in zip(self.kept, levels, strict=True)))
        return Plan(tuple(levels), tokens, self.weights, int(activations), buffers, budget)


@dataclass(frozen=True)
class Plan:
    """What each layer keeps in a step, and the bytes that this comes to.

    Attributes:
        levels: of each layer.
        tokens: of the step, all samples together.
        weights: bytes.
        activations: bytes kept for the backward pass, the teacher's outputs among them.
        buffers: bytes that come and go: a layer that is computed again, with its gradients; libraries.
        budget: bytes; None: there is no limit.
    """

    levels: tuple[Keep, ...]
    tokens: int
    weights: int
    activations: int
    buffers: int
    budget: int | None

    def __str__(self) -> str:
        parts = {key: getattr(self, key) / GIB for key in ("weights", "activations", "buffers")}
        shown = " + ".join(f"{key} {size:.3g}" for key, size in parts.items())
        limit = "" if self.budget is None else f" of {self.budget / GIB:.3g}"
        counts = [self.levels.count(level) for level in Keep]
        return (
            f"memory of {self.tokens:,} tokens: {shown} = {sum(parts.values()):.3g}{limit} GiB; of {len(self.levels)} "
            f"layers {counts[0]} keep everything, {counts[1]} their attention, {counts[2]} their input"
        )


class MemoryPlanner:
    """Sets what layers keep, by the number of tokens of each step."""

    def __init__(self, recomputation: Recomputation, costs: Costs, budget: int | None) -> None:
        """Take what is planned for: the layers, what they cost, and the bytes that there are (None: no limit)."""
        self.recomputation, self.plan = recomputation, lru_cache(maxsize=None)(lambda n: costs.plan(n, budget))

    def arrange(self, tokens: int) -> Plan:
        """Let the layers keep what the plan for a step of `tokens` tokens says."""
        plan = self.plan(tokens)
        self.recomputation.levels[:] = plan.levels
        return plan


def available(memory: str, device: torch.device) -> int | None:
    """The bytes that a step may use, weights included; None where nothing limits it, or where it is to keep the least.

    Raises:
        UserError: `memory` is neither auto, least nor a budget.
    """
    budget = memory_bytes(memory)
    if budget is not None or memory == "least" or device.type != "cuda":
        return budget
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def measure_costs(distillation: Distillation, recomputation: Recomputation) -> Costs:
    """Count what a step keeps, in a short pass at each level."""
    model, window = distillation.model.model, distillation.window
    device, layers = model.device, distillation.layers
    tokens = window.sink_size + window.recent_size + PROBED_BEYOND
    ids = (torch.arange(tokens, device=device) % model.config.get_text_config().vocab_size)[None]
    scored = torch.arange(tokens - 1, tokens, device=device)
    batch = {"input_ids": ids, "attention_mask": None, "scored": scored, "weights": torch.ones(1, device=device)}
    alpha = torch.full((len(layers), layers[0].kv_heads), 0.5, device=device, requires_grad=True)
    before, kept, other = list(recomputation.levels), [], 0
    last, distillation.last = distillation.last, None  # with many scored tokens it computes all
    try:
        for level in Keep:
            recomputation.levels[:] = [level] * len(recomputation.levels)
            inside, other = _count(distillation, recomputation, alpha, batch)
            kept.append([count / tokens for count in inside])
    finally:
        recomputation.levels[:], distillation.last = before, last
    return Costs(
        sum({x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}.values()),
        list(zip(*kept, strict=True)),
        other / tokens,
        _operations(recomputation, layers, full=not distillation.blend.needs_teacher),
        LIBRARIES if device.type == "cuda" else 0,
    )


def _count(
    distillation: Distillation, recomputation: Recomputation, alpha: Tensor, batch: dict[str, Any]
) -> tuple[list[int], int]:
    """Bytes kept by each layer, and by all else; each tensor counts once, where it is first kept."""
    model = distillation.model.model
    seen = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), alpha)}
    inside, outside = [0] * len(recomputation.blocks), [0]
    place: list[int | None] = [None]

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            (outside if place[0] is None else inside)[place[0] or 0] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        return lambda module, given: place.__setitem__(0, number)

    def given_to(number: int, level: Keep) -> Any:
        """Checkpoints keep what they are given beside autograd's books."""

        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            for value in given if recomputation.levels[number] == level else ():
                if torch.is_tensor(value):
                    count(value)

        return hook

    with ExitStack() as stack:
        teacher = distillation.teacher(batch)
        for tensor in teacher.attention.values():
            count(tensor)
        for number, block in enumerate(recomputation.blocks):
            stack.callback(block.register_forward_pre_hook(enter(number)).remove)
            stack.callback(block.register_forward_hook(lambda *_: place.__setitem__(0, None)).remove)
        for module, number, level in recomputation.regions():
            stack.callback(module.register_forward_pre_hook(given_to(number, level)).remove)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs = distillation.student(alpha, batch, teacher)
        del outputs
    return inside, outside[0]


def _operations(
    recomputation: Recomputation, layers: Sequence[AttentionLayer], full: bool
) -> Callable[[int], list[list[float]]]:
    """Operations to do again at each level, of `tokens` tokens; with full attention where the student computes it."""

    def size(modules: Sequence[nn.Module]) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    rows = []
    for place, (block, inside) in enumerate(zip(recomputation.blocks, recomputation.attention, strict=True)):
        parts = [part for part, number, level in recomputation.regions() if number == place and level == Keep.ATTENTION]
        pairs = sum(2 * layer.heads * layer.head_dim for layer in inside) if full else 0
        rows.append((2 * size(parts), 2 * size([block]), pairs))
    return lambda tokens: [[0.0, beside * tokens, all_ * tokens + pairs * tokens**2] for beside, all_, pairs in rows]
