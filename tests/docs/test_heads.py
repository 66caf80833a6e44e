"""The heads in results/heads/ are those of docs/lab/identification.md; its figures are drawn from evaluations."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from duo_id import load_pattern
from duo_id.common.figures import save_figure
from tests.docs.test_site import DOCS, RESULTS, drawing
from tests.evaluate.saved import a_pattern, line_up, save, saved_results

HEADS = RESULTS / "heads"
SEEDS = sorted(path.parent.relative_to(HEADS) for path in HEADS.glob("*/seed-*/heads.json"))


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_heads_record_their_provenance(seed: Path) -> None:
    pattern = load_pattern(HEADS / seed)
    pattern.check_fits(30, 3, "SmolLM2-135M-Instruct")
    assert (pattern.sink_size, pattern.recent_size) == (64, 256)
    assert pattern.provenance["seed"] == int(seed.name.removeprefix("seed-"))
    assert pattern.provenance["seconds"] > 0
    settings = pattern.provenance["settings"]
    mixture = settings["data"]["mixture"]
    without = {"needles": {"passkey", "multi_query", "key_value"}, "copying": {"copying"}, "text": {"text"}}
    left_out = without.get(seed.parent.name.partition("-without-")[2], set())
    assert {task for task, weight in mixture.items() if not weight} == left_out
    steps = re.search(r"-(\d+)-steps", seed.parent.name)
    if seed.parent.name.startswith("best"):
        assert settings["trainer"]["max_steps"] == (int(steps[1]) if steps else 400)


def test_kvpress_heads_are_of_the_same_windows() -> None:
    pattern = load_pattern(HEADS / "kvpress")
    pattern.check_fits(30, 3, "SmolLM2-135M-Instruct")
    assert (pattern.sink_size, pattern.recent_size) == (64, 256)


def test_the_figures_are_drawn_from_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = drawing("identification")
    timed = replace(a_pattern(), provenance={"seconds": 3.0})
    patterns = dict.fromkeys((*script.GOOD, "best-60-steps"), timed)
    compared = line_up(tuple(patterns), peers=False)
    save(tmp_path / "run", saved_results(2, contenders=compared, patterns=patterns))
    monkeypatch.setattr(script, "FIGURES", tmp_path)
    script.main([str(tmp_path / "run")])
    drawn = {path.stem.removeprefix("identification-") for path in tmp_path.glob("identification-*.png")}
    assert drawn == {"tasks", "depths", "budget", "cost", "agreement", "heads"}
    assert all((DOCS / "figures" / f"identification-{name}.png").is_file() for name in drawn)


def test_the_overview_shows_what_the_tables_say(tmp_path: Path) -> None:
    script = drawing("overview")
    table = script.NOW.read_text().partition(script.TABLE)[2]
    assert script.measured(table, "`best`")[3].tolist() == [0.072, 0.029]
    assert script.measured(script.EARLIER.read_text(), "random masks")[:, 0].tolist() == [0.916, 1.166]
    assert script.kept((0, 1), load_pattern(HEADS / "kvpress")).tolist() == [100, 100 * 320 / 8192]
    save_figure(script.draw(), tmp_path / "overview.png")
    drawn, kept = imread(tmp_path / "overview.png"), imread(DOCS / "figures" / "overview.png")
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 0.01


def test_the_fastest_seed_counts() -> None:
    timed = {name: {"provenance": {"seconds": seconds}} for name, seconds in {"a#0": 3.0, "a#1": 2.0, "b": 5.0}.items()}
    fastest = drawing("identification").least_seconds(timed | {"c": {"provenance": {}}})
    assert fastest == {"a": 2.0, "b": 5.0}


def test_evaluations_of_other_heads_draw_nothing(tmp_path: Path) -> None:
    save(tmp_path / "run", saved_results(2, patterns={"best": a_pattern()}))
    script = drawing("identification")
    for runs in [], [str(tmp_path / "run")]:
        with pytest.raises(SystemExit, match=r"these lack .*fisher-mixture, kvpress, published"):
            script.main(runs)
