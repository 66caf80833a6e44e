"""The site builds without a warning, holds every page, loads nothing from outside, and a browser finds its way."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module, util
from pathlib import Path
from queue import Queue
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import duo_id
from duo_id.common.figures import save_figure
from tests.report.test_page import CHROMIUM, FLAGS

ROOT = Path(__file__).parents[2]
DOCS, RESULTS, PICTURE = ROOT / "docs", ROOT / "results", "two-heads.png"
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
WARNING = re.compile(r"(?i)\b(warning|error)\b")
# Acts as a reader on every page: reports its title, heading and what was loaded, and on the front page follows the
# navigation to the quickstart.
SCRIPT = """<script>addEventListener("load", async () => {
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  const heading = document.querySelector("article h1").firstChild.textContent;
  await fetch("/reports", {method: "POST", body: JSON.stringify({title: document.title, heading, loaded})});
  if (document.title.startsWith("Home")) document.querySelector("nav a[href$='quickstart.html']").click();
});</script></body>"""


def pages(nav: list[dict[str, Any]]) -> list[str]:
    """The files that a navigation leads to."""
    names: list[str] = []
    for entry in nav:
        for value in entry.values():
            names += pages(value) if isinstance(value, list) else [value]
    return names


def build(root: Path) -> subprocess.CompletedProcess:
    """Build the site of a copy of the sources."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    paths = os.pathsep.join([str(root / "src"), *inherited])
    environment = os.environ | {"PYTHONPATH": paths, "NO_COLOR": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


def copy_to(root: Path) -> Path:
    """Copies the sources of the site, so that nothing is written here."""
    shutil.copy(ROOT / "zensical.toml", root)
    shutil.copytree(DOCS, root / "docs")
    (root / "src").symlink_to(ROOT / "src")
    return root


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    root = copy_to(tmp_path_factory.mktemp("site"))
    done = build(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not WARNING.search(done.stdout + done.stderr), (
        done.stdout + done.stderr
    )  # of docstrings, which --strict lets by
    return root / CONFIG["site_dir"]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages(CONFIG["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_lab_notes_are_the_last_section() -> None:
    lab = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "lab").glob("*.md"))
    assert sorted(CONFIG["nav"][-1]) == ["Lab notes"]
    assert sorted(pages(CONFIG["nav"][-1:])) == lab


def test_every_page_is_built_and_searched(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert built == {*pages(CONFIG["nav"]), "404.md"}
    index = json.loads((site / "search.json").read_text())
    searched = {entry["location"].partition("#")[0] for entry in index["items"]}
    assert {Path(page).with_suffix(".html").as_posix() for page in pages(CONFIG["nav"])} <= searched


@pytest.mark.parametrize("name", duo_id.__all__)
def test_the_api_page_has_every_public_name(name: str, site: Path) -> None:
    text = (site / "api.html").read_text()
    (path,) = re.findall(rf'<h\d id="(duo_id\.[\w.]+\.{name})"', text)
    module, _, _ = path.rpartition(".")
    assert getattr(import_module(module), name) is getattr(duo_id, name)


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text()
        )
        assert loads
        assert not [target for target in loads if re.match(r"(?:https?:)?//", target)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet.name


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    root = copy_to(tmp_path)
    (root / "docs" / "index.md").write_text("# Home\n\n[nowhere](nowhere.md)\n")
    (root / "docs" / "api.md").write_text("# Python API\n")  # it takes longest
    done = build(root)
    assert done.returncode != 0
    assert "page does not exist" in done.stderr


class Handler(SimpleHTTPRequestHandler):
    """Serves the site with the script on its pages."""

    reports: Queue[dict[str, Any]]

    def do_GET(self) -> None:
        """A file."""
        if not self.path.endswith(".html"):
            return super().do_GET()
        page = Path(self.directory, self.path[1:]).read_text().replace("</body>", SCRIPT).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page)
        return None

    def do_POST(self) -> None:
        """A report of the script."""
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def served(site: Path) -> Iterator[tuple[str, Queue[dict[str, Any]]]]:
    """The address of the served site, and what a browser reports from there."""
    reports: Queue[dict[str, Any]] = Queue()
    handler = partial(type("Reporting", (Handler,), {"reports": reports}), directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", reports
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_finds_its_way(served: tuple[str, Queue[dict[str, Any]]], tmp_path: Path) -> None:
    address, reports = served
    command = [str(CHROMIUM), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={tmp_path}"]
    with subprocess.Popen([*command, f"{address}index.html"], stderr=subprocess.DEVNULL) as browser:
        try:
            home, quickstart = reports.get(timeout=120), reports.get(timeout=120)
        finally:
            browser.terminate()
    assert (home["title"], home["heading"]) == ("Home - duo_id", "duo_id")
    assert (quickstart["title"], quickstart["heading"]) == ("Quickstart - duo_id", "Quickstart")
    loaded = home["loaded"] + quickstart["loaded"]
    assert any(target.endswith("figures/gates.png") for target in loaded)
    assert not [target for target in loaded if not target.startswith((address, "data:", f"blob:{address}"))]


def drawing(name: str) -> ModuleType:
    """A script of results/figures/."""
    spec = util.spec_from_file_location(name, RESULTS / "figures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_code_draws(tmp_path: Path) -> None:
    script = drawing("two_heads")
    save_figure(script.draw(), tmp_path / PICTURE)
    drawn, kept = imread(tmp_path / PICTURE), imread(DOCS / "figures" / PICTURE)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 0.01
    full, streaming = (script.kinds(window) for window in script.HEADS.values())
    assert np.array_equal(full > 0, np.tri(script.TOKENS))
    assert np.count_nonzero(streaming[-1]) == script.WINDOW.sink_size + script.WINDOW.recent_size
    assert full[-1, script.NEEDLE] == 3 > streaming[-1, script.NEEDLE] == 0
