"""The exception that commands and notebooks show as one line instead of a traceback, and helpers for such lines."""


class UserError(ValueError):
    """A mistake that the user can correct; the message is one line and names the override to change."""

    def _render_traceback_(self) -> list[str]:
        """Called by IPython, which shows these lines in place of a traceback."""
        return [f"error: {self}"]


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(error: object, limit: int | None = 400) -> str:
    """An error's whole message on one line of at most `limit` characters, without control characters."""
    lines = (line.strip() for line in str(error).splitlines())
    text = printable(" ".join(filter(None, lines))) or type(error).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def first_line(error: object) -> str:
    """The first line of a library's message, whose other lines are about its own code."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def printable(text: str) -> str:
    """A text with all characters replaced that could control a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
