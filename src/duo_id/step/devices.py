"""The memory of a step that several devices share, calculated before any weights are loaded."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from duo_id.common.errors import check
from duo_id.distributed.ranks import Ranks
from duo_id.models.quantised import stored_bytes
from duo_id.step.chunks import ELEMENT_BYTES
from duo_id.step.memory import Costs, Plan, available, libraries
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
    """Fit a step that several devices share into the memory of each, see `fit_memory`.

    Args:
        model: may be on the meta device.
        step: the requested settings.
        ranks: the devices.
        device: of this process.
        tokens: of the longest sample.
        samples: per step, over all devices.
        teacher_outputs: whether the teacher's attention outputs are kept.

    Returns:
        the settings, with step.memory lowered if need be, and the plan of each device.

    Raises:
        UserError: a device has too little memory, or the settings only work on a single device.
    """
    check(step.cuda_graphs is not True, "step.cuda_graphs=true only works on a single device")
    check(step.shape == "fast", f"step.shape={step.shape} only works on a single device")
    costs = calculated_costs(model, ranks, device, teacher_outputs, step.compile)
    budget = available(step.memory, device)
    if budget is not None:  # that of the fullest device
        budget = -int(ranks.reduce_max(-budget, device=device)[0])
    return fit_memory(step, costs, ranks.tokens(tokens, samples), budget)


def fit_memory(step: StepSettings, costs: Costs, tokens: int, budget: int | None) -> tuple[StepSettings, Plan]:
    """Lower step.memory to `outputs` where layers cannot keep everything, and to `least` where that is too much.

    All layers keep the same, since all devices must do the same.

    Args:
        step: the requested settings.
        costs: per device.
        tokens: that each device computes.
        budget: bytes per device; None: no limit.

    Raises:
        UserError: even `least` does not fit.
    """
    levels = {step.memory: FIXED[step.memory]} if step.memory in FIXED else {step.memory: Keep.ALL} | FIXED
    plans = {memory: costs.plan_for([level] * len(costs.kept), tokens, budget) for memory, level in levels.items()}
    *_, minimal = plans.values()
    minimal.check()
    fitting = [memory for memory, plan in plans.items() if plan.fits]
    highest = max(reversed(fitting), key=lambda memory: plans[memory].activations)  # among equals, the lowest level
    return replace(step, memory=highest), plans[highest]


def calculated_costs(
    model: PreTrainedModel,
    ranks: Ranks,
    device: torch.device,
    teacher_outputs: bool = False,
    compiled: bool = False,
) -> Costs:
    """A step's memory on each device, estimated from the model's widths.

    Weights are counted exactly: the device's own share plus what is gathered at any one time, which is two layers and
    everything outside the layers. Of a layer's activations the widest are counted: its states, queries, keys and
    values, the outputs of full and streaming attention, and what the feed-forward network keeps. In the backward pass
    those of attention or of the feed-forward network, whichever are wider, have gradients at the same time; attention
    is also exchanged with other devices.

    Args:
        model: may be on the meta device.
        ranks: the devices.
        device: of their kind.
        teacher_outputs: whether the teacher's attention outputs are kept.
        compiled: whether norms, rotations, products of gates and blends are computed again in the backward pass.
    """
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=stored_bytes)
    model_bytes, layer_bytes = stored_bytes(model), max(stored_bytes(block) for block in layers)
    weights = model_bytes
    if ranks.sharded:
        weights = -(-model_bytes // ranks.world) + 2 * layer_bytes + model_bytes - stored_bytes(layers)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    projected = (heads + 2 * (getattr(config, "num_key_value_heads", None) or heads)) * width
    outputs = (2 - teacher_outputs) * heads * width  # the teacher's are counted apart
    states, attention, feed_forward = (
        (2 * config.hidden_size, projected + outputs, 2 * config.intermediate_size)
        if compiled
        else (4 * config.hidden_size, 2 * projected + outputs + heads * width, 3 * config.intermediate_size)
    )
    exchanged = 2 * (projected + heads * width) * (ranks.sequence > 1)
    output_width = 0 if teacher_outputs else (size * width + 4) * heads  # and its log-sum-exp
    return Costs(
        weights,
        [
            {
                Keep.ALL: size * (states + attention + feed_forward),
                Keep.OUTPUT: size * config.hidden_size + output_width,
                Keep.INPUT: size * config.hidden_size,
            }
        ]
        * len(layers),
        other=size * heads * width * len(layers) * teacher_outputs,
        logits=ELEMENT_BYTES * config.vocab_size,
        passing=size * max(attention + exchanged, feed_forward),
        reserve=libraries(device),
    )
