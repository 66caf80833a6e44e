"""The one exception that the commands and notebooks show as a single line instead of a traceback."""


class UserError(ValueError):
    """Something that the user can mend; the message is one line and names the override to change."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"error: {self}"]


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)
