"""The bar that long commands show."""

from io import StringIO

import pytest
from rich.console import Console

from duo_id.common.progress import progress_bar


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
