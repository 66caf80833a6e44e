"""Settings checked by pydantic: types that carry their ranges, and errors that name the override to change."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import is_typeddict

from duo_id.common.errors import UserError
from duo_id.common.mistakes import describe_error

LARGEST = 2**31  # of counts and sizes: larger ones overflow in a library somewhere
MAX_SHOWN = 80  # characters of a value in a message
STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # `model.name=7` is a string

Class = TypeVar("Class")
Item = TypeVar("Item")


def shown(value: Any) -> str:
    """A value as one would type it, truncated if it is long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a number of thousands of digits"
    text = " ".join(text.split()) if len(text.splitlines()) > 1 else text  # a message is one line
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(" must be a number")
    return value


def check_line(value: Any) -> Any:
    """A value that is a single line, if it is a string or can become one."""
    if isinstance(value, str) and any(ord(character) < 32 for character in value):
        raise ValueError(" must be one line of text")
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        raise ValueError(" is too large")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value  # people type sparsity=0.5, blend=teacher


def one_of(choices: Collection[str]) -> AfterValidator:
    """Only these strings, for choices that a `Literal` cannot list."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f": choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


Whole = Annotated[int, BeforeValidator(_not_bool)]
Count = Annotated[Whole, Field(ge=0, le=LARGEST)]
Positive = Annotated[Whole, Field(ge=1, le=LARGEST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]  # the range that all random generators accept
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0, le=1e9)]  # so that a gradient scaled by it fits float32
PositiveWeight = Annotated[Number, Field(gt=0, le=1e9)]
Words = Annotated[str, BeforeValidator(check_line)]
Text = Annotated[Words, Field(min_length=1)]
Named = Annotated[Any, BeforeValidator(check_line)]  # a name, or a value in its place
Several = Annotated[list[Item], BeforeValidator(_as_list)]
Some = Annotated[list[Item], BeforeValidator(_as_list), Field(min_length=1)]


@dataclass_transform()
def settings(group: str) -> Callable[[type[Class]], type[Class]]:
    """Make a class a dataclass whose values are checked, nested ones too; a `UserError` names the first mistake.

    Args:
        group: the key of these settings in the config, such as `model`; empty for the whole config.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        schema: Any = dataclass(config=STRICT)(cls)
        schema.group = group
        init = schema.__init__

        @wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as error:
                raise first_mistake(error, schema, group) from error

        schema.__init__ = __init__
        return schema

    return decorate


def parse(schema: type[Class], config: DictConfig | Mapping[str, Any]) -> Class:
    """Turn a composed config, or plain values, into typed settings.

    Raises:
        UserError: a value is missing, unknown, of the wrong type or out of range.
    """
    try:
        return schema.__pydantic_validator__.validate_python(resolve(config))  # type: ignore[attr-defined]
    except ValidationError as error:
        raise first_mistake(error, schema, schema.group) from error  # type: ignore[attr-defined]


def resolve(config: DictConfig | Mapping[str, Any]) -> Any:
    """The plain values of a config, all interpolations resolved; plain values are returned as they are, `${...}` too.

    Raises:
        UserError: a value is missing, or refers to a key that does not exist.
    """
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(describe_error(error)) from error


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain values, for JSON; a string with `${...}` in it stays as it is."""
    return asdict(settings)


def first_mistake(error: ValidationError, schema: Any, group: str) -> UserError:
    """An error for the first mistake that pydantic found, which names the override to change."""
    first = error.errors(include_url=False)[0]
    kind, path, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    if isinstance(raised := context.get("error"), UserError):
        return raised
    if kind == "too_short" and isinstance(value, str):
        kind = "string_too_short"
    names = [str(part) for part in path if isinstance(part, str) and part != "[key]"]
    key = ".".join([*([group] if group else []), *names]) or "settings"
    if kind in ("missing", "missing_argument"):
        return UserError(f"{key}: its value is missing, give {key}=VALUE")
    parent = _schema_at(schema, names[:-1])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        matches = get_close_matches(names[-1], _field_types(parent), 1)
        suggestion = f", did you mean {'.'.join([*key.split('.')[:-1], matches[0]])}?" if matches else ""
        return UserError(f"{key}={shown(value)}: there is no such setting{suggestion}")
    field = getattr(parent, "__pydantic_fields__", {}).get(names[-1] if names else "")
    advice = f"; {field.description}" if field is not None and field.description else ""
    return UserError(f"{key}={shown(value)}{_requirement(kind, context, first['msg'])}{advice}")


def _requirement(kind: str, context: Mapping[str, Any], message: str) -> str:
    """What a value must be, phrased to follow the override."""
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "less_than_equal": ("at most", "le"),
        "greater_than": ("above", "gt"),
        "less_than": ("below", "lt"),
    }
    if kind in bounds:
        word, bound = bounds[kind]
        return f" must be {word} {context[bound]:.15g}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f": choose one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    for prefix, expected in (
        ("int_parsing_size", f"at most {LARGEST}"),
        ("int", "a whole number"),
        ("float", "a number"),
        ("finite", "a finite number"),
        ("bool", "true or false"),
        ("string_too_short", "a non-empty string"),
        ("string", "a string"),
        ("too_short", "a list of at least one value"),
        ("list", "a list, such as [value]"),
        ("dict", "a mapping, such as {key: value}"),
        ("dataclass", "a mapping, such as {key: value}"),
    ):
        if kind.startswith(prefix):
            return f" must be {expected}"
    return f": {message}"


def _schema_at(schema: Any, path: Iterable[str]) -> Any:
    """The schema of the settings that a path of names leads to."""
    for name in path:
        schema = _field_types(schema).get(name)
        while schema is not None and not is_dataclass(schema) and not is_typeddict(schema):
            schema = next(iter(get_args(schema)), None)
    return schema


def _field_types(schema: Any) -> dict[str, Any]:
    """The fields of settings by name, with their types."""
    return get_type_hints(schema) if is_dataclass(schema) or is_typeddict(schema) else {}


def conf_dir() -> Path:
    """The folder of Hydra's config groups, in an installed wheel or in the source tree."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parents[1] / "conf") if folder.is_dir())
