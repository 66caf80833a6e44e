"""The progress bar of long commands."""

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
    """A bar with the task's description, progress, elapsed and remaining time, which disappears when it ends.

    Args:
        console: where to show it.
        counted: show progress as a count, such as 3/10; otherwise as a percentage.
    """
    share = MofNCompleteColumn() if counted else TaskProgressColumn()
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), share, *times, console=console, transient=True)
