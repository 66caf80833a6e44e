"""Gates over training: recorded from start to end, continued after a resume, read back or refused in one line."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.train.history import HISTORY, RECORDS, GateHistory, read_history

LAYERS = (1, 3)


def gates_at(step: int) -> torch.Tensor:
    return torch.tensor([[1 - step / 1000, 0.25], [0.5, step / 1000]])


def train(folder: Path, first: int, last: int, steps: int, broken: int | None = None) -> None:
    """Lightning's calls from step `first` to `last` of `steps`; the gates are NaN at step `broken`."""
    history, trainer = GateHistory(folder), SimpleNamespace(global_step=first, max_steps=steps, is_global_zero=True)
    nan = torch.full((2, 2), torch.nan)
    gates = SimpleNamespace(scores=lambda: nan if trainer.global_step == broken else gates_at(trainer.global_step))
    gated_model = SimpleNamespace(layers=[SimpleNamespace(index=index) for index in LAYERS])
    module = SimpleNamespace(gates=gates, gated_model=gated_model)
    history.on_train_start(trainer, module)
    for step in range(first + 1, last + 1):
        trainer.global_step = step
        history.on_train_batch_end(trainer, module, None, None, step)
    if last == steps:
        history.on_train_end(trainer, module)


def test_every_head_of_gated_layers_is_recorded_from_start_to_end(tmp_path: Path) -> None:
    train(tmp_path, 0, 7, 7)
    history = read_history(tmp_path)
    assert history.index.tolist() == list(range(8))
    assert history.columns.tolist() == [(1, 0), (1, 1), (3, 0), (3, 1)]
    expected = torch.stack([gates_at(step).flatten() for step in range(8)])
    np.testing.assert_allclose(history.to_numpy(), expected.numpy(), rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY]
    assert read_history(tmp_path / HISTORY).equals(history)


def test_long_runs_are_recorded_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    train(tmp_path, 0, 503, 503)
    steps = read_history(tmp_path).index.tolist()
    assert steps == [*range(0, 503, 10), 503]
    assert len(steps) <= RECORDS + 2


def test_a_resumed_run_keeps_the_rows_before_and_replaces_those_after(tmp_path: Path) -> None:
    train(tmp_path, 0, 6, 8)
    first_part = read_history(tmp_path)
    train(tmp_path, 4, 5, 8)
    assert read_history(tmp_path).index.tolist() == list(range(6)), "rows after step 4 are dropped"
    train(tmp_path, 5, 8, 8)
    history = read_history(tmp_path)
    assert history.index.tolist() == list(range(9))
    assert history.loc[:6].equals(first_part)
    train(tmp_path, 0, 2, 8)
    assert read_history(tmp_path).index.tolist() == [0, 1, 2], "a new run keeps nothing of an older one"


def test_gates_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    train(tmp_path, 0, 3, 5, broken=2)
    assert read_history(tmp_path).index.tolist() == [0, 1, 3]


DAMAGED = [
    "step,1.0\n0,1e400\n",
    "step,1.0\n0,1,2,3\n",
    "step,1.\u0660\n0,1\n",
    "step,1.0\nx,1\n",
    "step,1.0\n1e400,1\n",
    "step,1.0,1.0\n0,1,2\n",
    "\x00\x01",
]


@pytest.mark.parametrize(
    "text",
    ["", "step\n1\n", "a,b\n1,2\n", "step,1.0\n", "step,x\n0,1\n", "step,1.0\n0,x\n", "step,1.0,1.1\n0,1\n", *DAMAGED],
)
def test_a_damaged_history_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text(text)
    with pytest.raises(UserError, match=r"^.*gates\.csv is not a history of gates: .*$"):
        read_history(tmp_path)


def test_a_missing_history_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"gates\.csv is missing: .* python -m duo_id\.train makes a run that has them$"
    ):
        read_history(tmp_path)


def test_the_advice_for_a_changed_history_works(tmp_path: Path) -> None:
    train(tmp_path, 0, 3, 6)
    path = tmp_path / HISTORY
    rows = path.read_text().splitlines()
    path.write_text("".join(f"{row}\n" for row in [*rows[:-1], "3,0.5,0.5,0.5,0.5,"]))
    advice = "restore it, or remove it to .*; if you changed it yourself, delete the column sha256 from every row$"
    with pytest.raises(UserError, match=advice):
        read_history(tmp_path)
    changed = path.read_text()
    path.write_text("".join(f"{row.rpartition(',')[0]}\n" for row in changed.splitlines()))
    assert read_history(tmp_path).index.tolist() == [0, 1, 2, 3]
    path.unlink()
    train(tmp_path, 3, 6, 6)
    assert read_history(tmp_path).index.tolist() == [3, 4, 5, 6]
