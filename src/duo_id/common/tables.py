"""Tables in the terminal: none loses a column or a digit where it is narrow."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

WIDE = 200  # characters of a line without a terminal: a file has no edge
GAP = 2  # between columns


class TextTable:
    """A table of texts. Where it is too wide, further tables hold the columns that are left, under the same names.

    Args:
        headings: of the columns; they may have several lines.
        sections: rows by title of their section; a single section shows no title.
        title: above the table.
        caption: below the table.
        leading: the number of first columns that name a row, and are repeated.
        left: the number of first columns aligned to the left.
        bold: rows to stress, by section and number.
    """

    def __init__(
        self,
        headings: Sequence[str],
        sections: Mapping[str, Sequence[Sequence[str]]],
        title: str,
        caption: str | None = None,
        leading: int = 1,
        left: int = 1,
        bold: frozenset[tuple[str, int]] = frozenset(),
    ) -> None:
        self.headings, self.sections, self.title, self.caption = headings, sections, title, caption
        self.leading, self.left, self.bold = leading, left, bold

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many tables as the width takes."""
        parts = self.parts(options.max_width)
        for number, columns in enumerate(parts):
            if number:
                yield ""
            yield self._table(columns, options.max_width, number == 0, number == len(parts) - 1)

    def parts(self, width: int) -> list[list[int]]:
        """The columns of each table, as few tables as fit the width."""
        widths = self._widths(width)
        names = list(range(self.leading))
        room = width - sum(widths[column] + GAP for column in names)
        parts: list[list[int]] = []
        free = 0
        for column in range(self.leading, len(widths)):
            if not parts or widths[column] > free:
                parts.append([*names])
                free = room
            parts[-1].append(column)
            free -= widths[column] + GAP
        return parts or [names]

    def _widths(self, width: int) -> list[int]:
        """Of the columns; the first is folded so that those that name a row take at most half of the table."""
        rows = [row for section in self.sections.values() for row in section]
        widths = []
        for column, heading in enumerate(self.headings):
            texts = [*heading.split("\n"), *(row[column] for row in rows)]
            widths.append(max(map(cell_len, texts)))
        if len(self.sections) > 1:
            widths[0] = max(widths[0], *map(cell_len, self.sections))
        if len(widths) > 1:
            widths[0] = min(widths[0], max(10, width // 2 - sum(widths[1 : self.leading])))
        return widths

    def _table(self, columns: Sequence[int], width: int, first: bool, last: bool) -> Table:
        table = Table(
            title=escape(self.title) if first else None,
            caption=self.caption if last else None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        widths = self._widths(width)
        for column in columns:
            names_rows = column < self.leading
            table.add_column(
                escape(self.headings[column]),
                justify="left" if column < self.left else "right",
                overflow="fold",
                min_width=widths[column] if names_rows else None,
                max_width=widths[column] if names_rows else None,
            )
        for section, rows in self.sections.items():
            if len(self.sections) > 1:
                table.add_section()
                table.add_row(f"[italic]{escape(section)}[/]")
            for number, row in enumerate(rows):
                style = "bold" if (section, number) in self.bold else None
                table.add_row(*(escape(row[column]) for column in columns), style=style)
        return table


def print_tables(console: Console, *tables: TextTable) -> None:
    """Print tables as wide as the terminal, and wider where there is none."""
    if not (console.is_terminal or console.is_jupyter):
        console = Console(file=console.file, width=max(console.width, WIDE), quiet=console.quiet, emoji=False)
    for table in tables:
        console.print(table)
