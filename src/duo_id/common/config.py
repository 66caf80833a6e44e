"""What pydantic needs to check settings: types that carry their ranges, and errors that name the override to change."""

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
from duo_id.common.mistakes import explained

LARGEST = 2**31  # of what is counted: positions and sizes beyond overflow somewhere below
WIDTH = 80  # characters of a value in a message
CLOSED = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # `model.name=7` is a text

Made = TypeVar("Made")
Item = TypeVar("Item")


def shown(value: Any) -> str:
    """A value as one types it, cut off where it is long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = str(value)
    except ValueError:  # Python does not write whole numbers of thousands of digits
        text = "a number of thousands of digits"
    text = " ".join(text.split()) if len(text.splitlines()) > 1 else text  # a message is one line
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(" must be a number")
    return value


def check_line(value: Any) -> Any:
    """A value whose text, where it is one or becomes one, is a line."""
    if isinstance(value, str) and any(ord(letter) < 32 for letter in value):
        raise ValueError(" must be one line of text")
    if isinstance(value, int) and abs(value) >= 10**WIDTH:
        raise ValueError(" is too large")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value  # sparsity=0.5, blend=teacher: what people type


def one_of(choices: Collection[str]) -> AfterValidator:
    """Only these texts, where they are not known when types are checked."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f": choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=0, le=LARGEST)]
Positive = Annotated[Whole, Field(ge=1, le=LARGEST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]  # what all random generators take
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Weight = Annotated[Number, Field(ge=0, le=1e9)]  # a float32 gradient holds its products
PositiveWeight = Annotated[Number, Field(gt=0, le=1e9)]
Words = Annotated[str, BeforeValidator(check_line)]
Text = Annotated[Words, Field(min_length=1)]
Named = Annotated[Any, BeforeValidator(check_line)]  # a name, or what stands in its place
Several = Annotated[list[Item], BeforeValidator(_listed)]
Some = Annotated[list[Item], BeforeValidator(_listed), Field(min_length=1)]


@dataclass_transform()
def settings(group: str) -> Callable[[type[Made]], type[Made]]:
    """Make a class a dataclass whose values are checked, those of its parts too; a `UserError` names the first mistake.

    Args:
        group: where the class stands in the config, such as `model`; empty for all of it.
    """

    def made(cls: type[Made]) -> type[Made]:
        checked: Any = dataclass(config=CLOSED)(cls)
        checked.group = group
        init = checked.__init__

        @wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as error:
                raise mistaken(error, checked, group) from error

        checked.__init__ = __init__
        return checked

    return made


def parse(schema: type[Made], config: DictConfig | Mapping[str, Any]) -> Made:
    """Turn a composed config, or plain values, into typed settings.

    Raises:
        UserError: a value is missing, unknown, of the wrong type or out of range.
    """
    try:
        return schema.__pydantic_validator__.validate_python(contents(config))  # type: ignore[attr-defined]
    except ValidationError as error:
        raise mistaken(error, schema, schema.group) from error  # type: ignore[attr-defined]


def contents(config: DictConfig | Mapping[str, Any]) -> Any:
    """The plain values of a config, every interpolation resolved; plain values are given back, with their `${...}`.

    Raises:
        UserError: a value is missing, or refers to what is not there.
    """
    if not OmegaConf.is_config(config):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(explained(error)) from error


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain values, for JSON; a text with `${...}` in it stays one."""
    return asdict(settings)


def mistaken(error: ValidationError, schema: Any, group: str) -> UserError:
    """The first mistake that pydantic found, as the override to change."""
    first = error.errors(include_url=False)[0]
    kind, path, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    if isinstance(own := context.get("error"), UserError):
        return own
    names = [str(part) for part in path if isinstance(part, str) and part != "[key]"]
    key = ".".join([*([group] if group else []), *names]) or "settings"
    if kind in ("missing", "missing_argument"):
        return UserError(f"{key}: its value is missing, give {key}=VALUE")
    owner = _owner(schema, names[:-1])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        near = get_close_matches(names[-1], _hints(owner), 1)
        meant = f", did you mean {'.'.join([*key.split('.')[:-1], near[0]])}?" if near else ""
        return UserError(f"{key}={shown(value)}: there is no such setting{meant}")
    field = getattr(owner, "__pydantic_fields__", {}).get(names[-1] if names else "")
    advice = f"; {field.description}" if field is not None and field.description else ""
    return UserError(f"{key}={shown(value)}{_rule(kind, context, first['msg'])}{advice}")


def _rule(kind: str, context: Mapping[str, Any], message: str) -> str:
    """What a value must be, as the end of a sentence that begins with the override."""
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
    for start, what in (
        ("int_parsing_size", f"at most {LARGEST}"),
        ("int", "a whole number"),
        ("float", "a number"),
        ("finite", "a finite number"),
        ("bool", "true or false"),
        ("string_too_short", "a text, not empty"),
        ("string", "a text"),
        ("too_short", "a list of at least one value"),
        ("list", "a list, such as [value]"),
        ("dict", "a mapping, such as {key: value}"),
        ("dataclass", "a mapping, such as {key: value}"),
    ):
        if kind.startswith(start):
            return f" must be {what}"
    return f": {message}"


def _owner(schema: Any, path: Iterable[str]) -> Any:
    """The settings at a place of others."""
    for name in path:
        schema = _hints(schema).get(name)
        while schema is not None and not is_dataclass(schema) and not is_typeddict(schema):
            schema = next(iter(get_args(schema)), None)
    return schema


def _hints(schema: Any) -> dict[str, Any]:
    """The names of what settings hold, and their types."""
    return get_type_hints(schema) if is_dataclass(schema) or is_typeddict(schema) else {}


def conf_dir() -> Path:
    """The folder of Hydra's config groups, in an installed wheel or in the source tree."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "conf", package.parents[1] / "conf") if folder.is_dir())
