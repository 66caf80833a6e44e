import argparse
import hashlib
import inspect
import json
import random
import string
import unittest

import pytest

from duo_id.common import user_cache
from duo_id.common.errors import UserError
from duo_id.data.docstrings import PARTS, docstrings, library_docstrings, package_docstrings
from duo_id.data.haystack import load_haystack
from duo_id.data.settings import HaystackSettings

PARAGRAPH = "What is said about {0} is longer than it has to be, and is said here and nowhere else. " * 3


def test_library_is_long_docstrings_each_once():
    documents = load_haystack(HaystackSettings("library"), "test").documents
    assert len(documents) == len(set(documents)) > 1000
    assert all(len(document) > 200 for document in documents)
    assert inspect.cleandoc(argparse.__doc__) in documents
    assert inspect.cleandoc(string.Formatter.__doc__ or "") not in documents  # it has none
    assert inspect.getdoc(random.Random.sample) in documents
    assert inspect.getdoc(unittest.TestCase) in documents
    assert not any("pytest" in document for document in documents)  # nothing that was installed
    assert load_haystack(HaystackSettings("library"), "development").documents is documents


def test_library_shares_no_text_with_what_is_embedded():
    library = " ".join(" ".join(load_haystack(HaystackSettings("library"), "test").documents).split())
    embedded = load_haystack(HaystackSettings(), "train").documents
    paragraphs = {paragraph for document in embedded for paragraph in document.split("\n\n") if len(paragraph) > 200}
    assert len(paragraphs) > 500
    assert not any(" ".join(paragraph.split()) in library for paragraph in paragraphs)


def test_docstrings_of_classes_and_functions_in_their_order():
    long = "x" * 210
    source = f'''
"""M {long} module."""
class A:
    """A {long}
    class."""
    def one(self):
        "short"
    async def two(self):
        """T {long} two."""
        def inner():
            """I {long} in."""
def last():
    """L {long} last."""
text = """N {long} no docstring."""
'''
    assert [text[0] for text in docstrings(source.encode())] == ["M", "A", "T", "I", "L"]
    assert f"A {long}\nclass." in docstrings(source.encode())
    assert list(docstrings(b"print 'no Python'")) == []


def test_a_python_without_sources_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    library_docstrings.cache_clear()
    try:
        with pytest.raises(UserError, match=r"source=library: there are no docstrings in .*, choose another source"):
            load_haystack(HaystackSettings("library"), "test")
    finally:
        library_docstrings.cache_clear()


def install(site, name, modules, version="1.0", recorded=True):
    """Install a distribution whose modules cannot be imported."""
    for path, source in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(source + "\nraise RuntimeError('nothing of a package is imported')\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if recorded:
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in modules))


def module(*subjects):
    paragraphs = "\n\n".join(PARAGRAPH.format(subject) for subject in subjects)
    return f'"""{paragraphs}"""'


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Where the two packages are installed that the text is read from."""
    site = tmp_path / "site"
    install(site, "ours", {"ours/a.py": module("apples", "pears"), "ours/b.py": module("plums"), "ours/c.txt": "x"})
    modules = {f"theirs/{folder}/m.py": module(folder) for folder in ("one", "two", "tests", "models")}
    install(site, "theirs", modules | {"theirs/n.py": module("pears", "nuts"), "elsewhere/m.py": module("else")})
    monkeypatch.setattr("duo_id.data.docstrings.PARTS", {"held-out": ("ours",), "training": ("theirs",)})
    monkeypatch.setattr(user_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.syspath_prepend(site)
    package_docstrings.cache_clear()
    user_cache._check.cache_clear()
    yield site
    package_docstrings.cache_clear()


def subjects(documents):
    names = "apples pears plums one two tests models nuts else".split()
    return [[name for name in names if f"about {name} is" in document] for document in documents]


def test_packages_give_each_paragraph_once_and_mix_their_folders(site):
    assert subjects(package_docstrings("held-out")) == [["apples", "pears"], ["plums"]]
    folders = sorted(("theirs", "theirs/one", "theirs/two"), key=lambda name: hashlib.sha256(name.encode()).digest())
    expected = {"theirs": ["nuts"], "theirs/one": ["one"], "theirs/two": ["two"]}
    assert subjects(package_docstrings("training")) == [expected[folder] for folder in folders]


def test_packages_are_read_once_and_again_when_a_version_changes(site, tmp_path):
    first = package_docstrings("held-out")
    (site / "ours" / "a.py").write_text(module("figs"))
    package_docstrings.cache_clear()
    assert package_docstrings("held-out") == first
    (folder,) = (tmp_path / "cache" / "duo_id").glob("docstrings-*")
    assert json.loads((folder / "held-out.json").read_text()) == first
    assert "ours 1.0\ntheirs 1.0\n" in (folder / "origin.txt").read_text()
    (site / "ours-1.0.dist-info").rename(site / "ours-1.1.dist-info")
    metadata = site / "ours-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    package_docstrings.cache_clear()
    assert package_docstrings("held-out") != first


def test_a_changed_file_in_the_cache_is_refused(site, tmp_path):
    package_docstrings("training")
    (path,) = (tmp_path / "cache").glob("duo_id/docstrings-*/training.json")
    path.write_text("[]")
    package_docstrings.cache_clear()
    user_cache._check.cache_clear()
    with pytest.raises(UserError, match=r"training.json is not what was written.*remove .*, which is then created"):
        package_docstrings("training")


def test_a_package_that_is_missing_or_without_files_is_named(site, monkeypatch):
    install(site, "bare", {"bare/a.py": module("bare")}, recorded=False)
    for package, message in (
        ("nosuch", "nosuch, which is not installed: pip install nosuch"),
        ("bare", "of bare does"),
    ):
        monkeypatch.setattr("duo_id.data.docstrings.PARTS", {"held-out": (package,)})
        with pytest.raises(UserError, match=f"data.haystack.source=packages.*{message}") as caught:
            package_docstrings("held-out")
        assert "\n" not in str(caught.value)


def test_parts_share_no_package():
    assert not set(PARTS["held-out"]) & set(PARTS["training"])
