"""The text that hides needles: many documents as one endless stream, with a region for each split."""

import ast
import functools
import gc
import inspect
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.settings import HaystackSettings

# The region of each split, in fractions of the stream. Evaluations use the splits development and test.
REGIONS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0), "development": (0.7, 0.85)}
HALVES = {"development": (0.0, 0.5), "test": (0.5, 1.0)}  # of the library, which is never trained on
BLANK_LINE = "\n\n"
BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
PACKED = (".zst", ".gz")
# Skipped in the library: installed packages, tests, modules removed in Python 3.12 and 3.13, and the debugger, whose
# docstrings are in the embedded text too.
UNREAD = {"site-packages", "dist-packages", "test", "tests", "idle_test", "distutils", "lib2to3", "pdb.py", "bdb.py"}
MIN_DOCSTRING = 200  # characters


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
    ) -> None:
        """Take the documents and one split's region of them.

        Args:
            documents: a list, or a column of a memory-mapped dataset.
            num_bytes: their lengths, int64.
            split: a key of `regions`.
            regions: start and end of each split, in fractions of the stream.
        """
        self.documents = documents
        self.split = split
        self.ends = np.cumsum(num_bytes + len(BLANK_LINE))  # where each document's blank line ends
        self.starts = self.ends - num_bytes - len(BLANK_LINE)
        total = int(self.ends[-1]) if len(self.ends) else 0
        first, last = regions[split]
        self.start, self.stop = round(first * total), round(last * total)

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
                return tokens[:num_tokens]
            check(
                size < self.stop - self.start,
                f"the haystack's {self.split} part has about {len(tokens)} tokens, but a sample needs {num_tokens}: "
                "lower data.length_max (lengths, in an evaluation) or use a longer one (data/haystack=file "
                "data.haystack.path=FILE)",
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


def load_haystack(settings: HaystackSettings, split: str) -> Haystack:
    """Open the haystack of one split: train, validation or test; in an evaluation, development or test.

    Raises:
        UserError: the file, data set or column is missing, unreadable or without text, or reserved for evaluation.
    """
    if settings.source == "library":
        check(
            split in HALVES,
            "data.haystack.source=library is reserved for evaluation: train on data/haystack=embedded, file or hub",
        )
        return Haystack(*_library(), split, HALVES)
    if settings.source == "embedded":
        documents = [topics[name] for name in sorted(topics)]
        return Haystack(documents, _lengths(documents), split)
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


@functools.cache
def _library() -> tuple[list[str], np.ndarray]:
    """The distinct long docstrings of Python's standard library, in the order of their files, and their lengths.

    They differ somewhat between versions of Python.

    Raises:
        UserError: there are none, e.g. because Python's modules are in an archive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in UNREAD]
        files += [Path(folder, name) for name in names if name.endswith(".py") and name not in UNREAD]
    long = re.compile(rb'"""[^"]{%d}' % MIN_DOCSTRING)  # parsing all files would take a third longer
    sources = (file.read_bytes() for file in sorted(files, key=lambda file: file.relative_to(root).parts))
    with _quick_parsing():
        docstrings = dict.fromkeys(text for source in sources if long.search(source) for text in _docstrings(source))
    check(bool(docstrings), f"data.haystack.source=library: there are no docstrings in {root}, choose another source")
    documents = list(docstrings)
    return documents, _lengths(documents)


@contextmanager
def _quick_parsing() -> Iterator[None]:
    """Disable garbage collection, which would double the time, and syntax warnings of the parsed files."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        if collects:
            gc.enable()


def _docstrings(source: bytes) -> Iterator[str]:
    """The long docstrings of a module, its classes and functions."""
    try:
        nodes: list[ast.stmt | ast.Module] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # not valid in this version of Python
        return
    while nodes:
        node = nodes.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text and len(text := inspect.cleandoc(text)) > MIN_DOCSTRING:
            yield text
        nodes += reversed(node.body)


def _lengths(documents: Sequence[str]) -> np.ndarray:
    return np.array([len(document.encode()) for document in documents])


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
