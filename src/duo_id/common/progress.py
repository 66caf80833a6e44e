"""The bar that long commands show."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console, counted: bool = True) -> Progress:
    """What is being done, how much of it is, and the time that it has taken and will take; gone when it ends.

    Args:
        console: shows it.
        counted: whether tasks consist of things that one counts; otherwise their share is shown.
    """
    share = MofNCompleteColumn() if counted else TaskProgressColumn()
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), share, *times, console=console, transient=True)
