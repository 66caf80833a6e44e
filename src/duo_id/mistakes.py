"""What Hydra and OmegaConf say of a user's mistake, in one line that names the override."""

import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf.errors import ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from duo_id.errors import UserError

KINDS: dict[type[Any], str] = {dict: "a mapping, such as {key: value}", list: "a list, such as [value]"}


def explained(error: BaseException) -> str:
    """What is wrong, in one line: where there is one, our own error, which may lie inside an interpolation."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            return _joined(link)
    for link in chain:
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key}: its value is missing, give {link.full_key}=VALUE"
        if isinstance(link, ConfigTypeError) and link.object_type in KINDS:
            return f"{_joined(error)}: {link.full_key} is {KINDS[link.object_type]}"
        if isinstance(link, ValidationError) and "is not a ListConfig" in str(link):
            return f"{link.full_key} is {KINDS[list]}"
    if isinstance(error, OmegaConfBaseException):
        reason = str(error).splitlines()[0]
        return f"{error.full_key}: {reason}" if error.full_key else reason
    return _joined(error)


def built(group: str, settings: Mapping[str, Any], *args: Any, about: str = "_target_", **others: Any) -> Any:
    """The object that a group of settings describes: its `_target_`, called with them.

    Args:
        group: where the settings are in the config.
        settings: `_target_` and arguments.
        args: arguments by position.
        about: the setting that an error is put down to where it names none.
        others: arguments that are no settings.

    Raises:
        UserError: it cannot be made; the message has the overrides of the settings that the error names.
    """
    try:
        return instantiate(settings, *args, **others)
    except InstantiationException as error:
        reason = error.__cause__ or error
        named = [key for key in settings if re.search(rf"\b{re.escape(key)}\b", str(reason))] or [about]
        overrides = ", ".join(f"{group}.{key}={settings.get(key)}" for key in named)
        raise UserError(f"{overrides}: {_joined(reason)}") from reason


def _joined(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
