"""Any method through the command: several seeds; searches that are interrupted, resumed and refined."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from duo_id import load_pattern
from duo_id.common.integrity import sealed
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.random import random_scores
from duo_id.patterns.combining import normalized_ranks
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from duo_id.step import recompute
from duo_id.step.memory import MemoryPlanner, Plan
from duo_id.step.recompute import Keep
from duo_id.train import fit_gates
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.gate_training import GateTraining
from duo_id.train.plots import read_metrics
from tests.support.commands import QUICK, run_command

SMALL = ["comparison.samples=1", "comparison.random_masks=0", "comparison.validation_samples=0"]
SEARCH = [*(override for override in QUICK if "method" not in override), *SMALL, "method=search", "method.samples=1"]
SEARCH += ["method.sink_size=4", "method.recent_size=60"]


def test_several_seeds_are_one_run_whose_scores_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def noted(*arguments: Any) -> GateTraining:
        training = GateTraining(*arguments)
        seeds.append(training.gates.seed)
        return training

    monkeypatch.setattr(fit_gates, "GateTraining", noted)
    finished = run_command("train", *QUICK, *SMALL, "repeats=2", "seed=3", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert seeds == [3, 4]
    assert "rank correlation" in finished.output
    folders = [tmp_path / "run" / name for name in ("seed-3", "seed-4")]
    first, second = (load_pattern(folder) for folder in folders)
    assert not torch.equal(first.scores, second.scores)
    assert [pattern.provenance["seed"] for pattern in (first, second)] == [3, 4]
    averaged = load_pattern(tmp_path / "run")
    assert torch.equal(averaged.scores, (first.scores + second.scores) / 2)
    assert averaged.provenance["seeds"] == [3, 4]
    assert all((folder / "figures" / "training.png").is_file() for folder in folders)
    (folders[1] / "heads" / "heads.json").unlink()  # as if stopped in the second
    (folders[0] / "figures" / "training.png").unlink()  # and once before, ahead of the figure
    modified = (folders[0] / "heads" / "heads.json").stat().st_mtime_ns
    resumed = run_command("train", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert (folders[0] / "heads" / "heads.json").stat().st_mtime_ns == modified
    assert torch.equal(load_pattern(tmp_path / "run").scores, averaged.scores)
    assert (folders[0] / "figures" / "training.png").is_file()


LIGHTNING = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    "callbacks",
    [
        f"[{{_target_: {LIGHTNING}.LearningRateMonitor}}, {{_target_: {LIGHTNING}.ModelCheckpoint, dirpath: theirs, "
        "every_n_train_steps: 1}]",
        f"{{_target_: {LIGHTNING}.LearningRateMonitor}}",
    ],
)
def test_user_callbacks_are_called_along_with_ours(callbacks: str, tmp_path: Path) -> None:
    finished = run_command("train", *QUICK, *SMALL, f"+trainer.callbacks={callbacks}", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert "lr-AdamW" in read_metrics(tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    assert (tmp_path / "run" / "gates.csv").is_file()
    assert list((tmp_path / "theirs").glob("*.ckpt")) or callbacks.startswith("{")


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("+trainer.enable_progress_bar=false", False),
        (f"+trainer.callbacks=[{{_target_: {LIGHTNING}.TQDMProgressBar}}]", False),
        ("+trainer.callbacks=[]", True),
    ],
)
def test_the_bar_can_be_turned_off_or_be_another(override: str, shown: bool, tmp_path: Path) -> None:
    finished = run_command("train", *QUICK, *SMALL, override, folder=tmp_path)
    assert finished.status == 0, finished.output
    assert ("step 2/2" in finished.output) == shown


@pytest.mark.parametrize("steps", ["true", "2"])
def test_a_fast_dev_run_goes_through_everything_but_logs_and_checkpoints(steps: str, tmp_path: Path) -> None:
    finished = run_command("train", *QUICK, f"+trainer.fast_dev_run={steps}", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert load_pattern(tmp_path / "run").provenance["steps"] == {"true": 1, "2": 2}[steps]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"heads", "gates.csv", "summary.json"} <= left
    assert left.isdisjoint({"metrics", "checkpoints"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["method.budgets=[0.1,0.2]"],
            "with method.budgets=[0.4, 0.97], this run has method.budgets=[0.1, 0.2],",
        ),
        (["method=duo"], "is a run of method=nested; leave out resume"),
    ],
)
def test_seeds_with_other_settings_are_not_averaged(changes: list[str], message: str, tmp_path: Path) -> None:
    few = ["repeats=2", "trainer.max_steps=1", "method=nested"]
    assert run_command("train", *QUICK, *SMALL, *few, folder=tmp_path).status == 0
    shutil.rmtree(tmp_path / "run" / "heads")
    shutil.rmtree(tmp_path / "run" / "seed-1")  # as if killed before its first checkpoint
    resumed = run_command("train", f"resume={tmp_path / 'run'}", *changes, folder=tmp_path)
    assert resumed.status == 2, resumed.output
    (line,) = [line for line in resumed.output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run" / "heads").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_keeps_its_order_and_can_be_resumed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command("train", *SEARCH, f"hydra.run.dir={tmp_path / 'whole'}", folder=tmp_path).status == 0
    plain_call, calls = MaskLosses.__call__, [0]

    def interrupted(self: MaskLosses, masks: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            signal.raise_signal(number)
        return plain_call(self, masks)

    with monkeypatch.context() as patch:
        patch.setattr(MaskLosses, "__call__", interrupted)
        finished = run_command("train", *SEARCH, folder=tmp_path)
    assert finished.status == 128 + number
    assert f"resume={tmp_path / 'run'}" in finished.output
    state = json.loads((tmp_path / "run" / "search.json").read_text())
    assert len(state["first"]) == 3
    assert 0 < state["seconds"] < 100
    longer = sealed(state | {"seconds": 1000})
    (tmp_path / "run" / "search.json").write_text(json.dumps(longer))
    resumed = run_command("train", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    resumed_pattern, expected = load_pattern(tmp_path / "run"), load_pattern(tmp_path / "whole")
    assert torch.equal(resumed_pattern.scores, expected.scores)
    assert 1000 < resumed_pattern.provenance["seconds"] < 1100
    assert 0 < expected.provenance["seconds"] < 100
    assert "seconds_before" not in resumed_pattern.provenance
    assert json.loads((tmp_path / "run" / "search.json").read_text())["seconds"] > 1000, "for a third part"


def test_seconds_before_are_those_of_the_checkpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    timer = Timer()
    timer.load_state_dict({"time_elapsed": {"train": 1000.0}})
    timer.on_train_start(Mock(), Mock())
    timer.on_train_end(Mock(), Mock())
    assert timer.time_elapsed() == 1007
    assert fit_gates._seconds_before(timer) == 1000


def test_the_seconds_of_resumed_gates_are_those_of_all_parts(tmp_path: Path) -> None:
    few = [*QUICK, *SMALL, "trainer.max_steps=1"]
    assert run_command("train", *few, folder=tmp_path).status == 0
    checkpoint = torch.load(tmp_path / "run" / CHECKPOINT)
    elapsed = checkpoint["callbacks"]["Timer"]["time_elapsed"]
    assert 0 < elapsed["train"] < load_pattern(tmp_path / "run").provenance["seconds"]
    elapsed["train"] = 1000.0  # as if it took that long
    torch.save(checkpoint, tmp_path / "run" / CHECKPOINT)
    for steps in 2, 2:  # the second time nothing is left to do
        resumed = run_command("train", f"resume={tmp_path / 'run'}", f"trainer.max_steps={steps}", folder=tmp_path)
        assert resumed.status == 0, resumed.output
        assert 1000 < load_pattern(tmp_path / "run").provenance["seconds"] < 1100


@pytest.mark.parametrize(
    "start",
    [
        "+method@method.start=saliency",
        "+method@method.start=replay_gradient",
        "+method@method.start=duo",
        "method.start=SAVED",
    ],
)
def test_a_search_refines_what_another_method_found(start: str, tmp_path: Path) -> None:
    saved = HeadPattern(torch.arange(6).view(3, 2) / 5, 4, 60)
    save_pattern(saved, tmp_path / "saved", [0.5])
    start = start.replace("SAVED", str(tmp_path / "saved"))
    finished = run_command("train", *SEARCH, start, "method.between=[0.34,0.67]", folder=tmp_path)
    assert finished.status == 0, finished.output
    pattern = load_pattern(tmp_path / "run")
    assert len(pattern.scores.unique()) == 6
    if "saved" in start:
        order = pattern.scores.flatten().argsort().tolist()
        assert (order[:2], sorted(order[2:4]), order[4:]) == ([0, 1], [2, 3], [4, 5])


PRIOR = torch.tensor([[4.0, 1.0], [0.0, 5.0], [3.0, 1.0]])
PLACES = torch.tensor([[0.8, 0.3], [0.0, 1.0], [0.6, 0.3]])  # of equal scores the middle


@pytest.mark.parametrize("gate", ["duo", "nested"])
def test_a_prior_is_mixed_into_the_scores(gate: str, tmp_path: Path) -> None:
    save_pattern(HeadPattern(PRIOR, 4, 60), tmp_path / "saved", [0.5])
    few = [*QUICK, *SMALL, f"method={gate}", "method.lr=0.2", "trainer.max_steps=3", "method.prior_weight=0.5"]
    patterns = {}
    for name, prior in ("without", "null"), ("with", str(tmp_path / "saved")):
        folder = tmp_path / name
        finished = run_command("train", *few, f"method.prior={prior}", f"hydra.run.dir={folder}", folder=tmp_path)
        assert finished.status == 0, finished.output
        patterns[name] = load_pattern(folder)
    assert patterns["without"].scores.unique().numel() > 3
    torch.testing.assert_close(patterns["with"].scores, (patterns["without"].scores + 0.5 * PLACES) / 1.5)
    assert (patterns["with"].holds_gates, patterns["without"].holds_gates) == (False, gate == "duo")


@pytest.mark.parametrize("name", ["reconstruction", "replay_gradient"])
def test_a_prior_may_be_a_method_of_the_same_run_and_of_its_samples(name: str, tmp_path: Path) -> None:
    alike = [*SMALL, "method.sink_size=4", "method.recent_size=60", "seed=5"]
    few = [override for override in QUICK if "method" not in override]
    alone = run_command("train", *few, *alike, f"method={name}", "method.samples=2", folder=tmp_path)
    assert alone.status == 0, alone.output
    expected = normalized_ranks(load_pattern(tmp_path / "run").scores)
    gates = [
        f"method@method.prior={name}",
        "method.prior.samples=2",
        "method.prior_weight=1e6",
        f"hydra.run.dir={tmp_path / 'gates'}",
    ]
    finished = run_command("train", *few, *alike, *gates, folder=tmp_path)
    assert finished.status == 0, finished.output
    pattern = load_pattern(tmp_path / "gates")
    torch.testing.assert_close(pattern.scores, expected, atol=1e-4, rtol=0)
    assert pattern.provenance["settings"]["method"]["prior"]["name"] == name


def test_a_resumed_run_keeps_its_prior_or_takes_another(tmp_path: Path) -> None:
    save_pattern(HeadPattern(PRIOR, 4, 60), tmp_path / "saved", [0.5])
    few = [*QUICK, *SMALL, "method=nested", "trainer.max_steps=1", "method.prior_weight=1e6"]
    by_name = ["method@method.prior=saliency", "method.prior.samples=1"]
    assert run_command("train", *few, *by_name, folder=tmp_path).status == 0
    scores = load_pattern(tmp_path / "run").scores
    saved, other = f"method.prior={tmp_path / 'saved'}", "method@method.prior=random"
    drawn = normalized_ranks(random_scores((3, 2), 0))
    for changes, expected in ([], scores), ([saved], PLACES), ([other], drawn):
        shutil.rmtree(tmp_path / "run" / "heads")
        resumed = run_command("train", f"resume={tmp_path / 'run'}", *changes, folder=tmp_path)
        assert resumed.status == 0, resumed.output
        torch.testing.assert_close(load_pattern(tmp_path / "run").scores, expected, atol=1e-4, rtol=0)


def test_each_seed_has_a_prior_of_its_own(tmp_path: Path) -> None:
    few = [*QUICK, *SMALL, "method@method.prior=random", "method.prior_weight=1e6", "repeats=2", "seed=3"]
    finished = run_command("train", *few, folder=tmp_path)
    assert finished.status == 0, finished.output
    for seed in 3, 4:
        scores = load_pattern(tmp_path / "run" / f"seed-{seed}").scores
        torch.testing.assert_close(scores, normalized_ranks(random_scores((3, 2), seed)), atol=1e-4, rtol=0)


def test_an_interrupted_search_for_a_prior_can_be_resumed_and_logs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*QUICK, *SMALL, "method@method.prior=search", "method.prior.samples=1", "+method@method.prior.start=duo"]
    plain_call, calls = MaskLosses.__call__, [0]

    def interrupted(self: MaskLosses, masks: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return plain_call(self, masks)

    with monkeypatch.context() as patch:
        patch.setattr(MaskLosses, "__call__", interrupted)
        finished = run_command("train", *few, folder=tmp_path)
    assert finished.status == 130, finished.output
    search_file = tmp_path / "run" / "prior" / "search.json"
    first_heads = json.loads(search_file.read_text())["first"]
    assert len(first_heads) == 3
    resumed = run_command("train", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert json.loads(search_file.read_text())["first"][:3] == first_heads
    logged = read_metrics(tmp_path / "run").columns
    assert "train/loss" in logged
    assert "train/penalty" not in logged, "nested gates have none, those of the search's start do"


def test_a_prior_of_other_layers_is_refused_before_training(tmp_path: Path) -> None:
    save_pattern(HeadPattern(PRIOR, 4, 60, (0, 1)), tmp_path / "saved", [0.5])
    finished = run_command("train", *QUICK, *SMALL, f"method.prior={tmp_path / 'saved'}", folder=tmp_path)
    assert finished.status == 2, finished.output
    assert "has scores for layers [0, 1], but not for [2]" in finished.output
    assert "step 1/2" not in finished.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data=text", "method@method.prior=query_score"], "method@method.prior=query_score needs samples"),
        (
            ["method.prior=saliency"],
            "; the method of that name is method@method.prior=saliency; method.prior=null does",
        ),
        (["method@method.prior=saliency", "method.prior.samples=0"], "method.prior.samples=0 must be at least 1"),
    ],
)
def test_errors_of_a_prior_name_its_overrides(changes: list[str], message: str, tmp_path: Path) -> None:
    finished = run_command("train", *QUICK, *SMALL, "method=nested", *changes, folder=tmp_path)
    assert finished.status == 2, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run" / "settings.json").exists()


SALIENCY = [*(override for override in SEARCH if "method=" not in override), "method=saliency"]


@pytest.mark.parametrize("kind", ["gradient", "fisher"])
def test_scores_by_backward_passes_recompute_within_the_memory_budget(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[set[Keep]] = []
    checkpoint = Mock(side_effect=recompute.checkpoint)

    def noted(self: MemoryPlanner, tokens: int) -> Plan:
        plan = apply_plan(self, tokens)
        levels.append(set(self.recomputation.levels))
        return plan

    apply_plan = MemoryPlanner.apply_plan
    monkeypatch.setattr(MemoryPlanner, "apply_plan", noted)
    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    scores, recomputed = [], []
    for memory in "auto", "least", "1GiB":
        folder = tmp_path / memory
        few = [*SALIENCY, f"method.kind={kind}", f"step.memory={memory}", f"hydra.run.dir={folder}"]
        finished = run_command("train", *few, folder=tmp_path)
        assert finished.status == 0, finished.output
        scores.append(load_pattern(folder).scores)
        recomputed.append(checkpoint.called)
        checkpoint.reset_mock()
    assert levels == [{Keep.ALL}]
    assert recomputed[:2] == [False, True]
    assert scores[0].unique().numel() == scores[0].numel()
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


def test_a_score_that_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    finished = run_command("train", *SALIENCY, "step.memory=1MiB", folder=tmp_path)
    assert finished.status == 2, finished.output
    assert "step.memory: a step of " in finished.output
    assert "Traceback" not in finished.output


def test_a_search_of_another_run_in_the_folder_stays(tmp_path: Path) -> None:
    assert run_command("train", *SEARCH, folder=tmp_path).status == 0
    first_scores = load_pattern(tmp_path / "run").scores
    other = [*SEARCH, "method.strategy=selection", "seed=1"]
    refused = run_command("train", *other, folder=tmp_path)
    assert refused.status == 2
    assert "this one would replace it" in refused.output
    assert torch.equal(load_pattern(tmp_path / "run").scores, first_scores)


def test_a_pattern_with_swaps_is_for_its_budget_and_others_warn(tmp_path: Path) -> None:
    swaps = ["method.swap_at=0.5", "method.max_swaps=2"]
    finished = run_command("train", *SEARCH, *swaps, folder=tmp_path)
    assert finished.status == 0, finished.output
    assert "warning" not in finished.output
    assert [path.name for path in (tmp_path / "run" / "heads").glob("mask_*")] == ["mask_sparsity_50.tsv"]
    pattern = load_pattern(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"refined for sparsity=0\.5, not 0\.25"):
        pattern.binarize(sparsity=0.25)
