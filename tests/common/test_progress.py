"""The bar that long commands show."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from duo_id.common.progress import duration, headline, progress_bar


@pytest.mark.parametrize(("counted", "share"), [(True, "3/12"), (False, "25%")])
def test_how_much_is_done_and_how_long_it_takes(counted: bool, share: str) -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True, color_system=None)
    with progress_bar(console, counted) as progress:
        bar = progress.add_task("reading", total=12)
        progress.advance(bar, 3)
        progress.refresh()
        (line,) = console.file.getvalue().rsplit("\r", 1)[-1].splitlines()  # type: ignore[attr-defined]
    assert "reading " in line
    assert share in line
    assert "0:00:00 left: " in line


@pytest.mark.parametrize(("total", "lines"), [(40, 10), (3, 3)])
def test_a_file_gets_a_line_for_each_tenth(total: int, lines: int) -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    with progress_bar(console) as progress:
        bar = progress.add_task("reading [x]", total=total)
        for _ in range(total):
            progress.advance(bar)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(shown) == lines
    assert all(line.startswith("reading [x]: ") and ", left: " in line for line in shown)
    assert shown[-1].startswith("reading [x]: 100%")


def test_what_was_done_before_takes_no_line_and_a_new_part_begins_anew() -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    with progress_bar(console) as progress:
        bar = progress.add_task("search", total=10, completed=5)
        progress.update(bar, completed=6)
        progress.update(bar, description="swaps", total=4, completed=0)
        progress.update(bar, completed=1)
        progress.update(bar, completed=2)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("%")[0] for line in shown] == ["search: 60", "swaps: 20", "swaps: 50"]


def test_a_quiet_console_shows_nothing() -> None:
    console = Console(file=StringIO(), quiet=True)
    with progress_bar(console) as progress:
        progress.advance(progress.add_task("reading", total=1))
    assert not console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_line_names_model_device_heads_method_and_folder() -> None:
    line = headline("Tiny", "cpu", (3, 2), "method=nested", "2 steps", Path("runs/1"))
    assert line == "Tiny on cpu: 3 layers x 2 KV heads, method=nested, 2 steps; folder: runs/1"
    assert headline("Tiny", "cpu", (3, 2), "method=nested", "2 steps").endswith("2 steps")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.052, "0.052 s"),
        (7.3, "7.3 s"),
        (59, "59 s"),
        (61, "1 min"),
        (3000, "50 min"),
        (5040, "1.4 h"),
        (4e5, "5 days"),
    ],
)
def test_durations_are_rough(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_long_task_says_how_long_after_its_first_part() -> None:
    console, now = Console(file=StringIO(), width=80, color_system=None), [0.0]
    with progress_bar(console) as progress:
        progress.get_time = lambda: now[0]
        bar = progress.add_task("reading", total=100)
        for _ in range(10):
            now[0] += 2
            progress.advance(bar)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown == ["reading: 1%  0:00:02, left: 0:03:18", "reading: 10%  0:00:20, left: 0:03:00"]
