"""Untrusted checkpoints: each mutant is refused in one line or does not affect the run."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.restoring import _first_states, _matching
from tests.support.commands import QUICK, Finished, run_command
from tests.support.mutations import WRONG

SHORT = ["comparison.samples=1", "comparison.random_masks=1", "comparison.validation_samples=0", "data.num_passkeys=1"]
SMALL = ["data.length_min=400", "data.length_max=500", *SHORT]
SAMPLED = 24  # mutants that are trained on; each takes a fraction of a second


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    finished = run_command("train", *QUICK, *SMALL, folder=folder)
    assert finished.status == 0, finished.output
    return folder / "run"


def resumed(run: Path, folder: Path, checkpoint: Any, *overrides: str) -> tuple[Finished, Path]:
    """Resume a copy of a run from another checkpoint for one more step."""
    copied = folder / "copied"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(run, copied)
    torch.save(checkpoint, copied / CHECKPOINT)
    return run_command("train", f"resume={copied}", "trainer.max_steps=3", *overrides, folder=folder), copied


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value."""
    if path:
        yield path
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy with `change` applied to the container and the key at a path; tuples become lists."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        if isinstance(inner[key], tuple):
            inner[key] = list(inner[key])
        inner = inner[key]
    change(inner, path[-1])
    return value


def put(new: Any) -> Callable[[Any, Any], None]:
    return lambda inner, key: inner.__setitem__(key, new)


def mutations(checkpoint: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...], Callable[[Any, Any], None]]]:
    """Each key removed, and each value replaced by ones of other types and shapes: a name, and what `changed` takes."""
    tensors = [torch.zeros(7), torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), torch.nan)]
    for path in paths(checkpoint):
        value = checkpoint
        for key in path:
            value = value[key]
        yield f"without {path}", path, lambda inner, key: inner.__delitem__(key)
        for wrong in [*WRONG, *tensors]:
            if type(value) is not type(wrong) or isinstance(value, list | dict):
                yield f"{path}={wrong!r:.40}", path, put(wrong)
        if isinstance(value, torch.Tensor):
            yield f"{path} of another shape", path, put(torch.zeros(7))


def test_a_mutant_is_refused_in_one_line_or_changes_nothing(run: Path, tmp_path: Path) -> None:
    good = read(run / CHECKPOINT)
    finished, copied = resumed(run, tmp_path, good)
    assert finished.status == 0, finished.output
    expected = read(copied / CHECKPOINT)["state_dict"]["gates.weight"]
    errors = set()
    for name, path, change in random.Random(0).sample(list(mutations(good)), SAMPLED):
        finished, copied = resumed(run, tmp_path, changed(good, path, change))
        if finished.status:
            assert "resume: " in finished.error, (name, finished.output)
            errors.add(finished.error)
        else:
            assert torch.equal(read(copied / CHECKPOINT)["state_dict"]["gates.weight"], expected), name
    assert len(errors) > SAMPLED / 4


OPTIMIZER = ("optimizer_states", 0, "param_groups", 0)
REFUSED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no-gates": (("state_dict",), None, "state_dict=None is no object"),
    "gates-of-another-shape": (
        ("state_dict", "gates.weight"),
        torch.zeros(7),
        "state_dict.gates.weight is not a tensor",
    ),
    "gates-that-are-not-finite": (
        ("state_dict", "gates.weight"),
        torch.full((3, 2), torch.nan),
        "values that are not finite",
    ),
    "no-step": (("global_step",), None, "global_step=None"),
    "negative-step": (("global_step",), -5, "global_step=-5"),
    "another-step": (("global_step",), 1, "global_step=1, where loops have 2 steps"),
    "no-epoch": (("epoch",), None, "epoch=None"),
    "version": (("pytorch-lightning_version",), 7, "pytorch-lightning_version=7"),
    "version-of-old": (("pytorch-lightning_version",), "1.4.0", "pytorch-lightning_version='1.4.0'"),
    "loops": (("loops", "fit_loop"), {}, "loops.fit_loop lacks"),
    "callbacks": (("callbacks",), 7, "callbacks=7"),
    "timer": (("callbacks", "Timer"), {"time_elapsed": {"train": "x"}}, "callbacks.Timer.time_elapsed.train"),
    "samples": (("SampleModule",), 7, "SampleModule=7"),
    "optimizers": (("optimizer_states",), [], "optimizer_states"),
    "schedule": (("lr_schedulers", 0, "last_epoch"), 7, "lr_schedulers.0 has 7"),
    "moments-of-another-shape": (
        ("optimizer_states", 0, "state", 0, "exp_avg"),
        torch.zeros(9),
        "state.0.exp_avg is not",
    ),
    "moments-of-another": (("optimizer_states", 0, "state", 0), {}, "optimizer_states.0.state.0 lacks step"),
    "step-before-the-first": (
        ("optimizer_states", 0, "state", 0, "step"),
        torch.tensor(-1.0),
        "state.0.step is negative",
    ),
    "identity": (("duo_id", "layers"), torch.zeros(3), "duo_id holds more than plain values"),
    **{
        key: ((*OPTIMIZER, key), "x", f"param_groups.0.{key}='x'")
        for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "capturable", "fused", "maximize", "foreach")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mismatch_is_named(case: str, run: Path, tmp_path: Path) -> None:
    path, value, message = REFUSED[case]
    finished, copied = resumed(run, tmp_path, changed(read(run / CHECKPOINT), path, put(value)))
    assert finished.error.startswith(f"error: resume: {copied / CHECKPOINT} does not fit this run (")
    assert message in finished.error
    assert finished.error.endswith("): remove it to train from the start")


@pytest.mark.parametrize("whole", [[1, 2], {}, None, "x"], ids=str)
def test_other_objects_are_refused(whole: Any, run: Path, tmp_path: Path) -> None:
    assert "does not fit this run" in resumed(run, tmp_path, whole)[0].error


def test_an_error_of_lightning_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: Any) -> None:
        raise KeyError("unknown")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", stumble)
    assert "does not fit this run ('unknown')" in resumed(run, tmp_path, read(run / CHECKPOINT))[0].error


@pytest.mark.parametrize("address", ["local://{}", "{1}/../../victim"])
@pytest.mark.parametrize("ours", [True, False], ids=["our-callback", "callback-of-the-user"])
def test_a_checkpoint_removes_nothing(address: str, ours: bool, run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("precious")
    checkpoint = read(run / CHECKPOINT)
    folder = tmp_path / "copied" / "checkpoints"
    path = address.format(victim, folder)
    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    state = dict.fromkeys(paths, path) | {"dirpath": str(folder), "best_model_score": None, "best_k_models": {}}
    interval, steps = ("datetime.timedelta(0)", 0) if ours else (None, 1)
    key = f"'monitor': None, 'mode': 'min', 'every_n_train_steps': {steps}, 'every_n_epochs': 0"
    name = "LastCheckpoint" if ours else "ModelCheckpoint"
    checkpoint["callbacks"][f"{name}{{{key}, 'train_time_interval': {interval}}}"] = state
    user = "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1}]"
    callbacks = [] if ours else [user]
    overrides = ["checkpoint_seconds=0", "trainer.max_steps=6", *callbacks]
    finished, _ = resumed(run, tmp_path, checkpoint, *overrides)
    assert finished.status == 0, finished.output
    assert (victim / "precious.txt").read_text() == "precious"


def test_early_stopping_continues_counting(run: Path, tmp_path: Path) -> None:
    callbacks = (
        "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, patience: 9}]"
    )
    checkpoint = read(run / CHECKPOINT)
    state = {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.0), "patience": 9}
    key = "EarlyStopping{'monitor': 'train/loss', 'mode': 'min'}"
    checkpoint["callbacks"][key] = state
    finished, copied = resumed(run, tmp_path, checkpoint, callbacks)
    assert finished.status == 0, finished.output
    assert read(copied / CHECKPOINT)["callbacks"][key]["best_score"] == 0.0
    checkpoint["callbacks"][key] = state | {"wait_count": "x"}
    assert "wait_count='x' is not of type int" in resumed(run, tmp_path, checkpoint, callbacks)[0].error


OPTIMIZERS = [
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "RMSprop",
    "Rprop",
    "SGD",
    "ASGD",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_any_optimizer_have_the_form_of_those_of_a_first_step(name: str) -> None:
    def made() -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.zeros(3, 2))
        weight.grad = torch.ones(3, 2)
        return getattr(torch.optim, name)([weight], lr=0.01)

    optimizer = made()
    for _ in range(3):
        optimizer.step()
    states, fresh = optimizer.state_dict()["state"], made()
    _matching(states, _first_states(fresh), "state", counts=True)
    assert not fresh.param_groups[0]["params"][0].any(), "the step is a copy's"
    if states:
        with pytest.raises(UserError, match="state lacks 0"):
            _matching({}, _first_states(fresh), "state", counts=True)
