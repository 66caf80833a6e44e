"""What Hydra and OmegaConf say of a user's mistake, in one line that names the override."""

import re
import shlex
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import get_method
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig
from omegaconf.errors import ConfigTypeError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from duo_id.common.errors import UserError, first_line, one_line

KINDS: dict[type[Any], str] = {dict: "a mapping, such as {key: value}", list: "a list, such as [value]"}


def explained(error: BaseException) -> str:
    """What is wrong, in one line: where there is one, our own error, which may lie inside an interpolation."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            return one_line(link, None)
    misnamed = _misnamed(chain)
    if misnamed:
        return misnamed
    for link in chain:
        if isinstance(link, OverrideParseException):
            return _unread(link)
        if isinstance(link, MissingMandatoryValue):
            key = link.full_key or str(link).split()[-1]
            return f"{key}: its value is missing, give {key}=VALUE"
        if isinstance(link, ConfigTypeError) and link.object_type in KINDS:
            return f"{one_line(error)}: {link.full_key} is {KINDS[link.object_type]}"
        if isinstance(link, ValidationError) and "is not a ListConfig" in str(link):
            return f"{link.full_key} is {KINDS[list]}"
    if isinstance(error, OmegaConfBaseException):
        reason = first_line(error)
        return f"{error.full_key}: {reason}" if error.full_key else reason
    return one_line(error, None)


def literal(value: Any) -> Any:
    """Plain values such that OmegaConf gives their texts back as they are, whatever `${...}` stands in them."""
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner) for inner in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1]}{found[1]}\\${{", value)
    return value


def check_named(override: str, target: Any) -> None:
    """Raise a `UserError` unless what an override names can be imported; what it needs may still be missing."""
    try:
        get_method(target)
    except Exception as error:  # whatever a module does while it is imported
        raise UserError(f"{override}={target}: there is no such class ({one_line(error)})") from error


def instantiate(group: str, settings: Mapping[str, Any], *args: Any, about: str = "_target_", **others: Any) -> Any:
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
        # Hydra resolves what it is given, and once more when it reads that.
        return hydra_instantiate(literal(literal(settings)), *args, **others)
    except InstantiationException as error:
        reason = error.__cause__ or error
        named = [key for key in settings if re.search(rf"\b{re.escape(key)}\b", str(reason))]
        named = named or [key for key, value in settings.items() if str(reason).endswith(f": {value}")]
        if not named and isinstance(reason, TypeError):  # of numbers that are none, such as `'<=' ... and 'str'`
            odd = {key: value for key, value in settings.items() if not isinstance(value, int | float)}
            named = [
                key for key, value in odd.items() if key != "_target_" and f"'{type(value).__name__}'" in str(reason)
            ]
            named = named or ["_target_"] * bool(
                re.search(r"\(\) (takes|missing) ", str(reason))
            )  # nothing of this kind
        named = named or [about]
        overrides = ", ".join(f"{group}.{key}={settings.get(key)}" for key in named)
        raise UserError(f"{overrides}: {one_line(reason)}") from reason


def no_choice(override: str) -> bool:
    """Whether an override has a value that no group of conf/ can be chosen by, which is no name nor a list of them."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return False
    names = value if isinstance(value, list) else [value]
    return not all(isinstance(name, str) for name in names)


def quoted(override: str) -> str | None:
    """KEY=VALUE as the shell takes it where the value is plain text for Hydra; None: no quotes make it so."""
    key, equals, value = override.partition("=")
    inner = re.sub(r'(\\*)(")', r"\1\1\\\2", value)  # Hydra halves the backslashes before a quote,
    inner = re.sub(r"(\\+)$", r"\1\1", inner)  # so also before its own
    made = f'{key}="{inner}"'
    try:
        read = OverridesParser.create().parse_override(made).value()
    except HydraException:
        return None
    return shlex.quote(made) if equals and isinstance(read, str) and read == value else None


def as_typed(override: str) -> str:
    """KEY=VALUE as one types it in a shell, in quotes where it needs some."""
    try:
        plain = OverridesParser.create().parse_override(override).value() == override.partition("=")[2]
    except HydraException:
        plain = False
    return shlex.quote(override) if plain else quoted(override) or override


def did_you_mean(name: str, choices: Iterable[object]) -> str:
    """The end of a message about an unknown name: the choice that is spelled most like it, if any."""
    close = get_close_matches(name, [str(choice) for choice in choices], 1)
    return f", did you mean {close[0]}?" if close else ""


def _misnamed(chain: list[BaseException]) -> str:
    """What is wrong where an override names no choice of a group, or no setting but nearly one; otherwise empty."""
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file and link.options:
            group, _, choice = link.missing_cfg_file.rpartition("/")
            options = sorted(link.options)
            return f"{group}={choice}: choose one of {', '.join(options)}{did_you_mean(choice, options)}"
        override = re.search(r"^To append to your config use \+(.*)$", str(link), re.MULTILINE)
        if isinstance(link, ConfigCompositionException) and override:
            cause = next((cause for cause in chain if isinstance(cause, OmegaConfBaseException)), None)
            near = _nearest(override[1].partition("=")[0], cause.parent_node if cause else None)
            return f"{override[1]}: there is no such setting, did you mean {near}?" if near else ""
    return ""


def _nearest(key: str, node: Any) -> str:
    """The setting that is spelled most like a dotted key, as far as its first unknown part; empty if none is.

    Args:
        key: as typed.
        node: any part of the config.
    """
    while isinstance(node, DictConfig) and (parent := node._get_parent()) is not None:
        node = parent
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            break
        if part not in node.keys():  # noqa: SIM118  (`in` leaves out those whose value is missing)
            close = get_close_matches(part, [str(name) for name in node], 1)
            return ".".join([*path, *close]) if close else ""
        path, node = [*path, part], node._get_node(part)
    return ""


def _unread(error: OverrideParseException) -> str:
    """An override that Hydra cannot read, with the quotes that its value needs, such as a path with `=` in it."""
    key, _, value = error.override.partition("=")
    reason = first_line(error)
    if value[:1] not in "[{\"'" and (mended := quoted(error.override)):
        return f"{error.override}: the value of {key} needs quotes that Hydra sees: {mended}"
    return f"{error.override}: Hydra cannot read it ({reason})"
