"""A step that several devices share: what it needs of each, by calculation, before weights are loaded."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from duo_id.common.errors import check
from duo_id.distributed.ranks import Ranks
from duo_id.step.memory import Costs, Plan, available, libraries, weight_bytes
from duo_id.step.recompute import FIXED, Keep
from duo_id.step.settings import StepSettings


def shared_step(
    model: PreTrainedModel,
    step: StepSettings,
    ranks: Ranks,
    device: torch.device,
    tokens: int,
    samples: int,
    teacher_outputs: bool,
) -> tuple[StepSettings, Plan]:
    """A step as several devices can share it, see `fitted`.

    Args:
        model: of its weights; the meta device will do.
        step: what is asked for.
        ranks: the devices.
        device: this process's.
        tokens: of a sample, at most.
        samples: of a step, of all devices together.
        teacher_outputs: whether the teacher's attention outputs are kept.

    Returns:
        the step's settings, step.memory perhaps another, and its plan on each device.

    Raises:
        UserError: a device has not that much memory, or the step is for one device alone.
    """
    check(not step.cuda_graphs, "step.cuda_graphs=true works on 1 device alone")
    check(step.shape == "fast", f"step.shape={step.shape} works on 1 device alone")
    costs = calculated_costs(model, ranks, device, teacher_outputs)
    budget = available(step.memory, device)
    if budget is not None:  # that of the fullest device
        budget = -int(ranks.reduce_max(-budget, device=device)[0])
    return fitted(step, costs, ranks.tokens(tokens, samples), budget)


def fitted(step: StepSettings, costs: Costs, tokens: int, budget: int | None) -> tuple[StepSettings, Plan]:
    """A step with step.memory=outputs if layers cannot keep everything, and least if they cannot keep that.

    All layers keep the same, since all devices must do the same.

    Args:
        step: what is asked for.
        costs: of each device.
        tokens: that a device computes.
        budget: bytes of a device; None: no limit.

    Raises:
        UserError: that is not enough.
    """
    levels = {step.memory: FIXED[step.memory]} if step.memory in FIXED else {step.memory: Keep.ALL} | FIXED
    plans = {memory: costs.plan_for([level] * len(costs.kept), tokens, budget) for memory, level in levels.items()}
    *_, least = plans.values()
    least.check()
    fitting = [memory for memory, plan in plans.items() if plan.fits]
    most = max(reversed(fitting), key=lambda memory: plans[memory].activations)  # of equals the one with the least
    return replace(step, memory=most), plans[most]


def calculated_costs(
    model: PreTrainedModel, ranks: Ranks, device: torch.device, teacher_outputs: bool = False
) -> Costs:
    """What a step needs of each device, as far as the model's widths tell.

    The weights are counted exactly: this device's share, and what is gathered at once, two layers and what lies outside
    them. Of a layer the widest tensors are: its queries, keys and values, the outputs of full and streaming attention,
    and what its feed-forward network is as wide as; in the backward pass each has a gradient.

    Args:
        model: of these weights; the meta device will do.
        ranks: the devices.
        device: of what kind they are.
        teacher_outputs: whether the teacher's attention outputs are kept.
    """
    config = model.config.get_text_config()
    size = next(model.parameters()).element_size()
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=weight_bytes)
    whole, layer = weight_bytes(model), max(weight_bytes(block) for block in layers)
    weights = whole
    if ranks.sharded:
        weights = -(-whole // ranks.world) + 2 * layer + whole - weight_bytes(layers)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = (heads + 2 * (getattr(config, "num_key_value_heads", None) or heads)) * width
    inner = 4 * config.hidden_size + 2 * attention + 3 * heads * width + 3 * config.intermediate_size
    output = 0 if teacher_outputs else (size * width + 4) * heads  # with its log-sums
    return Costs(
        weights,
        [
            {
                Keep.ALL: size * inner,
                Keep.OUTPUT: size * config.hidden_size + output,
                Keep.INPUT: size * config.hidden_size,
            }
        ]
        * len(layers),
        other=size * heads * width * len(layers) * teacher_outputs,
        exchanged=size * 2 * (attention + heads * width) * (ranks.sequence > 1),
        reserve=libraries(device),
    )
