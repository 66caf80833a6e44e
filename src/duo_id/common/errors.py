"""The one exception that the commands and notebooks show as a single line instead of a traceback, and such lines."""


class UserError(ValueError):
    """Something that the user can mend; the message is one line and names the override to change."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"error: {self}"]


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(error: object, most: int | None = 400) -> str:
    """All that an error or a library says, on one line of at most `most` characters, whatever a file put into it."""
    lines = (line.strip() for line in str(error).splitlines())
    text = printable(" ".join(filter(None, lines))) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def first_line(error: object) -> str:
    """The first line of what a library says, where the rest is about its own code."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def printable(text: str) -> str:
    """A text without what could steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
