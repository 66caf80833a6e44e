"""What a run was made with, kept in its folder: a resumed one goes on under the same, or says what it cannot honour."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from duo_id.common.config import shown
from duo_id.common.documents import Data, checked, read_json
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed

SETTINGS = "settings.json"  # in a run folder: its typed settings, and those that earlier parts of it had
OPEN = (  # settings whose keys are not fixed, so that one that only one side has is a difference too
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
SHOWN = 3  # differences in a message


class _Settings(Data):
    """What `SETTINGS` holds."""

    settings: dict[str, Any]
    before: dict[str, Any]


def keep_settings(folder: Path, settings: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Leave in a run folder the settings that it goes on with, and what earlier parts had instead, by override."""
    write_text(folder / SETTINGS, json.dumps(sealed({"settings": settings, "before": before}), indent=1))


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `keep_settings` left, both empty where there is no such file, as in runs of earlier versions.

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


def told_settings(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a pattern says it was found with, if it does."""
    return provenance.get("settings") or {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by override: both values, None for one that a side lacks.

    A setting that only one side knows, because another version of duo_id wrote the other, does not count.
    """
    if not before or not now:
        return {}
    one, other = (dict(_leaves(json.loads(json.dumps(side)))) for side in (before, now))
    keys = [key for key in one.keys() | other.keys() if (key in one and key in other) or within(key, OPEN)]
    return {key: (one.get(key), other.get(key)) for key in sorted(keys) if one.get(key) != other.get(key)}


def within(key: str, groups: Sequence[str]) -> bool:
    """Whether an override is one of these groups, or of a setting inside."""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def check_honoured(found: Mapping[str, tuple[Any, Any]], told: str, why: str) -> None:
    """Raise a `UserError` that names the overrides and both values, unless there is no difference.

    Args:
        found: what differs.
        told: which run, and how it came about, such as `resume=RUN: it was made`.
        why: it matters.
    """
    if not found:
        return
    keys = sorted(found, key=lambda key: not isinstance(found[key][0], str))[:SHOWN]  # names explain numbers
    theirs, ours = (", ".join(f"{key}={shown(found[key][side])}" for key in keys) for side in (0, 1))
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    raise UserError(
        f"{told} with {theirs}, this run has {ours}{more}, {why}; leave out what changed that, or give the former again"
    )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not key):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif value != {}:
        yield key, value
