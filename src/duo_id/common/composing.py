"""Compose a command's settings from Python, as the command line does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError, check, one_line
from duo_id.common.mistakes import describe_error, did_you_mean


def compose(command: str, choices: list[str]) -> DictConfig:
    """conf/`command`.yaml with the chosen groups; also works inside another Hydra application.

    Raises:
        UserError: a choice does not exist.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose(command, choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(describe_error(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def check_choice(argument: str, name: Any, group: str) -> None:
    """Raise a `UserError` unless conf/GROUP has a file of that name.

    Args:
        argument: the argument that the name was passed as.
        name: of the file, without its suffix.
        group: such as `method`.
    """
    choices = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    check(name in choices, f"{argument}={name!r}: choose one of {', '.join(choices)}{did_you_mean(str(name), choices)}")


def override(config: DictConfig, values: Mapping[str, Any]) -> None:
    """Set values by their dotted names; unknown names within a group are refused when the settings are parsed.

    Raises:
        UserError: a name's first part is no group or setting.
    """
    names = {str(key) for key in config}  # `in` is false for those whose value is missing
    for key, value in values.items():
        check(key.partition(".")[0] in names, f"{key}: there is no such argument or setting")
        try:
            OmegaConf.update(config, key, _plain(value), merge=False, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(f"{key}: a {type(value).__name__} cannot be a setting ({one_line(error)})") from error


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, ranges and paths as the values that files hold."""
    if isinstance(value, range):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value
