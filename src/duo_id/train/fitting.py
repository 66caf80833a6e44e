"""From a composed config to the settings of a run; what is `auto` is decided by what model and device can take.

What imports torch is imported last, so that mistakes are answered at once.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from duo_id.common.config import parse, resolve
from duo_id.common.errors import check
from duo_id.common.mistakes import check_importable
from duo_id.methods.settings import GateSettings, MethodSettings, make_optimizer, method_settings
from duo_id.train.settings import TrainSettings
from duo_id.train.trainer import TrainerSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LENGTH_MIN, LENGTH_MAX, RECENT_SIZE = "data.length_min", "data.length_max", "method.recent_size"
HAYSTACK, MAX_STEPS = "data.haystack.source", "trainer.max_steps"
LONGEST = 32000  # tokens of data.length_max=auto at most: attention's time grows with their square
STEPS, FEWER_STEPS = 400, 200  # with long samples half of them find heads as good (docs/lab/log.md)
AUTOMATIC: dict[str, Any] = {  # may be `auto`; what is checked meanwhile
    LENGTH_MIN: LONGEST // 8,
    LENGTH_MAX: LONGEST,
    RECENT_SIZE: 1,
    HAYSTACK: "embedded",
    MAX_STEPS: STEPS,
}
EMBEDDED = 12000  # tokens of the longest sample that each part of the embedded text is long enough for
LONG = 12000  # tokens of the longest sample from which on fewer steps suffice
ROUND = 1000  # tokens that the longest length is a multiple of
SHORTEST = 1000  # tokens that the shortest sample has if the longest does: ten passkeys of 16 words need over 600
SHORTEST_SHARE, WINDOW_SHARE = 8, 32  # the longest sample has so many times the tokens of the shortest, of the window
WINDOW_ROUND = 64  # tokens that the window is a multiple of


def train_settings(config: DictConfig | Mapping[str, Any], model: "PreTrainedModel | None" = None) -> TrainSettings:
    """The typed settings of a training run, including its method's; what is `auto` is decided.

    Args:
        config: composed, or plain values.
        model: the model; None: the one that the settings name.

    Raises:
        UserError: as `parse`, or the model cannot be found.
    """
    values, automatic = _with_values(resolve(config))
    values["method"] = method_settings(values.get("method", {}))
    settings = parse(TrainSettings, values)
    check(
        isinstance(settings.method, GateSettings) or not settings.trainer.get("callbacks"),
        f"trainer.callbacks: method={settings.method.name} trains nothing, so they would never be called",
    )
    check(
        settings.repeats == 1 or getattr(settings.method, "swap_at", None) is None,
        f"repeats={settings.repeats}: method.swap_at refines the mask of one run, which averaging several would undo",
    )
    _check_imported(settings)
    return fitted(settings, automatic, model) if automatic else settings


def _with_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of plain values with numbers for what is `auto`, so that all else is checked first; and what is `auto`."""
    copied, automatic = deepcopy(dict(values)), []
    for override, value in AUTOMATIC.items():
        *groups, key = override.split(".")
        group: Any = copied
        for name in groups:
            group = group.get(name) if isinstance(group, dict) else None
        if isinstance(group, dict) and group.get(key) == "auto":
            group[key] = value
            automatic.append(override)
    if LENGTH_MIN in automatic and isinstance(longest := copied["data"].get("length_max"), int):
        copied["data"]["length_min"] = max(min(AUTOMATIC[LENGTH_MIN], longest), 1)
    return copied, automatic


def _check_imported(settings: TrainSettings) -> None:
    """Create the optimizer and import the loggers: they fail now, not after loading a model."""
    if isinstance(settings.method, GateSettings):
        import torch

        make_optimizer(settings.method, [torch.nn.Parameter(torch.zeros(1))])
    for name, logger in settings.logger.items():
        check_importable(f"logger.{name}._target_", (logger or {}).get("_target_"))


def fitted(
    settings: TrainSettings, automatic: Collection[str], model: "PreTrainedModel | None" = None
) -> TrainSettings:
    """Settings in which the lengths, the window, the text and the steps that are `auto` are decided.

    Args:
        settings: of the run.
        automatic: overrides that are `auto`.
        model: the model; None: its shape is looked up.

    Raises:
        UserError: the model cannot be found, reached or built.
    """
    from duo_id.models.loading import sized_model

    device = _training_device(settings) if model is None else model.device
    if model is None:
        model = sized_model(settings.model, device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    data, method = settings.data, settings.method
    longest = data.length_max or limit or LONGEST
    if LENGTH_MAX in automatic:
        longest = min(limit or LONGEST, LONGEST, _fitting_tokens(settings, model, device) // data.batch_size)
        longest -= longest % ROUND if longest > ROUND else 0
        check(
            LENGTH_MIN in automatic or data.length_min <= longest,
            f"data.length_min={data.length_min} exceeds the {longest} tokens that model and memory take: lower it",
        )
        data = replace(data, length_max=longest, length_min=min(data.length_min, longest))
    if RECENT_SIZE in automatic:
        method = _with_window(method, max(round(longest / WINDOW_SHARE / WINDOW_ROUND), 1) * WINDOW_ROUND)
    if LENGTH_MIN in automatic:
        window = method.sink_size + method.recent_size
        data = replace(data, length_min=min(max(longest // SHORTEST_SHARE, 2 * window, SHORTEST), longest))
    if HAYSTACK in automatic and longest > EMBEDDED:
        data = replace(data, haystack=replace(data.haystack, source="packages"))
    trainer = settings.trainer
    if MAX_STEPS in automatic and longest > LONG:
        trainer = TrainerSettings(**trainer | {"max_steps": FEWER_STEPS})
    return replace(settings, data=data, method=method, trainer=trainer)


def _training_device(settings: TrainSettings) -> "torch.device":
    """The first device that the trainer's settings choose."""
    import torch

    uses_gpu = settings.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if uses_gpu else "cpu")


def _with_window(method: MethodSettings, recent_size: int) -> MethodSettings:
    """The method, and the one within it that comes first, with another window."""
    changes: dict[str, Any] = {"recent_size": recent_size}
    for key in ("prior", "start"):
        if isinstance(inner := getattr(method, key, None), MethodSettings):
            changes[key] = _with_window(inner, recent_size)
    return replace(method, **changes)


def _fitting_tokens(settings: TrainSettings, model: "PreTrainedModel", device: "torch.device") -> int:
    """Tokens of the longest step that fits one device if layers keep as little as they can."""
    from duo_id.attention.blends import BLENDS
    from duo_id.distributed.ranks import Ranks
    from duo_id.step.devices import calculated_costs
    from duo_id.step.memory import available
    from duo_id.step.recompute import Keep

    method = settings.method
    devices = settings.trainer.get("devices", 1)
    alone = devices == 1 or (isinstance(devices, list) and len(devices) == 1)
    budget = available(settings.step.memory, device) if alone else None  # several must all decide the same
    if budget is None or not isinstance(method, GateSettings):
        return LONGEST * settings.data.batch_size
    costs = calculated_costs(model, Ranks(), device, BLENDS[method.blend].needs_teacher)
    one, none = (costs.plan_for([Keep.INPUT] * len(costs.kept), tokens, budget) for tokens in (ROUND, 0))
    return max(int(none.room / (one.total - none.total) * ROUND), ROUND)
