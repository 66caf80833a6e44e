"""The scores so far, on disk line by line so that an interrupted run loses nothing; then the results."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from duo_id.common.config import shown
from duo_id.common.documents import LARGEST_ROWS, Line, checked, parse_lines, read_text
from duo_id.common.errors import UserError
from duo_id.common.files import atomic_path, write_text
from duo_id.common.integrity import DIFFERS, sealed
from duo_id.common.record import differences
from duo_id.evaluate.batches import first_following
from duo_id.evaluate.contenders import Key
from duo_id.evaluate.items import Item
from duo_id.report.rows import ASKED, QUESTION, SCHEMA, VERSION, Scored, ScoredRow

JOURNAL = "scores.jsonl"  # in a run folder: a header line, then one row per line
RESULTS = "results.json"
ABSENT = {"write": 0}  # what headers of earlier versions meant by lacking a key
ROW_ADVICE = "delete that line to score it again"


class _JournalRow(Scored):
    """A row of the file, with the digest of its sample."""

    sample: Line


class Journal:
    """The rows of a run, in `scores.jsonl`.

    A row written again, with a generated answer where there was none, replaces the older one.

    Args:
        folder: the run folder.
        header: what all rows depend on (model, seed, text, template); a run resumes only under the same header.

    Raises:
        UserError: the folder holds scores of another version or with another header.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.header = {"schema": SCHEMA, "version": VERSION} | json.loads(json.dumps(header))
        self._rows: dict[tuple[Any, ...], ScoredRow] = {}
        if self.path.exists():
            self._read()
        else:
            write_text(self.path, json.dumps(sealed(self.header)) + "\n")

    @property
    def rows(self) -> list[ScoredRow]:
        """All rows, in the order of their first writing."""
        return list(self._rows.values())

    def has(self, item: Item, key: Key, generate: bool, write: bool = False) -> bool:
        """Whether a contender has answered all questions of an item, with generated answers and free text if wanted.

        Raises:
            UserError: the journal's sample of this task, length and index differs.
        """
        generate = generate and item.max_new_tokens > 0
        for number, question in enumerate(item.questions):
            row = self._rows.get((item.task, item.length, item.index, number, *key))
            if row is not None and row["sample"] != item.digest:
                raise UserError(
                    f"resume: sample {item.index} of {item.task} at {item.length} tokens in {self.path} differs from "
                    "the one that this version of duo_id generates: leave out resume to start anew"
                )
            if row is None or (generate and question.place is None and row["text"] is None):
                return False
            if write and number == first_following(item) and row.get("written") is None:
                return False
        return True

    def add(self, rows: Iterable[ScoredRow]) -> None:
        """Add rows, and write them to disk before returning."""
        rows = list(rows)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sealed(row)) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self._rows[_row_key(row)] = row

    def _read(self) -> None:
        source, advice = f"resume: {self.path}", "leave out resume to start anew"
        try:
            text = read_text(self.path, LARGEST_ROWS)
            if text and not text.endswith("\n"):  # the process was killed while writing
                text = text[: text.rfind("\n") + 1]
                write_text(self.path, text)
            header_line, *row_lines = text.split("\n")
            ((_, header),) = parse_lines([header_line], self.path, replace_surrogates=True, advice=advice)
            # The blank line makes the line numbers in messages those of the file.
            rows = parse_lines(["", *row_lines], self.path, replace_surrogates=True, advice=ROW_ADVICE)
        except ValueError as error:
            reason = str(error).removeprefix(f"{self.path} ") if isinstance(error, UserError) else "it is empty"
            raise UserError(f"{source} cannot be read ({reason})" + f": {advice}" * (DIFFERS not in reason)) from error
        if (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise UserError(
                f"resume: {self.path} has version {header.get('version')!r:.40}, this duo_id writes version {VERSION}: "
                "leave out resume to start anew"
            )
        for key in self.header.keys() | header.keys():
            if header.get(key, ABSENT.get(key)) != self.header.get(key):
                raise UserError(
                    f"resume: {self.path} was made with another {key} ({_difference(key, header, self.header)}): "
                    "leave out resume to start anew"
                )
        for number, row in rows:
            checked(_JournalRow, row, f"{source}, line {number}")
            self._rows[_row_key(row)] = row


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, and its rows as `results.parquet`.

    Args:
        folder: the run folder.
        results: with `rows`, one dict per question and contender.
    """
    with atomic_path(folder / "results.parquet") as temporary:
        pd.DataFrame(results["rows"]).to_parquet(temporary, index=False, write_page_checksum=True)
    contents = sealed({"schema": SCHEMA, "version": VERSION} | results)
    rows = ",\n  ".join(json.dumps(row) for row in contents.pop("rows"))  # one per line
    opening = json.dumps(contents | {"rows": []}, indent=1)
    write_text(folder / RESULTS, opening.removesuffix("[]\n}") + f"[\n  {rows}\n ]\n}}\n")


def _difference(key: str, header: ScoredRow, current: ScoredRow) -> str:
    """The values under a key that differ between two headers, in words."""
    changes = differences({key: header.get(key)}, {key: current.get(key)})
    return "; ".join(f"{name}={shown(old)}, not {shown(new)}" for name, (old, new) in list(changes.items())[:2]) or key


def _row_key(row: ScoredRow) -> tuple[Any, ...]:
    return tuple(row.get(column) for column in (*QUESTION, *ASKED))
