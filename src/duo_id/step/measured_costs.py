"""What a step of a model costs, measured: a short pass at each level of `Keep` shows what autograd saves."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from duo_id.attention.layers import AttentionLayer
from duo_id.models.quantised import stored, stored_bytes
from duo_id.step.chunks import ELEMENT_BYTES
from duo_id.step.distillation import Distillation
from duo_id.step.memory import MeasuredCosts, libraries
from duo_id.step.recompute import Keep, Recomputation

PROBED_BEYOND = 256  # tokens of the short pass beyond the windows


def measure_costs(distillation: Distillation, recomputation: Recomputation, priced: int = 0) -> MeasuredCosts:
    """Count what a step keeps, in a short pass at each level.

    Args:
        distillation: the model and the objective.
        recomputation: whose levels are tried.
        priced: other spans that every head attends to beside its own (`duo_id.attention.priced`), which no short pass
            could tell apart: of each, the step keeps how its output differs.
    """
    model, window = distillation.gated_model.model.model, distillation.gated_model.window
    device, layers = model.device, distillation.gated_model.layers
    tokens = window.sink_size + window.recent_size + PROBED_BEYOND
    ids = (torch.arange(tokens, device=device) % model.config.get_text_config().vocab_size)[None]
    scored = torch.arange(tokens, device=device)  # the most that can be
    batch = {"input_ids": ids, "attention_mask": None, "scored": scored, "weights": torch.ones(tokens, device=device)}
    alpha = torch.full((len(layers), layers[0].kv_heads), 0.5, device=device, requires_grad=True)
    before, kept, other = list(recomputation.levels), [], 0
    vocabulary = distillation.gated_model.model.vocabulary
    more = [
        priced * model.dtype.itemsize * sum(layer.heads * layer.head_dim for layer in inside)
        for inside in recomputation.attention
    ]
    last, distillation.last = distillation.last, None  # with many scored tokens it computes all
    try:
        for level in Keep:
            recomputation.levels[:] = [level] * len(recomputation.levels)
            inside, other = _count(distillation, recomputation, alpha, batch)
            apart = [count if level < Keep.OUTPUT else 0 for count in more]
            kept.append([count / tokens + beside for count, beside in zip(inside, apart, strict=True)])
    finally:
        recomputation.levels[:], distillation.last = before, last
    return MeasuredCosts(
        stored_bytes(model),
        [dict(zip(Keep, row, strict=True)) for row in zip(*kept, strict=True)],
        other / tokens,
        logits=ELEMENT_BYTES * vocabulary if distillation.objective.logits or distillation.far else 0,
        reserve=libraries(device),
        again=_operations(recomputation, layers, full=not distillation.blend.needs_teacher),
    )


def _count(
    distillation: Distillation, recomputation: Recomputation, alpha: Tensor, batch: dict[str, Any]
) -> tuple[list[int], int]:
    """Bytes kept by each layer, and by all else; each tensor counts once, where it is first kept."""
    model = distillation.gated_model.model.model
    seen = {x.untyped_storage().data_ptr() for x in stored((*model.parameters(), *model.buffers(), alpha))}
    inside, outside = [0] * len(recomputation.blocks), [0]
    place: list[int | None] = [None]

    def count(tensor: Tensor) -> Tensor:
        for part in stored((tensor,)):
            storage = part.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                (outside if place[0] is None else inside)[place[0] or 0] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        return lambda module, given: place.__setitem__(0, number)

    def given_to(number: int, levels: Sequence[Keep]) -> Any:
        """Checkpoints keep what they are given beside autograd's books."""

        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            for value in given if recomputation.levels[number] in levels else ():
                if torch.is_tensor(value):
                    count(value)

        return hook

    with ExitStack() as stack:
        teacher = distillation.teacher(batch)
        for tensor in (*teacher.attention.values(), *(teacher.outputs.states if teacher.outputs else ())):
            count(tensor)
        for number, block in enumerate(recomputation.blocks):
            stack.callback(block.register_forward_pre_hook(enter(number)).remove)
            stack.callback(block.register_forward_hook(lambda *_: place.__setitem__(0, None)).remove)
        for module, number, levels in recomputation.regions():
            stack.callback(module.register_forward_pre_hook(given_to(number, levels)).remove)
        stack.callback(setattr, recomputation, "noted", recomputation.noted)
        recomputation.noted = lambda number, memo: tree_map_only(Tensor, count, memo.results)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = distillation.loss(alpha, batch, teacher)
        del loss
    return inside, outside[0]


def _operations(
    recomputation: Recomputation, layers: Sequence[AttentionLayer], full: bool
) -> Callable[[int], list[list[float]]]:
    """Operations to do again at each level, of `tokens` tokens; with full attention where the student computes it."""

    def size(modules: Sequence[nn.Module]) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    rows = []
    for place, (block, inside) in enumerate(zip(recomputation.blocks, recomputation.attention, strict=True)):
        regions = recomputation.regions()
        parts = [part for part, number, levels in regions if number == place and Keep.ATTENTION in levels]
        pairs = sum(2 * layer.heads * layer.head_dim for layer in inside) if full else 0
        rows.append((2 * size(parts), 2 * size([block]), pairs))
    return lambda tokens: [
        [0.0, beside * tokens, whole * tokens, whole * tokens + pairs * tokens**2] for beside, whole, pairs in rows
    ]
