"""The settings of a resumed run: those that it saved, with the command line's overrides on top."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from duo_id.common.errors import UserError
from duo_id.common.foreign import check_resumed_settings
from duo_id.common.record import SETTINGS, read_settings

SETTING = re.compile(r"(?!hydra\.)\w+(\.\w+)+=")  # an override of a setting within a group
KeyPath = tuple[str, ...]  # keys that lead to a setting


def allow_unknown_keys(arguments: Sequence[str]) -> list[str]:
    """A command line that Hydra can compose whatever method, data or model the resumed run has.

    Hydra applies overrides to the default groups of conf/, which may lack a key that the run's groups have. `++` adds
    it, and `resumed_settings` applies it to the saved settings, whose schema checks it.
    """
    if not any(argument.startswith("resume=") and argument not in ("resume=", "resume=null") for argument in arguments):
        return list(arguments)
    return [f"++{argument}" if SETTING.match(argument) else argument for argument in arguments]


def resumed_settings(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The saved plain settings of the run that `resume` names, except those that the command line overrides.

    A group that is chosen on the command line, such as `data=text`, replaces the saved one. An experiment replaces all
    settings. Settings that the run did not save, being from an earlier version of duo_id, are the command line's.

    Args:
        config: composed from the command line alone.
        overrides: of the command line.

    Raises:
        UserError: the run has no settings, or some that its files are not trusted with.
    """
    folder = Path(config.resume)
    saved, _ = read_settings(folder)
    if not saved:
        raise UserError(f"resume={folder}: there is no {SETTINGS}, as in runs of early versions; leave out resume")
    current: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    settings: dict[str, Any] = current | saved
    overridden = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.package if override.package is not None else override.key_or_group.replace("/", ".")
        path = tuple(key.split("."))
        if path[0] not in current and not override.is_delete():  # an experiment, which applies to all groups
            return current
        overridden.append(path)
        _copy_setting(current, settings, path)
    lr, optimizer_lr = ("method", "lr"), ("method", "optimizer", "lr")
    if lr in overridden and _lookup(saved, optimizer_lr) == _lookup(saved, lr):  # the one interpolates the other
        _copy_setting(current, settings, optimizer_lr)
    settings["resume"] = current["resume"]
    check_resumed_settings(settings, current, str(folder))
    return settings


def _copy_setting(source: Mapping[str, Any], target: dict[str, Any], path: KeyPath) -> None:
    """Copy a setting into `target`, or remove it there if `source` lacks it."""
    *parents, last = path
    for key in parents:
        target[key] = dict(inner) if isinstance(inner := target.get(key), Mapping) else {}
        target = target[key]
    group = _lookup(source, tuple(parents))
    if isinstance(group, Mapping) and last in group:
        target[last] = group[last]
    else:
        target.pop(last, None)


def _lookup(settings: Any, path: KeyPath) -> Any:
    """A setting, or None if it does not exist."""
    for key in path:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings
