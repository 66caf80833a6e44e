"""The one exception that the commands show as a single line instead of a traceback."""


class UserError(ValueError):
    """Something that the user can mend; the message is one line and names the override to change."""
