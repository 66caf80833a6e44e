"""What long commands show: of what the run is, and a bar."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

WINDOW = 3600.0  # seconds of the speed behind the time left: a single sample may take minutes
LONG = 60.0  # seconds left that are worth a line before the first tenth is done


def headline(
    model: str, device: object, shape: tuple[int, int], method: str, sizes: str, folder: Path | None = None
) -> str:
    """The first line of a run.

    Args:
        model: its name.
        device: where it is.
        shape: its gated layers and KV heads.
        method: how heads are found, or which are measured.
        sizes: of the work.
        folder: of the run; None: it keeps none.
    """
    layers, kv_heads = shape
    kept = f"; folder: {folder}" if folder else ""
    return f"{model} on {device}: {layers} layers x {kv_heads} KV heads, {method}, {sizes}{kept}"


def progress_bar(console: Console, counted: bool = True) -> Progress:
    """A bar with the task's description, progress, elapsed and remaining time, which disappears when it ends.

    Where there is no terminal, a line per tenth instead.

    Args:
        console: where to show it.
        counted: show progress as a count, such as 3/10; otherwise as a percentage.
    """
    share = MofNCompleteColumn() if counted else TaskProgressColumn()
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), share, *times)
    watched = console.is_terminal or console.is_jupyter
    progress = Progress if watched else _Lines
    return progress(*columns, console=console, transient=True, speed_estimate_period=WINDOW)


def duration(seconds: float) -> str:
    """A rough duration: 40 s, 7 min, 3.5 h, 4 days."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 60 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / (24 * 3600):.0f} days"


class _Lines(Progress):
    """Prints a line whenever a task passes a tenth, and one after the first part of a long task."""

    def __init__(self, *columns: Any, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._tenths: dict[TaskID, int] = {}
        self._first: dict[TaskID, float] = {}  # done before this run
        self._announced: set[TaskID] = set()

    def start(self) -> None:
        """Start without a live display, which a file cannot hold."""

    def stop(self) -> None:
        """Stop; there is nothing to clear."""

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        before = self._tasks[task_id].completed
        super().advance(task_id, advance)
        self._passed(task_id, before)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        before = self._tasks[task_id].completed
        super().update(task_id, **changes)
        self._passed(task_id, before)

    def _passed(self, task_id: TaskID, before: float) -> None:
        task = self._tasks[task_id]
        if not task.total or task.completed == before:
            return
        tenth, first = int(10 * task.completed / task.total), self._first.setdefault(task_id, before)
        if task.completed < before:  # it begins anew
            self._first[task_id] = task.completed
        else:
            taken = task.elapsed or 0.0
            left = taken / (task.completed - first) * (task.total - task.completed)
            passed = tenth > self._tenths.get(task_id, int(10 * first / task.total))
            if passed or (left >= LONG and task_id not in self._announced):
                share = 10 * tenth if passed else int(100 * task.completed / task.total)
                times = f"{timedelta(seconds=round(taken))}, left: {timedelta(seconds=round(left))}"
                self.console.print(
                    f"{task.description}: {share}%  {times}", soft_wrap=True, highlight=False, markup=False
                )
            self._announced.add(task_id)
        self._tenths[task_id] = tenth
