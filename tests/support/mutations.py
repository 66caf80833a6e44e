"""Wrong values in the place of each value of valid data, containers and all."""

from collections.abc import Iterator
from typing import Any

WRONG: list[Any] = [None, [], {}, "", "x\n\x1b${oc.env:HOME}", -1, 2**53 + 1, 1.5, True, [["x"]], {"x": {"y": [None]}}]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value, the whole first."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place."""
    if not at:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = replaced(value[at[0]], at[1:], new)
    return copied


def found(value: Any, at: tuple[Any, ...]) -> Any:
    """What is in a place."""
    return found(value[at[0]], at[1:]) if at else value


def mutations(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each place, what is put there, and the whole with it; nothing of the kind that was there."""
    for at in places(value):
        for wrong in WRONG:
            before = found(value, at)
            if (type(before) is not type(wrong) or isinstance(before, list | dict)) and before != wrong:
                yield ".".join(map(str, at)), wrong, replaced(value, at, wrong)
