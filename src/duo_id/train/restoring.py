"""Sanitise a checkpoint: only what has the structure of this run's own checkpoints is restored.

Lightning restores whatever a file holds: attributes of its loops, paths that callbacks delete later, optimizer steps.
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

from duo_id.common.documents import Data, Line, Natural, NonNegative, checked, excerpt
from duo_id.common.errors import UserError, check, one_line
from duo_id.common.foreign import walk

MAX_COUNT = 2**53
SingleState = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
Plain = None | bool | int | float | str


class _Checkpoint(Data):
    """The parts of a checkpoint that are read before the run is known."""

    version: Annotated[Line, Field(alias="pytorch-lightning_version", pattern=r"^[2-9]\d{0,3}(\.\d{1,6}){1,3}")]
    epoch: Natural
    global_step: Natural
    state_dict: dict[str, Any]
    loops: dict[str, Any]
    callbacks: dict[str, Any] = Field(default_factory=dict)
    optimizer_states: SingleState
    lr_schedulers: SingleState


class _Position(Data):
    position: Natural
    global_step: Natural
    seed: int


class _TimerState(Data):
    time_elapsed: dict[str, NonNegative]


def checkpoint_error(path: str | Path | None, reason: object) -> UserError:
    """The error for a checkpoint that this run cannot be resumed from."""
    return UserError(
        f"resume: {path or 'the checkpoint'} does not fit this run ({one_line(reason)}): remove it to train from the "
        "start"
    )


def check_structure(checkpoint: Any, path: str | Path) -> None:
    """Raise a `UserError` unless the file's content has the parts of a checkpoint."""
    try:
        checked(_Checkpoint, checkpoint, "it")
        if not all(isinstance(leaf, Plain) for _, leaf in walk(checkpoint.get("duo_id"))):
            raise UserError("duo_id holds more than plain values")
    except UserError as error:
        raise checkpoint_error(path, error) from None


def keep_matching(checkpoint: dict[str, Any], training: lightning.LightningModule) -> None:
    """Reduce a checkpoint to what matches the state of `training`, which is about to be restored from it.

    Raises:
        UserError: something is missing, or differs in type, shape or range from what this run writes.
    """
    trainer = training.trainer
    try:
        step = checkpoint["global_step"]
        checkpoint["state_dict"] = _matching(checkpoint["state_dict"], training.state_dict(), "state_dict", finite=True)
        checkpoint["callbacks"] = dict(_callback_states(trainer.callbacks, checkpoint.get("callbacks") or {}))  # type: ignore[attr-defined]
        loop = _matching(checkpoint["loops"].get("fit_loop"), trainer.fit_loop.state_dict(), "loops.fit_loop")
        checkpoint["loops"] = {"fit_loop": loop}
        progress = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        check(progress["completed"] == step, f"global_step={step}, where loops have {progress['completed']} steps")
        _keep_optimizer(checkpoint, training.configure_optimizers(), step)
        if (data := trainer.datamodule) is not None:  # type: ignore[attr-defined]
            key = type(data).__qualname__
            position = checked(_Position, checkpoint.get(key), "it", under=key)
            check(position.global_step == step, f"global_step={step}, where {key} has {position.global_step}")
    except UserError as error:
        raise checkpoint_error(trainer.ckpt_path, error) from None


def raised_while_restoring(error: Exception) -> bool:
    """Whether Lightning raised this while it restored a checkpoint."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_globals.get("__name__") == checkpoint_connector.__name__
        and frame.f_code.co_name.startswith(("restore", "resume", "_restore"))
        for frame in frames
    )


def _matching(saved: Any, current: Any, path: str, finite: bool = False, counts: bool = False) -> Any:
    """The part of a saved state that matches the structure of the current one.

    Args:
        saved: plain values and tensors.
        current: the state that this run would write now.
        path: of both, for messages.
        finite: tensors must be finite.
        counts: scalar tensors must be finite and not negative, such as counts.

    Raises:
        UserError: a key is missing, or differs in type, shape or range.
    """
    if isinstance(current, torch.Tensor):
        fits = isinstance(saved, torch.Tensor) and saved.layout == torch.strided and not saved.is_meta
        fits = fits and (saved.shape, saved.dtype) == (current.shape, current.dtype)
        check(fits, f"{path} is not a tensor of {current.dtype}, {list(current.shape)}")
        is_finite = saved.isfinite().all() if finite or (counts and not saved.ndim) else True
        check(bool(is_finite), f"{path} holds values that are not finite")
        check(not counts or saved.ndim > 0 or bool(saved >= 0), f"{path} is negative")
        return saved
    if isinstance(current, Mapping):
        check(isinstance(saved, Mapping), f"{path} is not a mapping")
        for key in current:
            check(key in saved, f"{path} lacks {key}")
        return {key: _matching(saved[key], value, f"{path}.{key}", finite, counts) for key, value in current.items()}
    check(type(saved) is type(current), f"{path}={excerpt(saved)} is not of type {type(current).__name__}")
    if isinstance(current, list | tuple):
        check(len(saved) == len(current), f"{path} has {len(saved)} values, not {len(current)}")
        pairs = enumerate(zip(saved, current, strict=True))
        return type(current)([_matching(*pair, f"{path}.{index}", finite, counts) for index, pair in pairs])
    if isinstance(current, int) and not isinstance(current, bool):
        check(0 <= saved <= MAX_COUNT, f"{path}={excerpt(saved)} is not a count")
    elif isinstance(current, float):
        check(isfinite(saved), f"{path}={saved} is not finite")
    return saved


def _keep_optimizer(checkpoint: dict[str, Any], configured: Any, step: int) -> None:
    """Take the optimizer's state, the learning rates and the position in their schedule; the rest is this run's."""
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    path, saved = "optimizer_states.0", checkpoint["optimizer_states"][0]
    schedule, groups = scheduler.state_dict(), optimizer.state_dict()["param_groups"]
    saved_groups = saved.get("param_groups")
    check(
        isinstance(saved_groups, list) and len(saved_groups) == len(groups),
        f"{path}.param_groups has no {len(groups)} values",
    )
    for index, (group, own_group) in enumerate(zip(saved_groups, groups, strict=True)):
        group_path = f"{path}.param_groups.{index}"
        check(isinstance(group, Mapping), f"{group_path} is not a mapping")
        for key, value in own_group.items():
            if key != "lr" and key in group:
                same = type(group[key]) is type(value) and group[key] == value
                check(same, f"{group_path}.{key}={excerpt(group[key])}, this run has {excerpt(value)}")
        lr = group.get("lr")
        check(isinstance(lr, float) and 0 <= lr < float("inf"), f"{group_path}.lr={excerpt(lr)} is not a learning rate")
        own_group["lr"] = lr
    states = saved.get("state")
    if isinstance(optimizer, torch.optim.LBFGS):  # its lists grow
        check(_is_numeric(states), f"{path}.state holds more than numbers")
    else:
        own_states = _first_states(optimizer) if step else optimizer.state_dict()["state"]
        states = _matching(states, own_states, f"{path}.state", counts=True)
    checkpoint["optimizer_states"] = [{"state": states, "param_groups": groups}]

    last_epoch = _matching(checkpoint["lr_schedulers"][0], schedule, "lr_schedulers.0")["last_epoch"]
    check(last_epoch == step, f"global_step={step}, where lr_schedulers.0 has {last_epoch}")
    rates = [group["lr"] for group in groups]
    checkpoint["lr_schedulers"] = [
        schedule | {"last_epoch": step, "_step_count": step + 1, "_is_initial": False, "_last_lr": rates}
    ]


def _first_states(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """An optimizer's state of each parameter, from one step of a copy."""
    copied = copy.deepcopy(optimizer)
    for group in copied.param_groups:
        group |= {key: False for key in ("capturable", "fused", "foreach", "differentiable") if key in group}
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    copied.step()
    return copied.state_dict()["state"]


def _callback_states(callbacks: Iterable[Callback], saved: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The callbacks' states that hold only numbers; those of checkpoint callbacks are paths that they would delete."""
    for callback in callbacks:
        key = callback.state_key
        if key not in saved or isinstance(callback, Checkpoint):
            continue
        state, path = saved[key], f"callbacks.{key}"
        check(isinstance(state, Mapping), f"{path} is not a mapping")
        if type(callback) is Timer:
            yield key, checked(_TimerState, state, "it", under=path).model_dump()
        elif type(callback) is EarlyStopping:
            current = callback.state_dict()
            current = {
                name: value for name, value in current.items() if name in state and name != "stopping_reason_message"
            }
            yield key, _matching(state, current, path)
        else:
            check(_is_numeric(state), f"{path} holds more than numbers")
            yield key, state


def _is_numeric(state: Any) -> bool:
    leaves = (leaf for _, leaf in walk(state))
    return isinstance(state, Mapping) and all(
        isinstance(leaf, None | bool | int | float | torch.Tensor) for leaf in leaves
    )
