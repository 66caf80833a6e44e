"""Text that is installed with Python and the packages that duo_id depends on: the docstrings of their modules."""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from duo_id.common.errors import UserError, check
from duo_id.common.files import whole_folder
from duo_id.common.user_cache import cached_folder

# The held-out part comes first, so that it depends on no release of torch or transformers.
PARTS = {
    "held-out": ("numpy", "pandas", "matplotlib", "networkx", "sympy"),
    "training": ("torch", "transformers", "huggingface_hub", "datasets", "accelerate"),
}
RULES = 1  # counts the changes of how documents are made from files, which old ones in the cache do not have
MIN_DOCSTRING = 200  # characters
BLANK_LINE = "\n\n"
# Skipped in the standard library: installed packages, tests, modules removed in Python 3.12 and 3.13, and the debugger,
# whose docstrings are in the embedded text too.
UNREAD = {"site-packages", "dist-packages", "test", "tests", "idle_test", "distutils", "lib2to3", "pdb.py", "bdb.py"}
# Skipped in packages: tests, copies of other packages, and transformers' models, whose docstrings repeat each other.
UNREAD_FOLDERS = {"test", "tests", "testing", "_vendor", "third_party", "models"}


@cache
def library_docstrings() -> list[str]:
    """The distinct long docstrings of Python's standard library, in the order of their files.

    They differ somewhat between versions of Python.

    Raises:
        UserError: there are none, e.g. because Python's modules are in an archive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in UNREAD]
        files += [Path(folder, name) for name in names if name.endswith(".py") and name not in UNREAD]
    documents = list(dict.fromkeys(_read(sorted(files, key=lambda file: file.relative_to(root).parts))))
    check(bool(documents), f"data.haystack.source=library: there are no docstrings in {root}, choose another source")
    return documents


@cache
def package_docstrings(part: str) -> list[str]:
    """The long docstrings of installed packages, each paragraph once, from the user's cache if it has them.

    Folders come in an order that mixes the packages, so that all regions of the text are alike.

    Args:
        part: a key of `PARTS`; they share no paragraph.

    Raises:
        UserError: a package is not installed, or without its files; or the cache cannot be used.
    """
    versions = package_versions(*PARTS)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"  # whose parser may skip files
    origin = "\n".join(f"{name} {version}" for name, version in ({"rules": RULES, "python": python} | versions).items())
    name = f"docstrings-{hashlib.sha256(origin.encode()).hexdigest()[:16]}"
    folder = cached_folder(name, partial(_write, origin))
    return list(json.loads((folder / f"{part}.json").read_text(encoding="utf-8")))


def package_versions(*parts: str) -> dict[str, str]:
    """The installed versions of the packages that parts of the text are read from.

    Raises:
        UserError: one is not installed.
    """
    return {package: _distribution(package).version for part in parts for package in PARTS[part]}


def _write(origin: str, folder: Path) -> None:
    """Write the documents of both parts to a folder, and what they were made from."""
    paragraphs: set[str] = set()
    with whole_folder(folder) as new_folder:
        for part, packages in PARTS.items():
            documents = list(_distinct(_read(_files(packages)), paragraphs))
            (new_folder / f"{part}.json").write_text(json.dumps(documents), encoding="utf-8")
        (new_folder / "origin.txt").write_text(f"{origin}\n", encoding="utf-8")


def _distribution(package: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"data.haystack.source=packages reads the docstrings of {package}, which is not installed: pip install "
            f"{package}"
        ) from error


def _files(packages: Iterable[str]) -> list[Path]:
    """The modules of installed packages, by the hash of their folder, then by name."""
    modules = []
    for package in packages:
        recorded = [file for file in _distribution(package).files or () if file.suffix == ".py"]
        of_package = [file for file in recorded if file.parts[0] == package and not UNREAD_FOLDERS & set(file.parts)]
        check(
            bool(of_package),
            f"data.haystack.source=packages: the installation of {package} does not list its modules; install it with "
            "pip, or choose another source",
        )
        modules += of_package

    def position(file: importlib.metadata.PackagePath) -> tuple[str, str]:
        return hashlib.sha256(file.parent.as_posix().encode()).hexdigest(), file.name

    return [Path(str(file.locate())) for file in sorted(modules, key=position)]


def _distinct(documents: Iterable[str], paragraphs: set[str]) -> Iterator[str]:
    """What is long in documents without the paragraphs that came before, which are added to `paragraphs`."""
    for document in documents:
        kept = []
        for paragraph in document.split(BLANK_LINE):
            words = " ".join(paragraph.split())
            if words not in paragraphs:
                paragraphs.add(words)
                kept.append(paragraph)
        if len(text := BLANK_LINE.join(kept).strip()) > MIN_DOCSTRING:
            yield text


def _read(files: Iterable[Path]) -> Iterator[str]:
    """The long docstrings of Python files."""
    long = re.compile(rb'"""[^"]{%d}' % MIN_DOCSTRING)  # parsing all files would take a third longer
    with _quick_parsing():
        for file in files:
            if long.search(source := file.read_bytes()):
                yield from docstrings(source)


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


def docstrings(source: bytes) -> Iterator[str]:
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
