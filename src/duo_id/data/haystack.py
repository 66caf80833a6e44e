"""The text that hides needles: many documents as one endless stream, with a region for each split."""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.docstrings import library_docstrings, package_docstrings, package_versions
from duo_id.data.settings import DataSettings, HaystackSettings

# The region of each split, in fractions of the stream. Evaluations use the splits development and test.
REGIONS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0), "development": (0.7, 0.85)}
HALVES = {"development": (0.0, 0.5), "test": (0.5, 1.0)}  # of texts that are never trained on
BLANK_LINE = "\n\n"
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
PACKED = (".zst", ".gz")
HASHED = 64 * 2**20  # bytes of text in a digest, besides the lengths of all documents
LONGER = "use a longer one (data.haystack.source=packages, or data.haystack.source=file data.haystack.path=FILE)"


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of plain text, without special tokens; text like `<|endoftext|>` is ordinary text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer prepends to a text, if any."""
    plain, full = tokenize(tokenizer, "text"), list(tokenizer("text")["input_ids"])
    starts = [start for start in range(len(full) - len(plain) + 1) if full[start : start + len(plain)] == plain]
    return full[: starts[0]] if starts else []


class Haystack:
    """One split's region of the documents, which are joined by blank lines; it wraps around at its end.

    Regions are cut at byte positions (UTF-8), so no two splits share text, and only the lengths of the documents are
    needed up front: the text itself may stay on disk.
    """

    def __init__(
        self,
        documents: Sequence[str],
        num_bytes: np.ndarray,
        split: str,
        regions: Mapping[str, tuple[float, float]] = REGIONS,
        advice: str = LONGER,
        name: str = "",
    ) -> None:
        """Take the documents and one split's region of them.

        Args:
            documents: a list, or a column of a memory-mapped dataset.
            num_bytes: their lengths, int64.
            split: a key of `regions`.
            regions: start and end of each split, in fractions of the stream.
            advice: what to do where the region is too short, besides lowering lengths.
            name: what messages call the region; empty: the haystack's part of that split.
        """
        self.documents = documents
        self.name = name or f"the haystack's {split} part"
        self.ends = np.cumsum(num_bytes + len(BLANK_LINE))  # where each document's blank line ends
        self.starts = self.ends - num_bytes - len(BLANK_LINE)
        total = int(self.ends[-1]) if len(self.ends) else 0
        first, last = regions[split]
        self.start, self.stop = round(first * total), round(last * total)
        self.advice = advice
        self._bytes_read = 0

    @property
    def reads(self) -> float:
        """How many times the windows so far have read each stretch of the region, on average."""
        return self._bytes_read / max(self.stop - self.start, 1)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of the lengths of all documents and the first 64 MiB of their text."""
        digest, hashed = hashlib.sha256(self.ends.astype("<i8").tobytes()), 0
        for document in self.documents:
            if hashed >= HASHED:
                break
            text = (document or "").encode()
            digest.update(text)
            hashed += len(text)
        return digest.hexdigest()

    def window(self, rng: random.Random, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Exactly `num_tokens` tokens from a random position in the region, starting with a whole word.

        Raises:
            UserError: the whole region has fewer tokens.
        """
        start = rng.randrange(self.start, max(self.stop, self.start + 1))
        size = 5 * num_tokens + 100  # bytes; English has about 4 per token
        while True:
            size = min(size, self.stop - self.start)
            tokens = tokenize(tokenizer, self._text(start, size))
            if len(tokens) >= num_tokens:
                self._bytes_read += size * num_tokens // max(len(tokens), 1)
                return tokens[:num_tokens]
            check(
                size < self.stop - self.start,
                f"{self.name} has about {len(tokens)} tokens, but a sample needs {num_tokens}: "
                f"lower data.length_max (lengths, in an evaluation) or {self.advice}",
            )
            size *= 2

    def _text(self, start: int, size: int) -> str:
        """`size` bytes of the region from byte `start` on, wrapping around, without a cut first word."""
        stop = min(start + size, self.stop)
        text = self._from_word(start, stop)
        if remaining := size - (stop - start):
            text += BLANK_LINE + self._from_word(self.start, self.start + remaining)
        return text

    def _from_word(self, start: int, stop: int) -> str:
        """The text without the word that `start` cuts; text without spaces (words over 40 characters) is kept."""
        text = self._read(start, stop)
        cut = start > 0 and not self._read(start - 1, start).isspace()
        return re.sub(r"^\S{0,40}\s+", "", text, count=1) if cut else text.lstrip()

    def _read(self, start: int, stop: int) -> str:
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, stop, "left"))
        text = "".join((document or "") + BLANK_LINE for document in self.documents[first:last]).encode()
        offset = int(self.starts[first])
        return text[start - offset : stop - offset].decode(errors="ignore")


def load_haystack(settings: HaystackSettings, split: str, held_out: bool = False) -> Haystack:
    """Open the haystack of one split: train, validation or test; in an evaluation, development or test.

    Args:
        settings: of the text.
        split: a key of `REGIONS`.
        held_out: for an evaluation; packages then give a text that is never trained on.

    Raises:
        UserError: the file, data set or column is missing, unreadable or without text, or reserved for evaluation; or
            the text is not the one whose digest the settings have.
    """
    haystack = _open(settings, split, held_out)
    check(
        settings.sha256 in (None, haystack.digest),
        f"data.haystack.sha256={settings.sha256}: the text of data.haystack.source={settings.source} has the digest "
        f"{haystack.digest} here: restore the versions or files that it was read from, or start a new run without "
        "data.haystack.sha256",
    )
    return haystack


def with_digest(settings: DataSettings) -> DataSettings:
    """The settings with the digest of the text that training samples are made from, as a run records them.

    Raises:
        UserError: see `load_haystack`.
    """
    if settings.task == "disk":  # whose samples are finished
        return settings
    digest = load_haystack(settings.haystack, "test").digest
    return replace(settings, haystack=replace(settings.haystack, sha256=digest))


def text_versions(settings: HaystackSettings, held_out: bool = False) -> dict[str, str]:
    """The versions of the packages that the text is read from, for the record."""
    return package_versions("held-out" if held_out else "training") if settings.source == "packages" else {}


def _open(settings: HaystackSettings, split: str, held_out: bool) -> Haystack:
    if settings.source == "library":
        check(
            split in HALVES,
            "data.haystack.source=library is reserved for evaluation: train on data/haystack=embedded, packages, file "
            "or hub",
        )
        return _of_documents(library_docstrings(), split, HALVES)
    if settings.source == "packages":
        part, regions = ("held-out", HALVES) if held_out else ("training", REGIONS)
        return _of_documents(package_docstrings(part), split, regions)
    if settings.source == "embedded":
        return _of_documents([topics[name] for name in sorted(topics)], split, REGIONS)
    dataset = _open_file(settings) if settings.source == "file" else _open_hub(settings)
    check(len(dataset) > 0, f"data.haystack.{_source(settings)} holds no documents")
    check(
        settings.text_key in dataset.column_names,
        f"data.haystack.text_key={settings.text_key}: data.haystack.{_source(settings)} has the columns "
        f"{', '.join(dataset.column_names)}",
    )
    column = dataset.data.column(settings.text_key)
    check(
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type),
        f"data.haystack.text_key={settings.text_key} of data.haystack.{_source(settings)} is {column.type}, not text",
    )
    num_bytes = pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    check(
        int(num_bytes.sum()) > 0,
        f"data.haystack.text_key={settings.text_key} of data.haystack.{_source(settings)} holds no text",
    )
    return Haystack(dataset[settings.text_key], num_bytes, split)


def _of_documents(documents: Sequence[str], split: str, regions: Mapping[str, tuple[float, float]]) -> Haystack:
    return Haystack(documents, np.array([len(document.encode()) for document in documents]), split, regions)


def _source(settings: HaystackSettings) -> str:
    return f"path={settings.path}" if settings.source == "file" else f"id={settings.id}"


def _open_file(settings: HaystackSettings) -> datasets.Dataset:
    """Memory-map a file, or all files of a folder; the documents of a txt file are its paragraphs."""
    path = Path(settings.path or "")
    check(path.exists(), f"data.haystack.path={path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _builder(file))
    builders = {_builder(file) for file in files}
    check(
        len(builders) == 1 and None not in builders,
        f"data.haystack.path={path}: use a txt, jsonl, jsonl.zst or parquet file, or a folder of files of one kind",
    )
    check(any(file.stat().st_size for file in files), f"data.haystack.path={path} is empty")
    (builder,) = builders
    options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # datasets raises many types
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
