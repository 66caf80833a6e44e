"""The settings of a run, recorded in its folder, so that a resumed run keeps them or reports what changed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from duo_id.common.config import shown
from duo_id.common.documents import Data, checked, read_json
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed

SETTINGS = "settings.json"  # in a run folder: its current settings, and those that they replaced
OPEN_GROUPS = (  # settings whose keys are not fixed by a schema: a key on one side only is a difference too
    "model.architecture",
    "model.config",
    "data.mixture",
    "method.optimizer",
    "method.objective",
    "method.penalty",
    "method.prior",
    "method.start",
    "trainer",
)
WEIGHTS = ("data.mixture",)  # groups in which a missing key is a weight of 0: earlier versions had fewer tasks
MAX_SHOWN = 3  # differences in a message


class _Settings(Data):
    """The contents of `SETTINGS`."""

    settings: dict[str, Any]
    before: dict[str, Any]


def keep_settings(folder: Path, settings: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Record the settings that a run uses from now on, and by override the values that earlier parts of it used."""
    write_text(folder / SETTINGS, json.dumps(sealed({"settings": settings, "before": before}), indent=1))


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `keep_settings` recorded; both are empty if there is no such file, as in runs of earlier versions.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}, {}
    try:
        contents = checked(_Settings, read_json(path), path)
    except UserError as error:
        raise UserError(f"resume={folder}: {SETTINGS} cannot be read ({error}); leave out resume") from error
    return contents.settings, contents.before


def recorded_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a pattern was found with, if it records them."""
    return provenance.get("settings") or {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by override: both values, None for one that is missing.

    Settings that only one side has do not count, because another version of duo_id may have written the other side;
    those in `OPEN_GROUPS` do.
    """
    if not before or not now:
        return {}
    old, new = (dict(_leaves(json.loads(json.dumps(settings)))) for settings in (before, now))
    keys = [key for key in old.keys() | new.keys() if (key in old and key in new) or in_groups(key, OPEN_GROUPS)]
    absent = {key: 0 if in_groups(key, WEIGHTS) else None for key in keys}
    values = {key: (old.get(key, absent[key]), new.get(key, absent[key])) for key in sorted(keys)}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def in_groups(key: str, groups: Sequence[str]) -> bool:
    """Whether an override sets one of these groups, or a setting inside one."""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def check_unchanged(changes: Mapping[str, tuple[Any, Any]], subject: str, reason: str) -> None:
    """Raise a `UserError` that names the overrides and both values if there are changes.

    Args:
        changes: from `differences`.
        subject: how the message begins: the earlier run, such as `resume=RUN: it was made`.
        reason: why the changes matter.
    """
    if not changes:
        return
    keys = sorted(changes, key=lambda key: not isinstance(changes[key][0], str))[:MAX_SHOWN]  # names explain numbers
    old, new = (", ".join(f"{key}={shown(changes[key][side])}" for key in keys) for side in (0, 1))
    omitted = f" (and {len(changes) - MAX_SHOWN} more)" if len(changes) > MAX_SHOWN else ""
    raise UserError(
        f"{subject} with {old}, this run has {new}{omitted}, {reason}; "
        "leave out the overrides that changed it, or give the former values"
    )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not key):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif value != {}:
        yield key, value
