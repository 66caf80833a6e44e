"""Lines of Markdown fit a terminal and a diff: at most 120 characters, but for tables and the addresses of links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "notebooks", "results")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
]
WIDTH = 120
ADDRESS = re.compile(r"(?<=\]\()[^)]*|https?://\S+")


def long_lines(text: str) -> list[int]:
    """The numbers of the lines that are too long."""
    lines = enumerate(text.splitlines(), start=1)
    return [n for n, line in lines if not line.startswith("|") and len(ADDRESS.sub("", line)) > WIDTH]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_short(page: Path) -> None:
    assert long_lines(page.read_text()) == []


def test_tables_and_addresses_may_be_longer() -> None:
    wide = "x" * (WIDTH + 1)
    lines = (wide, f"| {wide} |", f"[here](https://{wide})", f"see https://{wide}", f"[here]({wide}) {wide}")
    assert long_lines("\n".join(lines)) == [1, 5]
