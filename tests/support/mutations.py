"""Replace each value of valid data, containers included, by wrong ones."""

from collections.abc import Iterator
from typing import Any

WRONG: list[Any] = [None, [], {}, "", "x\n\x1b${oc.env:HOME}", -1, 2**53 + 1, 1.5, True, [["x"]], {"x": {"y": [None]}}]


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys to each value, beginning with the root's."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def with_value(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with the value at one path replaced."""
    if not at:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = with_value(value[at[0]], at[1:], new)
    return copied


def value_at(value: Any, at: tuple[Any, ...]) -> Any:
    """The value at a path."""
    return value_at(value[at[0]], at[1:]) if at else value


def mutations(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """The dotted path of each value, a wrong value of another type, and a copy of the data with it at this path."""
    for at in paths(value):
        for wrong in WRONG:
            original = value_at(value, at)
            if (type(original) is not type(wrong) or isinstance(original, list | dict)) and original != wrong:
                yield ".".join(map(str, at)), wrong, with_value(value, at, wrong)
