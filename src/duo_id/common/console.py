"""What commands print, and a user's mistake as one line."""

from rich.console import Console
from rich.markup import escape

from duo_id.common.errors import printable
from duo_id.common.mistakes import explained

console = Console(emoji=False)


def say(line: object) -> None:
    """Print a line as it is: what looks like markup in a name is none."""
    console.print(str(line), soft_wrap=True, highlight=False, markup=False)


def name_folder(error: BaseException, folder: str | None) -> None:
    """Let an error say where it happened: a full disk names no file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = folder


def complain(error: BaseException) -> int:
    """Show an error as one line, without a traceback, and return the exit status."""
    label = "error of another process:" if console.quiet else "error:"
    console.quiet = False
    console.print(f"[bold red]{label}[/]", escape(printable(explained(error))), highlight=False, soft_wrap=True)
    return 2
