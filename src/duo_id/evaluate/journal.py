"""What has been scored so far, on disk line by line, so that an interrupted run loses nothing; then the results."""

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
from duo_id.evaluate.contenders import Key
from duo_id.evaluate.items import Item
from duo_id.report.rows import SCHEMA, VERSION, Scored, ScoredRow

JOURNAL = "scores.jsonl"  # in a run folder: a header line, then one row a line
RESULTS = "results.json"
ROW_AGAIN = "delete that line, and it is scored again"


class _Written(Scored):
    """A row of the file: of which sample."""

    sample: Line


class Journal:
    """The rows of a run, in `scores.jsonl`.

    A row that is written again, with a generated answer where there was none, takes the place of the older one.

    Args:
        folder: the run folder.
        header: what all rows depend on (model, seed, text, template); a run can go on only with the same.

    Raises:
        UserError: the folder holds scores of another version or under another header.
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
        """All rows, in the order in which they were first written."""
        return list(self._rows.values())

    def has(self, item: Item, key: Key, generate: bool) -> bool:
        """Whether all questions of an item are answered by a contender, generated answers among them if wanted.

        Raises:
            UserError: a sample of this name was another one.
        """
        generate = generate and item.max_new_tokens > 0
        for number, question in enumerate(item.questions):
            row = self._rows.get((item.task, item.length, item.index, number, *key))
            if row is not None and row["sample"] != item.digest:
                raise UserError(
                    f"resume: {self.path} has another sample {item.index} of {item.task} at {item.length} tokens than "
                    "this version of duo_id makes: leave out resume to start anew"
                )
            if row is None or (generate and question.place is None and row["text"] is None):
                return False
        return True

    def add(self, rows: Iterable[ScoredRow]) -> None:
        """Take rows in and write them to the disk before returning."""
        rows = list(rows)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sealed(row)) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self._rows[_identity(row)] = row

    def _read(self) -> None:
        where, anew = f"resume: {self.path}", "leave out resume to start anew"
        try:
            text = read_text(self.path, LARGEST_ROWS)
            if text and not text.endswith("\n"):  # written while the process was killed
                text = text[: text.rfind("\n") + 1]
                write_text(self.path, text)
            first, *rest = text.split("\n")
            ((_, header),) = parse_lines([first], self.path, mend=True, advice=anew)
            rows = parse_lines(["", *rest], self.path, mend=True, advice=ROW_AGAIN)  # numbered as in the file
        except ValueError as error:
            told = str(error).removeprefix(f"{self.path} ") if isinstance(error, UserError) else "it is empty"
            raise UserError(f"{where} cannot be read ({told})" + f": {anew}" * (DIFFERS not in told)) from error
        if (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise UserError(
                f"resume: {self.path} is of version {header.get('version')!r:.40}, this is version {VERSION} of "
                "duo_id's results: leave out resume to start anew"
            )
        for key in self.header.keys() | header.keys():
            if header.get(key) != self.header.get(key):
                raise UserError(
                    f"resume: {self.path} was made with another {key} ({_told(key, header, self.header)}): leave out "
                    "resume to start anew"
                )
        for number, row in rows:
            checked(_Written, row, f"{where}, line {number}")
            self._rows[_identity(row)] = row


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`, and its rows as `results.parquet`.

    Args:
        folder: the run folder.
        results: with `rows`, one dict a question and contender.
    """
    with atomic_path(folder / "results.parquet") as beside:
        pd.DataFrame(results["rows"]).to_parquet(beside, index=False, write_page_checksum=True)
    whole = sealed({"schema": SCHEMA, "version": VERSION} | results)
    rows = ",\n  ".join(json.dumps(row) for row in whole.pop("rows"))  # one a line
    head = json.dumps(whole | {"rows": []}, indent=1)
    write_text(folder / RESULTS, head.removesuffix("[]\n}") + f"[\n  {rows}\n ]\n}}\n")


def _told(key: str, header: ScoredRow, now: ScoredRow) -> str:
    """Where two headers differ under a key, and both values."""
    found = differences({key: header.get(key)}, {key: now.get(key)})
    return "; ".join(f"{name}={shown(old)}, not {shown(new)}" for name, (old, new) in list(found.items())[:2]) or key


def _identity(row: ScoredRow) -> tuple[Any, ...]:
    columns = ("task", "length", "index", "question", "kind", "heads", "sparsity", "seed")
    return tuple(row[column] for column in columns)
