"""Compose a command's settings from Python, as the command line does."""

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError, check
from duo_id.common.mistakes import did_you_mean, explained


def composed(command: str, choices: list[str]) -> DictConfig:
    """conf/`command`.yaml with groups chosen, also inside another application of Hydra.

    Raises:
        UserError: there is no such choice.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose(command, choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explained(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def check_choice(argument: str, name: Any, group: str) -> None:
    """Raise a `UserError` unless conf/GROUP has a file of that name.

    Args:
        argument: what the name was given as.
        name: of the file, without its suffix.
        group: such as `method`.
    """
    choices = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    check(name in choices, f"{argument}={name!r}: choose one of {', '.join(choices)}{did_you_mean(str(name), choices)}")


def override(config: DictConfig, values: Mapping[str, Any]) -> None:
    """Set values by their dotted names; those that are unknown are refused where the settings are parsed.

    Raises:
        UserError: there is no such group or setting at the top.
    """
    names = {str(key) for key in config}  # `in` leaves out those whose value is missing
    for key, value in values.items():
        check(key.partition(".")[0] in names, f"{key}: there is no such argument or setting")
        OmegaConf.update(config, key, value, merge=False, force_add=True)
