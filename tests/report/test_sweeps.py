"""Sweeps read back: their jobs and differing overrides, tables, figures and the page."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from duo_id.common.errors import UserError
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from duo_id.report.__main__ import _read_sweep
from duo_id.report.page import report
from duo_id.report.sweep_figures import plot_history, plot_losses, sweep_figures
from duo_id.report.sweeps import Sweep, grids, is_sweep, read_sweep


def job(folder: Path, *overrides: str, loss: float | None = None, error: str = "") -> None:
    """A job's folder as a run leaves it; its losses rise with sparsity."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["model=tiny", *overrides]))
    if error:
        (folder / "error.txt").write_text(error)
    if loss is None:
        return
    rows = [
        {"heads": heads, "sparsity": sparsity, "answer_loss": loss + sparsity}
        for heads, sparsity in (("full", 0.0), ("found", 0.25), ("found", 0.5), ("random", 0.5), ("streaming", 1.0))
    ]
    summary = {"model": {"name": "Tiny", "id": "tiny"}, "validation_loss": loss + 0.1, "results": rows}
    (folder / "summary.json").write_text(json.dumps(summary))
    scores = torch.rand(3, 2, generator=torch.Generator().manual_seed(round(1000 * loss)))
    save_pattern(HeadPattern(scores, 4, 60), folder / "heads")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two settings with two seeds each, a job that failed and one that was killed."""
    sweep = tmp_path / "sweep"
    for number, (weight, seed, loss) in enumerate([("0.1", 0, 2.0), ("0.1", 1, 2.2), ("0.5", 0, 1.0), ("0.5", 1, 1.4)]):
        job(sweep / str(number), f"method.reg_weight={weight}", f"seed={seed}", loss=loss)
    job(sweep / "10", "method.reg_weight=9", "seed=0", error="method.reg_weight=9 is too much")
    job(sweep / "9", "method.reg_weight=0.5", "seed=2")
    (sweep / "multirun.yaml").write_text("hydra: {}")
    return sweep


@pytest.fixture
def sweep(folder: Path) -> Sweep:
    return read_sweep(folder)


def texts(read: Sweep, title: str) -> list[list[str]]:
    return [[str(cell) for cell in line] for line in grids(read)[title].sections[""]]


def test_jobs_stand_in_order_and_differ_in_what_varies(sweep: Sweep) -> None:
    assert [job.name for job in sweep.jobs] == ["0", "1", "2", "3", "9", "10"]
    assert sweep.varied == ["method.reg_weight", "seed"]
    assert [job.name for job in sweep.ended] == ["2", "3", "0", "1"]


def test_table_has_losses_at_each_sparsity_the_best_job_first(sweep: Sweep) -> None:
    grid = grids(sweep)["jobs"]
    assert grid.headings[:4] == ["job", "method.reg_weight", "seed", "validation\nloss"]
    assert grid.headings[4:] == ["full\nloss", "loss,\n25%", "loss,\n50%"]
    assert texts(sweep, "jobs")[0] == ["2", "0.5", "0", "1.100", "1.000", "1.250", "1.500"]


def test_settings_are_averaged_over_seeds(sweep: Sweep) -> None:
    best = texts(sweep, "over the seeds")[0]
    assert best[:3] == ["method.reg_weight=0.5", "2", "1.300 ± 0.283"]
    assert best[-1] == "1.700 ± 0.283"


def test_failed_jobs_are_listed_with_the_reason(sweep: Sweep) -> None:
    killed, failed = texts(sweep, "failed")
    assert (killed[0], failed[0]) == ("9", "10")
    assert failed[-1] == "method.reg_weight=9 is too much"
    assert "killed" in killed[-1]


def test_losses_are_drawn_by_setting(sweep: Sweep) -> None:
    axes = plot_losses(sweep).axes[0]
    lines = {str(container.get_label()): container.lines[0].get_ydata().tolist() for container in axes.containers}
    assert lines == {
        "method.reg_weight=0.5": pytest.approx([1.45, 1.7]),
        "method.reg_weight=0.1": pytest.approx([2.35, 2.6]),
    }


def test_history_falls_to_the_best(sweep: Sweep) -> None:
    jobs, best, failed = plot_history(sweep).axes[0].lines
    assert jobs.get_ydata().tolist() == pytest.approx([2.1, 2.3, 1.1, 1.5])
    assert best.get_ydata().tolist() == pytest.approx([2.1, 2.1, 1.1, 1.1])
    assert list(failed.get_xdata()) == [4, 5]


def test_an_optimised_sweep_has_its_history(folder: Path) -> None:
    assert not any("best so far" in caption for caption in sweep_figures(read_sweep(folder)))
    (folder / "optimization_results.yaml").write_text("name: optuna")
    assert any("best so far" in caption for caption in sweep_figures(read_sweep(folder)))


def test_the_page_shows_tables_failures_and_agreement(sweep: Sweep) -> None:
    page = report([], sweeps=[sweep])
    for words in ("Sweep: ", "4 of 6 finished", "method.reg_weight=9 is too much", "rank correlation"):
        assert words in page
    assert page.count("<svg") + page.count("<img") == 2  # losses and agreement


@pytest.mark.parametrize("name", ["summary.json", "heads/heads.json"])
def test_a_folder_in_place_of_a_file_is_named(name: str, folder: Path) -> None:
    ended = next(path.parent for path in sorted(folder.glob("*/summary.json")))
    (ended / name).unlink()
    (ended / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder"):
        read_sweep(folder)


def test_bad_sweeps_are_one_line(tmp_path: Path) -> None:
    assert not is_sweep(tmp_path)
    with pytest.raises(UserError, match="without jobs"):
        read_sweep(tmp_path)
    job(tmp_path / "0", "seed=0", error="it broke")
    with pytest.raises(UserError, match="none of the 1 jobs has come to its end; job 0: it broke"):
        _read_sweep(str(tmp_path))
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("")
    (only,) = read_sweep(tmp_path).jobs
    assert (only.overrides, only.error) == ({}, "it broke")
    (tmp_path / "0" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="0 is not a job of a sweep"):
        read_sweep(tmp_path)
