"""The text that needles are hidden in: many documents as one endless stream, a part of it for each split."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from duo_id.config import HaystackSettings, require
from duo_id.errors import UserError

REGIONS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}  # fractions of the stream
BLANK_LINE = "\n\n"
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
PACKED = (".zst", ".gz")


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of plain text: none added in front or behind, and text like `<|endoftext|>` is only text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


class Haystack:
    """One split's region of the documents, which are joined by blank lines; after its end it begins again.

    Regions are cut by position in bytes (UTF-8), so no two splits share text, and only the lengths of the documents
    are needed up front: the text itself may stay on disk.
    """

    def __init__(self, documents: Sequence[str], num_bytes: np.ndarray, split: str) -> None:
        """Take `documents` (a list, or a column of a memory-mapped dataset), whose lengths are `num_bytes`, int64."""
        self.documents = documents
        self.split = split
        self.ends = np.cumsum(num_bytes + len(BLANK_LINE))  # where each document's blank line ends
        self.starts = self.ends - num_bytes - len(BLANK_LINE)
        total = int(self.ends[-1]) if len(self.ends) else 0
        first, last = REGIONS[split]
        self.start, self.stop = round(first * total), round(last * total)

    def window(self, rng: random.Random, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Exactly `num_tokens` tokens from a random place of the region on, beginning with a whole word.

        Raises:
            UserError: the whole region has fewer tokens.
        """
        start = rng.randrange(self.start, max(self.stop, self.start + 1))
        size = 5 * num_tokens + 100  # bytes; English has about 4 a token
        while True:
            size = min(size, self.stop - self.start)
            tokens = tokenize(tokenizer, self._text(start, size))
            if len(tokens) >= num_tokens:
                return tokens[:num_tokens]
            require(
                size < self.stop - self.start,
                f"the haystack's {self.split} part holds about {len(tokens)} tokens, a sample asks for {num_tokens}: "
                "lower data.length_max or give a longer one (data/haystack=file data.haystack.path=FILE)",
            )
            size *= 2

    def _text(self, start: int, size: int) -> str:
        """`size` bytes of the region from byte `start` on, past its end from its beginning, less a cut first word."""
        stop = min(start + size, self.stop)
        text = self._from_word(start, stop)
        if rest := size - (stop - start):
            text += BLANK_LINE + self._from_word(self.start, self.start + rest)
        return text

    def _from_word(self, start: int, stop: int) -> str:
        """The bytes less the word that `start` cuts; text without spaces (no word is longer than 40) stays."""
        text = self._read(start, stop)
        cut = start > 0 and not self._read(start - 1, start).isspace()
        return re.sub(r"^\S{0,40}\s+", "", text, count=1) if cut else text.lstrip()

    def _read(self, start: int, stop: int) -> str:
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        text = "".join((document or "") + BLANK_LINE for document in self.documents[first:last]).encode()
        offset = int(self.starts[first])
        return text[start - offset : stop - offset].decode(errors="ignore")


def load_haystack(settings: HaystackSettings, split: str) -> Haystack:
    """Open the haystack of one split.

    Raises:
        UserError: the file, data set or column is missing, unreadable or without text.
    """
    if settings.source == "embedded":
        documents: Sequence[str] = [topics[name] for name in sorted(topics)]
        return Haystack(documents, np.array([len(document.encode()) for document in documents]), split)
    dataset = _open_file(settings) if settings.source == "file" else _open_hub(settings)
    require(len(dataset) > 0, f"data.haystack.{_place(settings)} holds no documents")
    require(
        settings.text_key in dataset.column_names,
        f"data.haystack.text_key={settings.text_key}: data.haystack.{_place(settings)} has the columns "
        f"{', '.join(dataset.column_names)}",
    )
    column = dataset.data.column(settings.text_key)
    require(
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type),
        f"data.haystack.text_key={settings.text_key} holds {column.type}, not text",
    )
    num_bytes = pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    require(int(num_bytes.sum()) > 0, f"data.haystack.text_key={settings.text_key} holds no text")
    return Haystack(dataset[settings.text_key], num_bytes, split)


def _place(settings: HaystackSettings) -> str:
    return f"path={settings.path}" if settings.source == "file" else f"id={settings.id}"


def _open_file(settings: HaystackSettings) -> datasets.Dataset:
    """Memory-map a file, or all files of a folder; the paragraphs of a txt file are its documents."""
    path = Path(settings.path or "")
    require(path.exists(), f"data.haystack.path={path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _builder(file))
    builders = {_builder(file) for file in files}
    require(
        len(builders) == 1 and None not in builders,
        f"data.haystack.path={path}: give a txt, jsonl, jsonl.zst or parquet file, or a folder of files of one kind",
    )
    require(any(file.stat().st_size for file in files), f"data.haystack.path={path} is empty")
    (builder,) = builders
    options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # datasets wraps what it meets in many types
        raise UserError(f"data.haystack.path={path} cannot be read as {builder}: {_line(error)}") from error


def _builder(file: Path) -> str | None:
    packed = file.suffix in PACKED
    return BUILDERS.get(Path(file.stem).suffix if packed else file.suffix) if file.is_file() else None


def _open_hub(settings: HaystackSettings) -> datasets.Dataset:
    try:
        return datasets.load_dataset(settings.id, settings.name, split=settings.split, revision=settings.revision)
    except Exception as error:  # network, hub, data set and split: many types
        raise UserError(
            f"data.haystack.id={settings.id} (split {settings.split}) cannot be loaded: {_line(error)}; "
            "data.haystack.source=embedded works offline"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())
