"""What a checkpoint may say: only what has the form of what this run would write, which is all that is restored of it.

Lightning restores whatever it finds: attributes of its loops, paths that callbacks remove later, steps of optimizers.
"""

import copy
import traceback
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, Timer
from lightning.pytorch.trainer.connectors import checkpoint_connector
from pydantic import Field

from duo_id.common.documents import Data, Line, checked
from duo_id.common.documents import Natural as Count
from duo_id.common.documents import NonNegative as Positive
from duo_id.common.documents import excerpt as shown
from duo_id.common.errors import UserError, check, one_line
from duo_id.common.foreign import walk

MOST = 2**53  # of a count
One = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
Plain = None | bool | int | float | str


class _Checkpoint(Data):
    """What Lightning and we read of a checkpoint before anything is known of the run."""

    version: Annotated[Line, Field(alias="pytorch-lightning_version", pattern=r"^[2-9]\d{0,3}(\.\d{1,6}){1,3}")]
    epoch: Count
    global_step: Count
    state_dict: dict[str, Any]
    loops: dict[str, Any]
    callbacks: dict[str, Any] = Field(default_factory=dict)
    optimizer_states: One
    lr_schedulers: One


class _Position(Data):
    position: Count
    global_step: Count
    seed: int


class _Clock(Data):
    time_elapsed: dict[str, Positive]


def misfit(path: str | Path | None, reason: object) -> UserError:
    """The error of a checkpoint that cannot be gone on from."""
    return UserError(
        f"resume: {path or 'the checkpoint'} does not fit this run ({one_line(reason)}): remove it to train from the "
        "start"
    )


def check_form(checkpoint: Any, path: str | Path) -> None:
    """Raise a `UserError` unless what was read has the parts of a checkpoint."""
    try:
        checked(_Checkpoint, checkpoint, "it")
        if not all(isinstance(one, Plain) for _, one in walk(checkpoint.get("duo_id"))):
            raise UserError("duo_id holds more than plain values")
    except UserError as error:
        raise misfit(path, error) from None


def keep_fitting(checkpoint: dict[str, Any], training: lightning.LightningModule) -> None:
    """Leave of a checkpoint what `training`, which is about to be restored from it, has a place for.

    Raises:
        UserError: something is lacking, or has another type, shape or range than what this run writes.
    """
    trainer = training.trainer
    try:
        step = checkpoint["global_step"]
        checkpoint["state_dict"] = _alike(checkpoint["state_dict"], training.state_dict(), "state_dict", finite=True)
        checkpoint["callbacks"] = dict(_states(trainer.callbacks, checkpoint.get("callbacks") or {}))  # type: ignore[attr-defined]
        loop = _alike(checkpoint["loops"].get("fit_loop"), trainer.fit_loop.state_dict(), "loops.fit_loop")
        checkpoint["loops"] = {"fit_loop": loop}
        progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        check(progress["completed"] == step, f"global_step={step}, where loops have {progress['completed']} steps")
        _keep_optimizer(checkpoint, training.configure_optimizers(), step)
        if (data := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            key = type(data).__qualname__
            found = checked(_Position, checkpoint.get(key), "it", under=key)
            check(found.global_step == step, f"global_step={step}, where {key} has {found.global_step}")
    except UserError as error:
        raise misfit(trainer.ckpt_path, error) from None


def while_restoring(error: Exception) -> bool:
    """Whether Lightning raised this while it restored a checkpoint."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_globals.get("__name__") == checkpoint_connector.__name__
        and frame.f_code.co_name.startswith(("restore", "resume", "_restore"))
        for frame in frames
    )


def _alike(found: Any, ours: Any, place: str, finite: bool = False, counts: bool = False) -> Any:
    """What was found, as far as ours has a place for it.

    Args:
        found: plain values and tensors.
        ours: what this run would write now.
        place: of both, for messages.
        finite: tensors hold numbers.
        counts: tensors of one number hold counts, or what else is not negative.

    Raises:
        UserError: a key is lacking, or has another type, shape or range.
    """
    if isinstance(ours, torch.Tensor):
        fits = isinstance(found, torch.Tensor) and found.layout == torch.strided and not found.is_meta
        fits = fits and (found.shape, found.dtype) == (ours.shape, ours.dtype)
        check(fits, f"{place} is no tensor of {ours.dtype}, {list(ours.shape)}")
        whole = found.isfinite().all() if finite or (counts and not found.ndim) else True
        check(bool(whole), f"{place} holds what is no number")
        check(not counts or found.ndim > 0 or bool(found >= 0), f"{place} is negative")
        return found
    if isinstance(ours, Mapping):
        check(isinstance(found, Mapping), f"{place} is no mapping")
        for key in ours:
            check(key in found, f"{place} lacks {key}")
        return {key: _alike(found[key], one, f"{place}.{key}", finite, counts) for key, one in ours.items()}
    check(type(found) is type(ours), f"{place}={shown(found)} is not of type {type(ours).__name__}")
    if isinstance(ours, list | tuple):
        check(len(found) == len(ours), f"{place} has {len(found)} values, not {len(ours)}")
        both = zip(found, ours, strict=True)
        return type(ours)([_alike(one, other, f"{place}.{at}", finite, counts) for at, (one, other) in enumerate(both)])
    if isinstance(ours, int) and not isinstance(ours, bool):
        check(0 <= found <= MOST, f"{place}={shown(found)} is no count")
    elif isinstance(ours, float):
        check(isfinite(found), f"{place}={found} is no number")
    return found


def _keep_optimizer(checkpoint: dict[str, Any], made: Any, step: int) -> None:
    """Take the state of each gate, the learning rates and the place in their schedule; the rest is this run's own."""
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    place, found = "optimizer_states.0", checkpoint["optimizer_states"][0]
    schedule, groups = scheduler.state_dict(), optimizer.state_dict()["param_groups"]
    told = found.get("param_groups")
    check(isinstance(told, list) and len(told) == len(groups), f"{place}.param_groups has no {len(groups)} values")
    for at, (group, ours) in enumerate(zip(told, groups, strict=True)):
        where = f"{place}.param_groups.{at}"
        check(isinstance(group, Mapping), f"{where} is no mapping")
        for key, value in ours.items():
            if key != "lr" and key in group:
                same = type(group[key]) is type(value) and group[key] == value
                check(same, f"{where}.{key}={shown(group[key])}, this run has {shown(value)}")
        lr = group.get("lr")
        check(isinstance(lr, float) and 0 <= lr < float("inf"), f"{where}.lr={shown(lr)} is no learning rate")
        ours["lr"] = lr
    states = found.get("state")
    if isinstance(optimizer, torch.optim.LBFGS):  # whose lists grow
        check(_numbers(states), f"{place}.state holds more than numbers")
    else:
        ours = _first_states(optimizer) if step else optimizer.state_dict()["state"]
        states = _alike(states, ours, f"{place}.state", counts=True)
    checkpoint["optimizer_states"] = [{"state": states, "param_groups": groups}]

    told = _alike(checkpoint["lr_schedulers"][0], schedule, "lr_schedulers.0")
    check(told["last_epoch"] == step, f"global_step={step}, where lr_schedulers.0 has {told['last_epoch']}")
    rates = [group["lr"] for group in groups]
    checkpoint["lr_schedulers"] = [
        schedule | {"last_epoch": step, "_step_count": step + 1, "_is_initial": False, "_last_lr": rates}
    ]


def _first_states(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """What an optimizer keeps of each parameter, as it is after a step of a copy."""
    copied = copy.deepcopy(optimizer)
    for group in copied.param_groups:
        group |= {key: False for key in ("capturable", "fused", "foreach", "differentiable") if key in group}
        for one in group["params"]:
            one.grad = torch.ones_like(one)
    copied.step()
    return copied.state_dict()["state"]


def _states(callbacks: Iterable[Callback], found: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The states of these callbacks that are numbers; those of checkpoints are paths, which would be removed later."""
    for callback in callbacks:
        key = callback.state_key
        if key not in found or isinstance(callback, Checkpoint):
            continue
        state, place = found[key], f"callbacks.{key}"
        check(isinstance(state, Mapping), f"{place} is no mapping")
        if type(callback) is Timer:
            yield key, checked(_Clock, state, "it", under=place).model_dump()
        elif type(callback) is EarlyStopping:
            ours = callback.state_dict()
            ours = {name: one for name, one in ours.items() if name in state and name != "stopping_reason_message"}
            yield key, _alike(state, ours, place)
        else:
            check(_numbers(state), f"{place} holds more than numbers")
            yield key, state


def _numbers(state: Any) -> bool:
    leaves = (one for _, one in walk(state))
    return isinstance(state, Mapping) and all(
        isinstance(one, None | bool | int | float | torch.Tensor) for one in leaves
    )
