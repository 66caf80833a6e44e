"""Settings that are `auto`: what the model and its device can take decides them, before any weights are loaded."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from duo_id.attention.blends import BLENDS
from duo_id.distributed.ranks import Ranks
from duo_id.methods.settings import GateSettings, MethodSettings
from duo_id.models.loading import dtype_of, meta_model
from duo_id.step.devices import calculated_costs
from duo_id.step.memory import available
from duo_id.step.recompute import Keep
from duo_id.train.settings import LENGTH_MAX, LENGTH_MIN, LONGEST, RECENT_SIZE, TrainSettings

ROUND = 1000  # tokens that the longest length is a multiple of
SHORTEST_SHARE, WINDOW_SHARE = 8, 32  # the longest sample has so many times the tokens of the shortest, of the window
WINDOW_ROUND = 64  # tokens that the window is a multiple of


def fitted(settings: TrainSettings, automatic: Collection[str], model: PreTrainedModel | None = None) -> TrainSettings:
    """Settings in which the lengths and the window that are `auto` are decided.

    Args:
        settings: of the run.
        automatic: overrides that are `auto`.
        model: the model; None: its shape is looked up.

    Raises:
        UserError: the model cannot be found, reached or built.
    """
    device = training_device(settings) if model is None else model.device
    if model is None:
        model = meta_model(settings.model, dtype_of(settings.model.dtype, device))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    data, method = settings.data, settings.method
    longest = data.length_max or limit or LONGEST
    if LENGTH_MAX in automatic:
        longest = min(limit or LONGEST, LONGEST, _fitting_tokens(settings, model, device) // data.batch_size)
        longest -= longest % ROUND if longest > ROUND else 0
        data = replace(data, length_max=longest, length_min=min(data.length_min, longest))
    if LENGTH_MIN in automatic:
        data = replace(data, length_min=max(longest // SHORTEST_SHARE, 1))
    if RECENT_SIZE in automatic:
        method = _with_window(method, max(round(longest / WINDOW_SHARE / WINDOW_ROUND), 1) * WINDOW_ROUND)
    return replace(settings, data=data, method=method)


def training_device(settings: TrainSettings) -> torch.device:
    """The first device that the trainer's settings choose."""
    uses_gpu = settings.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if uses_gpu else "cpu")


def _with_window(method: MethodSettings, recent_size: int) -> MethodSettings:
    """The method, and the one within it that comes first, with another window."""
    changes: dict[str, Any] = {"recent_size": recent_size}
    for key in ("prior", "start"):
        if isinstance(inner := getattr(method, key, None), MethodSettings):
            changes[key] = _with_window(inner, recent_size)
    return replace(method, **changes)


def _fitting_tokens(settings: TrainSettings, model: PreTrainedModel, device: torch.device) -> int:
    """Tokens of the longest step that fits one device if layers keep as little as they can."""
    method = settings.method
    devices = settings.trainer.get("devices", 1)
    alone = devices == 1 or (isinstance(devices, list) and len(devices) == 1)
    budget = available(settings.step.memory, device) if alone else None  # several must all decide the same
    if budget is None or not isinstance(method, GateSettings):
        return LONGEST * settings.data.batch_size
    costs = calculated_costs(model, Ranks(), device, BLENDS[method.blend].needs_teacher)
    one, none = (costs.plan_for([Keep.INPUT] * len(costs.kept), tokens, budget) for tokens in (ROUND, 0))
    return max(int(none.room / (one.total - none.total) * ROUND), ROUND)
