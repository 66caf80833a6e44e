"""Tables lose nothing at any width: they are split between columns, under the names of their rows."""

from io import StringIO

import pytest
from rich.console import Console

from duo_id.common.tables import TextTable, print_tables

HEADINGS = ["heads", "stream\n%", *(f"metric\n{number}" for number in range(9))]
ROWS = [
    [name, "50", *(f"{number}.{row}23 ± 0.{row}{number}7" for number in range(9))]
    for row, name in enumerate(["full attention", "random (5 masks)", "[bold]name[/bold]"])
]
TABLE = TextTable(HEADINGS, {"": ROWS}, "a title", "a caption", leading=2)


def shown(table: TextTable, width: int, terminal: bool = True) -> list[str]:
    console = Console(width=width, file=StringIO(), force_terminal=terminal, color_system=None)
    print_tables(console, table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [50, 80, 120, 300])
def test_every_value_is_whole_beside_the_name_of_its_row(width: int) -> None:
    lines = shown(TABLE, width)
    assert max(map(len, lines)) <= width
    for name, *cells in ROWS:
        of_row = " ".join(line for line in lines if line.startswith(name))
        assert all(cell in of_row for cell in cells)
    for number in range(9):
        assert any(f" {number}" in line for line in lines if "%" in line)
    assert lines[0] == "a title"
    assert lines[-1] == "a caption"


def test_a_file_is_wider_than_a_terminal() -> None:
    assert sum(line.startswith("full attention") for line in shown(TABLE, 80)) == 3
    assert sum(line.startswith("full attention") for line in shown(TABLE, 80, terminal=False)) == 1


def test_long_names_are_folded() -> None:
    name = "outputs/" + "x" * 70
    table = TextTable(["heads", "loss"], {"one": [[name, "1.234"]], "two": [["other", "2.345"]]}, "t")
    lines = shown(table, 80)
    assert max(map(len, lines)) <= 80
    assert "".join(lines).replace(" ", "").count("x" * 30) >= 2
    assert "1.234" in "".join(lines)
    assert {"one", "two"} <= set(lines)


def test_a_text_wider_than_the_terminal_is_folded() -> None:
    lines = shown(TextTable(["job", "seed", "why"], {"": [["1", "3", "word " * 60]]}, "failed"), 80)
    assert max(map(len, lines)) <= 80
    assert "".join(lines).count("word") == 60
