"""The page is complete, loads nothing, escapes everything, and renders in a browser; runs are read and merged."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from duo_id.common.errors import UserError
from duo_id.patterns.files import contents_of
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.page import LARGEST_SVG, FigureEmbedder, report
from duo_id.report.runs import RunFolder, free_name, merge, read_run
from duo_id.report.summary import frame
from tests.evaluate.saved import MODEL, a_pattern, line_up, save, saved_results

HOSTILE = "\"><script>alert(1)</script><img src=//x onerror=alert(2)>'&--> $x$ \x00\ud800\n]]>"
VOID = {"meta", "link", "br", "img", "hr", "input"}
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
).split()


class Page(HTMLParser):
    """Tags, attributes, ids and texts of a page; all elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def hostile_results() -> dict:
    """Every text on the page is hostile."""
    contenders = line_up((HOSTILE,), (0.5,))
    results = saved_results(1, ("needle-words", "json-lookup"), (1000,), contenders, {HOSTILE: a_pattern()})
    for row in results["rows"]:
        row["task"] = HOSTILE + row["task"]
        row["text"] = HOSTILE
    for contender in contenders:
        contender["note"] = HOSTILE
    model = {key: value if isinstance(value, int) else HOSTILE for key, value in MODEL.items()}
    changes = {"settings": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "split": HOSTILE, "model": model}
    return results | changes


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two models and a training run."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        RunFolder("one", MODEL, results := saved_results(2, lengths=(1000,)), patterns=results["patterns"]),
        trained("a/training"),
        read_run(save(folder / "hostile", hostile_results())),
    ]
    (folder / "report.html").write_text(report(runs))
    return folder / "report.html"


def trained(name: str, pattern: HeadPattern | None = None) -> RunFolder:
    scored = [
        {"heads": heads, "sparsity": sparsity, "answer_loss": 1.5, "token_accuracy": 0.25, "exact_answers": 0.5}
        for heads, sparsity in (("full", 0.0), ("found", 0.5), ("random", 0.5), ("random", 0.5))
    ]
    summary = {"model": MODEL, "steps": 7, "seed": 3, "mean_gate": 0.5, "seconds": {"train": 2.0}, "results": scored}
    metrics = frame(saved_results(1, ("language",)))[["loss"]].rename(columns={"loss": "train/distill"})
    contents = {name: contents_of(pattern or a_pattern(5))}
    return RunFolder(name, MODEL, None, summary, metrics.assign(step=range(len(metrics))), contents)


def test_the_page_is_whole_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert text.endswith("</html>")
    links = parsed.values("src") + parsed.values("href") + parsed.values("xlink:href") + parsed.values("srcset")
    assert len(links) > 20
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {reference.strip("'\"") for reference in re.findall(r"url\(#([^)]+)\)", text)} <= set(ids)


def test_the_page_says_what_was_compared(page: Path) -> None:
    parsed = Page(page.read_text())
    for text in (
        *("Tiny-4L", "nobody/Tiny-4L", "float32", "torch 2.13.0", "without a chat template", "test split, seed 0"),
        *("28 questions on 8 contexts", "question not seen while evicting", "random (5 masks)"),
        *("head patterns", "token eviction", "Training: a/training", "mean gate", "amber harbour"),
    ):
        assert text in parsed.text, text
    svgs = parsed.tags.count("svg") + sum(src.startswith("data:image/png") for src in parsed.values("src"))
    assert svgs == parsed.tags.count("figure") == parsed.tags.count("figcaption")
    assert svgs == 7 + 2 + 1 + 3, (
        "of the evaluation, of its heads and those of training, of training, of the hostile run"
    )
    values = [value for value in parsed.values("data-value") if value]
    assert all(np.isfinite(float(value)) or value == "-inf" for value in values)


def test_all_texts_are_escaped(page: Path) -> None:
    parsed = Page(page.read_text())
    assert parsed.tags.count("script") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not [source for source in parsed.values("src") if not source.startswith("data:")]
    assert 'class="right' in page.read_text()
    assert parsed.text.count("<script>alert(1)</script>") > 10
    assert not re.search(r"[\x00-\x08]", page.read_text())


def test_one_contender_one_task_one_length() -> None:
    for task in ("language", "json-lookup"):
        results = saved_results(1, (task,), (1000,), line_up(peers=False)[:1], patterns={})
        parsed = Page(report([RunFolder("one", MODEL, results)]))
        assert "full attention" in parsed.text
        assert "nan" not in parsed.text


def test_conversations_and_long_answers_have_tables() -> None:
    results = saved_results(2, ("json-lookup",), (1000,), line_up(peers=False))
    for row in results["rows"]:
        row |= {"turn": row["question"] + 1, "pieces": "110101"}
    text = Page(report([RunFolder("run", MODEL, results, patterns=results["patterns"])])).text
    assert "By turn of a conversation that keeps the model's answers" in text
    assert "Right lines of long answers, by their place in the answer" in text


def test_large_figures_become_pngs(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = a_pattern().plot()
    assert str(FigureEmbedder(print)(figure, "a < b")["image"]).startswith('<svg role="img" aria-label="a &lt; b"')
    monkeypatch.setattr("duo_id.report.page.LARGEST_SVG", 100)
    assert LARGEST_SVG > 100
    image = FigureEmbedder(print)(figure, "a < b")["image"]
    assert re.match(r'<img src="data:image/png;base64,[\w+/=]+" alt="a &lt; b">$', image)


def test_runs_of_the_same_questions_are_merged() -> None:
    first = saved_results(1, ("language",), (1000,), line_up(sparsities=(0.25,)))
    second = saved_results(1, ("language",), (1000, 2000), line_up(sparsities=(0.25, 0.5)))
    other_seed = saved_results(1, ("language",), (1000,), seed=1)
    (both, alone) = merge([first, second, other_seed])
    assert len(both["rows"]) == len(second["rows"])
    assert both["contenders"] == second["contenders"]
    assert both["all_settings"] == [first["settings"], second["settings"]]
    assert alone["rows"] == other_seed["rows"]
    for change in ({"split": "development"}, {"chat_template": True}, {"model": MODEL | {"dtype": "bfloat16"}}):
        assert len(merge([first, first | change])) == 2
    wider = contents_of(HeadPattern(a_pattern().scores, 16, 128))
    assert len(merge([first, first | {"patterns": {"found": wider}}])) == 2, "their baselines have other windows"


def test_runs_of_other_samples_stay_apart() -> None:
    first = saved_results(1, ("language",), (1000,))
    first |= {"rows": [row | {"sample": "a"} for row in first["rows"]]}
    other = first | {"rows": [row | {"sample": "b", "loss": row["loss"] + 5} for row in first["rows"]]}
    assert [merged["rows"] for merged in merge([first, other, first])] == [first["rows"], other["rows"]]


def test_an_answer_with_text_wins() -> None:
    first = saved_results(1, ("json-lookup",), (1000,))
    silent = [row | {"text": None, "score": None, "loss": 9.0} for row in first["rows"]]
    for order in ([first, first | {"rows": silent}], [first | {"rows": silent}, first]):
        (both,) = merge(order)
        assert both["rows"] == first["rows"]
    later = [row | {"loss": 9.0} for row in first["rows"]]
    assert merge([first, first | {"rows": later}])[0]["rows"] == later


def test_patterns_of_the_same_name_are_told_apart() -> None:
    first = saved_results(1, ("language",), (1000,), line_up(sparsities=(0.25,)))
    other = saved_results(1, ("language",), (1000,), line_up(sparsities=(0.25,)), {"found": a_pattern(1)})
    (both,) = merge([first, other, other])
    assert list(both["patterns"]) == ["found", "found [2]"]
    assert both["patterns"]["found [2]"] == other["patterns"]["found"]
    rows = frame(both)
    assert rows.groupby("heads").size()[["found", "found [2]"]].tolist() == [5, 5]
    assert len(rows) == len(first["rows"]) + 5
    assert [entry["heads"] for entry in both["contenders"] if entry["kind"] == "pattern"] == ["found", "found [2]"]
    assert free_name("found", first["patterns"]["found"], both["patterns"]) == "found"


def test_runs_are_read(tmp_path: Path) -> None:
    results = saved_results(1, ("language",))
    folder = save(tmp_path / "2026-11-24" / "03-23-49", results)
    run = read_run(folder)
    assert (run.name, run.model) == ("2026-11-24/03-23-49", MODEL)
    assert run.results is not None
    assert read_run(folder / "results.json").results == run.results
    with pytest.raises(UserError, match="missing: give run folders"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"results\.json is missing"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match=r"summary\.json lacks model"):
        read_run(tmp_path)


def chromium(*flags: str, page: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run the browser on a page without persistent state."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    process = chromium("--dump-dom", page=page, folder=tmp_path)
    assert not re.search(r"CONSOLE|Refused|Uncaught", process.stderr), process.stderr
    shown = Page(process.stdout)
    assert shown.tags.count("table") == Page(page.read_text()).tags.count("table")
    assert shown.tags.count("button") == shown.tags.count("th") - 2 * 2, "all headings sort but those of sections"
    assert shown.tags.count("figure") == Page(page.read_text()).tags.count("figure")
    assert "alert(1)" in shown.text
    assert not [name for name, _ in shown.attributes if name.startswith("on")]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_sorts(page: Path, tmp_path: Path) -> None:
    """The page with a script that clicks the heading of the answer loss twice."""
    clicks = "<script>for (const _ of [1, 2]) document.querySelectorAll('table th button')[3].click();</script></body>"
    (tmp_path / "clicked.html").write_text(page.read_text().replace("</body>", clicks))
    text = chromium("--dump-dom", page=tmp_path / "clicked.html", folder=tmp_path).stdout
    table = text[text.index("<tbody") : text.index("</table>")]
    for body in table.split("</tbody>")[:2]:
        lines = [re.findall(r'data-value="([^"]*)"', line) for line in body.split("<tr")]
        losses = [float(line[2]) for line in lines if line]
        assert len(losses) >= 3
        assert losses == sorted(losses, reverse=True)
        assert "rowgroup" in body.split("</tr>")[0], "the section's title stays on top"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_picture_is_not_blank(width: int, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium(f"--window-size={width},4000", f"--screenshot={picture}", page=page, folder=tmp_path)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (4000, width)
    dark = (pixels.max(-1) < 0.4).mean(1)  # of each line
    assert (dark > 0).mean() > 0.3, "text"
    coloured = (np.ptp(pixels, axis=-1) > 0.3).mean()
    assert coloured > 0.002, "figures"
    assert (pixels > 0.99).all(-1).mean() > 0.5, "on white"
