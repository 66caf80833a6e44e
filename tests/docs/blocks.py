"""Fenced blocks of Markdown pages, and the commands in them.

A block is marked by a comment in the line above it, which no reader sees:

    <!-- gpu -->                              needs a GPU: composed, not run
    <!-- hub -->                              needs a model hub or other downloads: the same
    <!-- tested: tests/test_x.py::test_y -->  that test runs it
    <!-- file: my_module.py -->               a file that later commands of the page use

A single command is marked by a comment in the shell that mentions a GPU or the hub.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
ELSEWHERE = re.compile(r"\b(gpu|hub)\b", re.I)


@dataclass(frozen=True)
class Block:
    """One fenced block: its location, its mark or an empty string, and its text."""

    page: Path
    line: int  # of its first line of text
    mark: str
    language: str
    text: str

    @property
    def tested(self) -> str:
        """The test that runs it, if it names one."""
        return self.mark.removeprefix("tested: ") if self.mark.startswith("tested: ") else ""


@dataclass(frozen=True)
class Command:
    """One command line: its location, its words, and whether it needs a GPU or a hub."""

    location: str
    words: tuple[str, ...]
    elsewhere: bool  # it needs a GPU or a hub

    @property
    def module(self) -> str:
        """`train` of `python -m duo_id.train`, whatever launches it, and of `duo-id train`."""
        if self.words[0] == "duo-id":
            return self.words[1].replace("-", "_")
        return next((word.removeprefix("duo_id.") for word in self.words if word.startswith("duo_id.")), "")

    @property
    def arguments(self) -> list[str]:
        """What follows the module, or the script of a `python script.py`."""
        first = next((i for i, word in enumerate(self.words) if word.startswith("duo_id.")), 1)
        return list(self.words[first + 1 :])


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(page, text[: match.start("text")].count("\n") + 1, match["mark"] or "", match["language"], match["text"])
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block; a trailing backslash continues the line, leading variables are dropped."""
    line = block.line
    for text in re.split(r"(?<!\\)\n", block.text):
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            comment = text.partition(" #")[2]
            elsewhere = bool(block.mark in ("gpu", "hub") or ELSEWHERE.search(comment))
            yield Command(f"{block.page.name}:{line}", tuple(words), elsewhere)
        line += text.count("\n") + 1
