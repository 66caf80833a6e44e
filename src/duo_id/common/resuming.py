"""What a run that is gone on with is asked for: the settings that it saved, with today's overrides on top."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from duo_id.common.errors import UserError
from duo_id.common.foreign import check_resumed
from duo_id.common.record import SETTINGS, read_settings

SETTING = re.compile(r"(?!hydra\.)\w+(\.\w+)+=")  # an override of a setting within a group
Place = tuple[str, ...]  # keys that lead to a setting


def open_to_any(arguments: Sequence[str]) -> list[str]:
    """A command line that Hydra composes whatever the resumed run's method, data or model is.

    Hydra lays overrides over the groups of conf/ that are chosen by default, which may not have a key that the run's
    own have. `++` adds it; `resumed` takes it to the saved settings, whose schema knows which keys there are.
    """
    if not any(argument.startswith("resume=") and argument not in ("resume=", "resume=null") for argument in arguments):
        return list(arguments)
    return [f"++{argument}" if SETTING.match(argument) else argument for argument in arguments]


def resumed(typed: DictConfig, given: Sequence[str]) -> dict[str, Any]:
    """The plain settings of the run that `resume` names, but for those that are given anew.

    A group that is chosen anew, such as `data=text`, is taken as a whole. An experiment stands for all settings.
    Settings that only this version of duo_id knows are today's.

    Args:
        typed: composed from the command line alone.
        given: its overrides.

    Raises:
        UserError: the run has no settings, or such as its files may not decide.
    """
    folder = Path(typed.resume)
    saved, _ = read_settings(folder)
    if not saved:
        raise UserError(f"resume={folder}: there is no {SETTINGS}, as in runs of early versions; leave out resume")
    today: dict[str, Any] = OmegaConf.to_container(typed, resolve=True)  # type: ignore[assignment]
    found: dict[str, Any] = today | saved
    places = []
    for override in OverridesParser.create().parse_overrides(list(given)):
        key = override.package if override.package is not None else override.key_or_group.replace("/", ".")
        place = tuple(key.split("."))
        if place[0] not in today and not override.is_delete():  # an experiment is laid over all groups
            return today
        places.append(place)
        _take(found, today, place)
    if ("method", "lr") in places and _at(saved, ("method", "optimizer", "lr")) == _at(saved, ("method", "lr")):
        _take(found, today, ("method", "optimizer", "lr"))  # which follows it in conf/method/
    found["resume"] = today["resume"]
    check_resumed(found, today, str(folder))
    return found


def _take(found: dict[str, Any], today: Mapping[str, Any], place: Place) -> None:
    """Let a setting be what it is today, or not be there."""
    *path, last = place
    for key in path:
        found[key] = dict(inner) if isinstance(inner := found.get(key), Mapping) else {}
        found = found[key]
    parent = _at(today, tuple(path))
    if isinstance(parent, Mapping) and last in parent:
        found[last] = parent[last]
    else:
        found.pop(last, None)


def _at(settings: Any, place: Place) -> Any:
    """A setting, None where there is none."""
    for key in place:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings
