"""Which runs can be the baseline of several devices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id.benchmark.efficiency import read_baseline
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common.config import plain
from duo_id.common.errors import UserError
from duo_id.models.settings import ModelSettings
from duo_id.step.settings import StepSettings

SIZES: dict[str, Any] = {"chunk_size": [8], "sparsity": [0.5], "sink_size": 4, "recent_size": 8}
SETTINGS = BenchmarkSettings(ModelSettings("m"), "train_step", context=[32768], repeats=1, warmup=0, **SIZES)
ROW = {"step": "ours", "status": "ok", "blend": "student", "context": 32768, "tokens_per_s": 5000.0}
RUN: dict[str, Any] = {
    "rows": [ROW, ROW | {"step": "paper", "tokens_per_s": 1.0}],
    "model": {"name": "m"},
    "device": "H",
    "settings": plain(SETTINGS),
}


def baseline(run: Path, groups: int = 1, **changes: Any) -> dict[tuple[int, str], float]:
    """The baseline that a run with changed settings reads from the run on one device."""
    return read_baseline(replace(SETTINGS, compare=str(run), **changes), torch.device("cpu"), "H", groups)


def saved(folder: Path, **changes: Any) -> Path:
    (folder / "results.json").write_text(json.dumps(RUN | changes))
    return folder


def test_our_step_on_one_device_counts(tmp_path: Path) -> None:
    saved(tmp_path)
    for run in (tmp_path, tmp_path / "results.json"):
        assert baseline(run) == {(32768, "student"): 5000.0}


def test_devices_may_share_samples_or_take_some_each(tmp_path: Path) -> None:
    saved(tmp_path)
    changes = {"trainer": {"devices": 8}, "seed": 3, "repeats": 9, "profile": True, "compile": False}
    assert baseline(tmp_path, 8, batch_size=8, **changes)
    assert baseline(tmp_path, 4, batch_size=4, step=StepSettings(sequence_parallel=2), **changes)


def test_what_one_device_did_not_measure_is_not_compared(tmp_path: Path) -> None:
    """The baseline has no row for it, or ran out of memory."""
    saved(tmp_path, rows=[ROW, {"step": "ours", "status": "OOM", "blend": "student", "context": 65536}])
    speeds = baseline(tmp_path, context=[32768, 65536], blend=["student", "teacher"])
    assert speeds.keys() == {(32768, "student")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, r"none of its steps has context=\[32768\] and blend=\['student'\]"),
        ({"rows": [ROW | {"step": "paper"}]}, "none of its steps"),
        ({"devices": 2}, "measured on 2 x H with m; efficiency is against 1 x H with m"),
        ({"device": "other"}, "measured on 1 x other with m; efficiency is against 1 x H with m"),
        ({"model": {"name": "n"}}, "measured on 1 x H with n"),
        ({"rows": None}, "cannot be read as results of task=train_step"),
        ({"settings": {}}, "cannot be read as results of task=train_step"),
        ({"settings": plain(replace(SETTINGS, task="decode"))}, r"cannot be read .* \(task=decode\)"),
    ],
)
def test_others_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^compare={tmp_path}: .*{message}"):
        baseline(saved(tmp_path, **change))


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_what_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=rf"^compare={tmp_path}: cannot be read as results of task=train_step"):
        baseline(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": StepSettings(memory="least")}, "step.memory is auto there and least here"),
        ({"step": StepSettings(compile=True)}, "compile is False there and True here"),
        ({"compile": True}, "compile is False there and True here"),
        ({"step": StepSettings(full_backend="sdpa")}, "step.full_backend is auto there and sdpa here"),
        ({"step": StepSettings(streaming_backend="blocked")}, "step.streaming_backend is auto there and blocked here"),
        ({"step": StepSettings(shape="paper", memory="least")}, "step.memory is auto there and least here"),
        ({"batch_size": 2}, "batch_size of each group of devices is 1 there and 2 here"),
        ({"sink_size": 5}, "sink_size is 4 there and 5 here"),
        ({"recent_size": 9}, "recent_size is 8 there and 9 here"),
        ({"model": ModelSettings("m", dtype="float16")}, "model.dtype is auto there and float16 here"),
        (
            {"model": ModelSettings("m", architecture={"hidden_size": 8}, config={"hidden_size": 16})},
            "model.architecture.hidden_size is None there and 16 here",
        ),
    ],
)
def test_other_work_is_refused_by_its_override(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^compare={tmp_path}: steps do different work, {message}$"):
        baseline(saved(tmp_path), **change)


def test_text_of_another_run_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a list is expected, which a single string may replace."""
    monkeypatch.setenv("DUO_ID_SECRET", "s3cr3t")
    saved(tmp_path, settings=RUN["settings"] | {"blend": "${oc.env:DUO_ID_SECRET}"})
    with pytest.raises(UserError, match="blend=") as error:
        baseline(tmp_path)
    assert "s3cr3t" not in str(error.value)
