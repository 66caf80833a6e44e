"""One-line messages that name the override, from the errors of Hydra and OmegaConf."""

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

from duo_id.common.errors import EXTRAS, UserError, first_line, one_line

OPTIONS = (  # of Hydra
    "--help -h --hydra-help --version --cfg -c --resolve --package -p --run -r --multirun -m --shell-completion -sc "
    "--config-path -cp --config-name -cn --config-dir -cd --experimental-rerun --info -i"
).split()
OPEN = (  # groups that take keys which conf/ does not list
    "trainer",
    "logger",
    "model.config",
    "model.architecture",
    "method.optimizer",
    "method.objective",
    "method.penalty",
    "data.mixture",
    "patterns",
    "hydra",
)
KINDS: dict[type[Any], str] = {dict: "a mapping, such as {key: value}", list: "a list, such as [value]"}


def describe_error(error: BaseException) -> str:
    """An error in one line: that of a `UserError` in its chain of causes, as one from an interpolation has, if any."""
    chain = _chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return one_line(link, None)
    misnamed = _misnamed(chain)
    if misnamed:
        return misnamed
    for link in chain:
        if isinstance(link, OverrideParseException):
            return _describe_syntax_error(link)
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


def check_options(arguments: Iterable[str]) -> None:
    """Raise a `UserError` for an option that Hydra does not have, which it would answer with a page about itself."""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option.startswith("-") and option not in OPTIONS:
            key = option.strip("-") or "KEY"
            raise UserError(f"{argument}: there is no such option, settings are given as {key}={value or 'VALUE'}")


def escape_interpolations(value: Any) -> Any:
    """Plain values whose strings OmegaConf reads verbatim, with every `${...}` escaped."""
    if isinstance(value, Mapping):
        return {key: escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escape_interpolations(inner) for inner in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1]}{match[1]}\\${{", value)
    return value


def check_importable(override: str, target: Any) -> None:
    """Raise a `UserError` unless the class or function that an override names can be imported."""
    missing: ModuleNotFoundError | None = None
    try:
        get_method(target)
    except Exception as error:  # importing a module can raise anything
        for cause in _chain(error):
            if isinstance(cause, ModuleNotFoundError) and cause.name in EXTRAS:
                missing = cause
        if missing is None:
            raise UserError(f"{override}={target}: there is no such class ({one_line(error)})") from error
    if missing is not None:
        raise missing  # the command names the extra


def instantiate(
    group: str, settings: Mapping[str, Any], *args: Any, default_key: str = "_target_", **others: Any
) -> Any:
    """The object that a group of settings describes: its `_target_`, called with them.

    Args:
        group: key of the settings in the config.
        settings: `_target_` and arguments.
        args: positional arguments.
        default_key: the setting to name if the error names none.
        others: keyword arguments that are not settings.

    Raises:
        UserError: it cannot be created; the message begins with the overrides that the error is about.
    """
    try:
        # Hydra resolves interpolations twice: in its arguments, and when it makes a config of them.
        return hydra_instantiate(escape_interpolations(escape_interpolations(settings)), *args, **others)
    except InstantiationException as error:
        reason = error.__cause__ or error
        text = str(reason)
        keys = [key for key in settings if re.search(rf"\b{re.escape(key)}\b", text)]
        keys = keys or [key for key, value in settings.items() if text.endswith(f": {value}")]
        if not keys and isinstance(reason, TypeError):  # no number where one is needed, as in `'<=' ... and 'str'`
            non_numbers = {key: value for key, value in settings.items() if not isinstance(value, int | float)}
            keys = [
                key for key, value in non_numbers.items() if key != "_target_" and f"'{type(value).__name__}'" in text
            ]
            if not keys and re.search(r"\(\) (takes|missing) ", text):  # `_target_` takes other arguments
                keys = ["_target_"]
        overrides = ", ".join(f"{group}.{key}={settings.get(key)}" for key in keys or [default_key])
        raise UserError(f"{overrides}: {one_line(reason)}") from reason


def has_invalid_choice(override: str) -> bool:
    """Whether the value of an override cannot choose from a config group, being neither a name nor a list of names."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return False
    names = value if isinstance(value, list) else [value]
    return not all(isinstance(name, str) for name in names)


def hydra_quoted(override: str) -> str | None:
    """KEY=VALUE quoted so that Hydra reads the value verbatim, and quoted for the shell; None if that is impossible."""
    key, equals, value = override.partition("=")
    escaped = re.sub(r'(\\*)(")', r"\1\1\\\2", value)  # Hydra halves the backslashes before a quote,
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)  # the closing one included
    override_with_quotes = f'{key}="{escaped}"'
    try:
        parsed = OverridesParser.create().parse_override(override_with_quotes).value()
    except HydraException:
        return None
    return shlex.quote(override_with_quotes) if equals and isinstance(parsed, str) and parsed == value else None


def shell_quoted(override: str) -> str:
    """KEY=VALUE as one would type it in a shell, with quotes only if they are needed."""
    try:
        verbatim = OverridesParser.create().parse_override(override).value() == override.partition("=")[2]
    except HydraException:
        verbatim = False
    return shlex.quote(override) if verbatim else hydra_quoted(override) or override


def did_you_mean(name: str, choices: Iterable[object]) -> str:
    """The end of a message about an unknown name: the choice that is spelled most like it, if any."""
    close = get_close_matches(name, [str(choice) for choice in choices], 1)
    return f", did you mean {close[0]}?" if close else ""


def _chain(error: BaseException) -> list[BaseException]:
    """An error, its cause, the cause of that, and so on; causes can form a circle."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and not any(cause is link for link in chain):
        chain.append(cause)
    return chain


def _misnamed(chain: list[BaseException]) -> str:
    """What is wrong where an override names no choice of a group, or no setting; otherwise empty."""
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file and link.options:
            group, _, choice = link.missing_cfg_file.rpartition("/")
            options = sorted(link.options)
            return f"{group}={choice}: choose one of {', '.join(options)}{did_you_mean(choice, options)}"
        override = re.search(r"^To append to your config use \+(.*)$", str(link), re.MULTILINE)
        if isinstance(link, ConfigCompositionException) and override:
            cause = next((cause for cause in chain if isinstance(cause, OmegaConfBaseException)), None)
            near = _nearest(override[1].partition("=")[0], cause.parent_node if cause else None)
            is_open = any(override[1].startswith(f"{group}.") for group in OPEN)
            missing = f"{override[1]}: there is no such setting" + (f", did you mean {near}?" if near else "")
            return f"{missing}{'' if near else ','} to add it, give +{override[1]}" if is_open else missing
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


def _describe_syntax_error(error: OverrideParseException) -> str:
    """A line about an override that Hydra cannot parse; shows the quotes that its value needs, as a path with `=`."""
    key, equals, value = error.override.partition("=")
    if not equals and key.replace("-", "").isalnum():
        return f"{key}: settings are given as KEY=VALUE, such as experiment=best"
    reason = first_line(error)
    if value[:1] not in "[{\"'" and (corrected := hydra_quoted(error.override)):
        return f"{error.override}: the value of {key} needs quotes that reach Hydra: {corrected}"
    return f"{error.override}: Hydra cannot parse it ({reason})"
