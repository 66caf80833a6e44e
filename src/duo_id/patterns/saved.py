"""Head patterns written and read: what `duo_id` calls `save_pattern` and `load_pattern`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duo_id.common.errors import check
from duo_id.patterns.files import heads_from_json
from duo_id.patterns.pattern import HeadPattern


def save_pattern(pattern: HeadPattern, folder: str | Path, sparsities: Iterable[float] = (0.25, 0.5, 0.75)) -> None:
    """Write a pattern and its masks to a folder; see `HeadPattern.save`."""
    check(isinstance(pattern, HeadPattern), f"pattern: a {type(pattern).__name__} is not a HeadPattern")
    pattern.save(folder, sparsities)


def load_pattern(source: str | Path) -> HeadPattern:
    """Read a pattern by shipped name, file, folder, run or repo of the hub; see `HeadPattern.from_pretrained`."""
    return HeadPattern.from_pretrained(source)


def pattern_from_json(contents: dict[str, Any], path: str | Path) -> HeadPattern:
    """The pattern in the parsed contents of a `heads.json`; `path` is for messages."""
    return heads_from_json(contents, path, HeadPattern)
