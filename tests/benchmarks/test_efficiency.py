"""Which runs several devices can be compared with."""

import json
from pathlib import Path
from typing import Any

import pytest

from duo_id.benchmarks.efficiency import read_baseline
from duo_id.errors import UserError

ROW = {"step": "ours", "status": "ok", "blend": "student", "context": 32768, "tokens_per_s": 5000.0}
RUN: dict[str, Any] = {
    "rows": [ROW, ROW | {"step": "paper", "tokens_per_s": 1.0}],
    "model": {"name": "m"},
    "device": "H",
}


def test_our_step_on_one_device_counts(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RUN))
    for run in (tmp_path, tmp_path / "results.json"):
        assert read_baseline(str(run), RUN, [(32768, "student")]) == {(32768, "student"): 5000.0}


def test_where_one_device_has_too_little_memory_nothing_is_compared(tmp_path: Path) -> None:
    full = {"step": "ours", "status": "OOM", "blend": "student", "context": 65536}
    (tmp_path / "results.json").write_text(json.dumps(RUN | {"rows": [ROW, full]}))
    assert read_baseline(str(tmp_path), RUN, [(65536, "student")]).keys() == {(32768, "student")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "it has no step of 32,768 tokens with the student blend"),
        ({"rows": [ROW | {"step": "paper"}]}, "it has no step of 32,768 tokens"),
        ({"devices": 2}, "measured on 2 x H with m; efficiency is against 1 x H with m"),
        ({"device": "other"}, "measured on 1 x other with m; efficiency is against 1 x H with m"),
        ({"model": {"name": "n"}}, "measured on 1 x H with n"),
        ({"rows": None}, "no results of task=train_step can be read there"),
    ],
)
def test_others_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RUN | change))
    with pytest.raises(UserError, match=rf"^compare={tmp_path}: .*{message}"):
        read_baseline(str(tmp_path), RUN, [(32768, "student")])
    with pytest.raises(UserError, match="no results of task=train_step"):
        read_baseline(str(tmp_path / "nowhere"), RUN, [])
