"""What was used is what is recorded: a resumed run goes on under the settings it had, or names what differs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id import load_pattern
from duo_id.common.errors import UserError
from duo_id.common.record import SETTINGS, check_unchanged, differences, read_settings
from duo_id.methods.candidates import MaskLosses
from duo_id.train.checkpoints import CHECKPOINT
from tests.common.test_foreign import QUICKER
from tests.evaluate.test_run import evaluate, results
from tests.support.commands import Finished, run_command

RANDOM = [*(override for override in QUICKER if "method." not in override), "method=random"]
WINDOW = ["method.sink_size=4", "method.recent_size=60"]
SEARCH = [
    *(override for override in QUICKER if "method." not in override),
    *WINDOW,
    "method=search",
    "method.samples=1",
]


def train(folder: Path, *overrides: str) -> Finished:
    return run_command("train", *overrides, folder=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run has come to its end after two steps."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(folder, *QUICKER, "trainer.max_steps=2")
    assert done.status == 0, done.output
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def contents(run: Path) -> dict[Path, bytes]:
    """All files but what a logger begins before a checkpoint is read."""
    files = (path for path in run.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not {"metrics"} & set(path.parts)}


NOT_HONOURED = {  # the override, and how the refusal names both values
    "learning-rate": (["method.lr=0.5"], "method.lr=0.05", "method.lr=0.5"),
    "warmup": (["method.warmup=0.1"], "method.warmup=0.2", "method.warmup=0.1"),
    "floor": (["method.floor=0.3"], "method.floor=0.1", "method.floor=0.3"),
    "optimizer": (
        ["method.optimizer._target_=torch.optim.SGD"],
        "method.optimizer._target_=torch.optim.AdamW",
        "method.optimizer._target_=torch.optim.SGD",
    ),
    "optimizer-argument": (
        ["+method.optimizer.amsgrad=true"],
        "method.optimizer.amsgrad=null",
        "method.optimizer.amsgrad=true",
    ),
    "window": (["method.recent_size=64"], "method.recent_size=60", "method.recent_size=64"),
    "gate": (["method.temperature=0.5"], "method.temperature=0.3", "method.temperature=0.5"),
    "data": (["data=text"], "data.task=passkey", "data.task=text"),
    "length": (["data.length_max=900"], "data.length_max=800", "data.length_max=900"),
    "batch": (["data.batch_size=2"], "data.batch_size=1", "data.batch_size=2"),
    "dtype": (["model.dtype=bfloat16"], "model.dtype=auto", "model.dtype=bfloat16"),
    "model": (["model.id=other"], "model.id=tiny", "model.id=other"),
    "sizes": (
        ["model.architecture.hidden_size=64"],
        "model.architecture.hidden_size=32",
        "model.architecture.hidden_size=64",
    ),
    "config": (["+model.config.rope_theta=5"], "model.config.rope_theta=null", "model.config.rope_theta=5"),
    "seed": (["seed=5"], "seed=0", "seed=5"),
    "repeats": (["repeats=2"], "repeats=1", "repeats=2"),
    "method": (["method=random"], "method=nested", "method=random"),
    "steps": (["trainer.max_steps=1"], "trainer.max_steps=2", "trainer.max_steps=1"),
}


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("case", NOT_HONOURED)
def test_what_the_checkpoint_cannot_honour_is_refused_with_both_values(case: str, state: str, run: Path) -> None:
    overrides, old, new = NOT_HONOURED[case]
    if state == "stopped":  # after its first checkpoint
        shutil.rmtree(run / "heads")
        (run / "summary.json").unlink()
    was = contents(run)
    error = train(run.parent, f"resume={run}", *overrides).error
    assert old in error
    assert new in error
    assert "resume" in error
    assert contents(run) == was


def test_a_run_without_settings_is_refused_by_name(run: Path) -> None:
    (run / SETTINGS).unlink()
    was = contents(run)
    assert f"there is no {SETTINGS}" in train(run.parent, f"resume={run}").error
    assert contents(run) == was


def test_what_a_resumed_run_changes_is_recorded_with_what_was_there_before(run: Path) -> None:
    resumed = train(run.parent, f"resume={run}", "trainer.max_steps=3", "step.memory=least", "sparsity=[0.75]")
    assert resumed.status == 0, resumed.output
    replaced = {"trainer.max_steps": 2, "step.memory": "auto"}
    provenance = load_pattern(run).provenance
    assert provenance["before"] == json.loads((run / "summary.json").read_text())["before"] == replaced
    settings = provenance["settings"]
    assert (provenance["steps"], settings["trainer"]["max_steps"], settings["sparsity"]) == (3, 3, [0.75])
    resumed = train(run.parent, f"resume={run}", "trainer.max_steps=4")
    assert resumed.status == 0, resumed.output
    provenance = load_pattern(run).provenance
    assert provenance["before"] == replaced, "what it began with"
    assert provenance["settings"]["trainer"]["max_steps"] == 4
    kept, kept_before = read_settings(run)
    assert provenance["settings"] == {key: value for key, value in kept.items() if key in provenance["settings"]}
    assert (kept["logger"]["csv"]["name"], kept_before) == ("metrics", replaced)


def test_a_finished_run_keeps_the_settings_of_its_steps(run: Path) -> None:
    was = load_pattern(run).provenance["settings"]
    changed = ["+trainer.gradient_clip_val=1.0", "step.memory=least", "sparsity=[0.75]"]
    resumed = train(run.parent, f"resume={run}", *changed)
    assert resumed.status == 0, resumed.output
    provenance, (kept, replaced) = load_pattern(run).provenance, read_settings(run)
    assert "before" not in provenance
    assert replaced == {}
    assert provenance["settings"] == was | {"sparsity": [0.75]}
    assert (kept["trainer"], kept["step"]) == (was["trainer"], was["step"])


def test_what_is_recorded_was_used(run: Path) -> None:
    provenance = load_pattern(run).provenance
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [provenance["settings"]["method"]["lr"]]
    assert checkpoint["global_step"] == provenance["settings"]["trainer"]["max_steps"]
    assert "before" not in provenance


def test_what_is_found_anew_may_be_asked_for_anew(tmp_path: Path) -> None:
    assert train(tmp_path, *RANDOM, *WINDOW).status == 0
    resumed = train(tmp_path, f"resume={tmp_path / 'run'}", "seed=3", "data.length_max=900")
    assert resumed.status == 0, resumed.output
    provenance = load_pattern(tmp_path / "run").provenance
    assert (provenance["seed"], provenance["settings"]["data"]["length_max"]) == (3, 900)
    assert "repeats=1" in train(tmp_path, f"resume={tmp_path / 'run'}", "repeats=2").error


@pytest.mark.parametrize(
    ("override", "before"),
    [
        ("++method.samples=2", "method.samples=1"),
        ("method.samples=2", "method.samples=1"),
        ("method.objective=next_token", "method.objective=kl"),
        ("seed=1", "seed=0"),
        ("data.length_max=900", "data.length_max=800"),
    ],
)
def test_a_search_goes_on_under_what_it_was_begun_with(
    override: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = MaskLosses.__call__, [0]

    def interrupted(self: MaskLosses, masks: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return plain(self, masks)

    with monkeypatch.context() as patch:
        patch.setattr(MaskLosses, "__call__", interrupted)
        assert train(tmp_path, *SEARCH).status == 130
    error = train(tmp_path, f"resume={tmp_path / 'run'}", override).error
    assert before in error
    assert override.lstrip("+") in error
    unknown = train(tmp_path, f"resume={tmp_path / 'run'}", "method.batch_token=2000").error
    assert "method.batch_token=2000: there is no such setting, did you mean method.batch_tokens?" in unknown
    finished = train(tmp_path, f"resume={tmp_path / 'run'}", "method.batch_tokens=2000")
    assert finished.status == 0, finished.output


@pytest.mark.parametrize("override", ["data.length_max=900", "trainer.max_steps=2", "method.prior_weight=1", "seed=1"])
def test_seeds_found_under_other_settings_are_not_averaged(override: str, tmp_path: Path) -> None:
    assert train(tmp_path, *QUICKER, "repeats=2").status == 0
    heads = (tmp_path / "run" / "heads" / "heads.json").read_bytes()
    error = train(tmp_path, f"resume={tmp_path / 'run'}", override).error
    assert override in error
    assert (tmp_path / "run" / "heads" / "heads.json").read_bytes() == heads
    more = train(tmp_path, f"resume={tmp_path / 'run'}", "repeats=3")
    assert more.status == 0, more.output
    assert load_pattern(tmp_path / "run").provenance["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("changed", [["model.dtype=bfloat16"], ["+model.config.rope_theta=5"], ["data.path=elsewhere"]])
def test_scores_of_another_model_are_not_gone_on_with(changed: list[str], evaluated: Path) -> None:
    before = (evaluated / "results.json").read_bytes()
    error = run_command("evaluate", f"resume={evaluated}", *changed, folder=evaluated.parent).error
    key, _, value = changed[0].lstrip("+").partition("=")
    assert f"{key}={value}" in error
    assert f"with {key}=" in error
    assert (evaluated / "results.json").read_bytes() == before


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    finished = evaluate(folder, "generate=false", "random_masks=0", "baselines=[]", "tasks=[language]")
    assert finished.status == 0, finished.output
    return folder / "run"


def test_scores_of_another_seed_are_named_with_both(evaluated: Path) -> None:
    error = run_command("evaluate", f"resume={evaluated}", "seed=3", folder=evaluated.parent).error
    assert "seed=0, not 3" in error
    assert read_settings(evaluated)[0] == results(evaluated)["settings"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": [], "before": {}}', "\xff", "[" * 100000])
def test_a_damaged_record_is_one_line(text: str, run: Path) -> None:
    (run / SETTINGS).write_text(text, encoding="latin-1")
    error = train(run.parent, f"resume={run}").error
    assert SETTINGS in error
    assert "leave out resume" in error


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, {"a.b": (1, 2)}),
        ({"a": {"b": 1.0}}, {"a": {"b": 1}}, {}),
        ({"a": [1, 2]}, {"a": (1, 2)}, {}),
        ({"a": 1}, {"b": 1}, {}),
        ({}, {"model": {"config": {"x": 1}}}, {}),
        ({"model": {"config": {}}}, {"model": {"config": {"x": 1}}}, {"model.config.x": (None, 1)}),
        ({"method": {"prior": None}}, {"method": {"prior": {"name": "x"}}}, {"method.prior.name": (None, "x")}),
        ({"method": {"objective": "kl"}}, {"method": {"objective": {"kl": 1}}}, None),
    ],
)
def test_differences(before: Any, now: Any, expected: Any) -> None:
    changes = differences(before, now)
    assert changes == expected if expected is not None else set(changes) == {"method.objective", "method.objective.kl"}


def test_a_refusal_is_short() -> None:
    changes = {f"model.architecture.{number}": ("x" * 999, None) for number in range(9)}
    with pytest.raises(UserError, match=r"\(and 6 more\)") as raised:
        check_unchanged(changes, "resume=RUN: it was made", "and that matters")
    assert len(str(raised.value)) < 600


def test_a_task_that_an_earlier_version_did_not_have_has_no_weight() -> None:
    before = {"data": {"mixture": {"passkey": 1.0}}}
    assert differences(before, {"data": {"mixture": {"passkey": 1.0, "self": 0.0}}}) == {}
    now = {"data": {"mixture": {"passkey": 1.0, "self": 0.5}}}
    assert differences(before, now) == {"data.mixture.self": (0, 0.5)}
    assert differences(now, before) == {"data.mixture.self": (0.5, 0)}
