"""The commands' console output, and one-line errors."""

from rich.console import Console
from rich.markup import escape

from duo_id.common.errors import printable
from duo_id.common.mistakes import describe_error

console = Console(emoji=False)


def say(line: object) -> None:
    """Print a line verbatim: a name may contain what looks like markup."""
    console.print(str(line), soft_wrap=True, highlight=False, markup=False)


def set_missing_filename(error: BaseException, folder: str | None) -> None:
    """Add the folder to an operating system's error without a file name, such as a full disk."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = folder


def print_error(error: BaseException) -> int:
    """Show an error as one line, without a traceback, and return the exit status."""
    label = "error in another process:" if console.quiet else "error:"
    console.quiet = False
    console.print(f"[bold red]{label}[/]", escape(printable(describe_error(error))), highlight=False, soft_wrap=True)
    return 2
