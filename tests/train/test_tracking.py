"""What loggers get: an offline wandb run read back, TensorBoard, and runs resumed into the same run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from duo_id import load_pattern
from duo_id.patterns.pattern import HeadPattern
from duo_id.train.tracking import RUN_ID, layer_values
from tests.support.commands import QUICK, run_command

wandb = pytest.importorskip("wandb")
QUICKER = ["comparison.samples=1", "comparison.random_masks=0"]
BLOCK = 32768  # bytes


def records(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log after a header of 7 bytes, each record a protobuf message."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts, messages = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        if BLOCK - offset % BLOCK < 7:  # no room for a record's header: the block's end is empty
            offset += BLOCK - offset % BLOCK
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            messages.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return messages


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all three loggers, and its resumed continuation."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder))
        offline = ["logger=wandb", "logger.wandb.offline=true"]
        board = "+logger.tensorboard={_target_:lightning.pytorch.loggers.TensorBoardLogger,save_dir:x,name:tensorboard}"
        finished = run_command("train", *QUICK, *QUICKER, *offline, board, folder=folder)
        assert finished.status == 0, finished.output
        resumed = run_command("train", f"resume={folder / 'run'}", "trainer.max_steps=3", folder=folder)
        assert resumed.status == 0, resumed.output
        yield folder / "run"


@pytest.fixture(scope="module")
def wandb_records(run: Path) -> list[list]:
    """The records of the run and of its continuation."""
    return [records(path) for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"))]


def history(messages: list) -> list[dict]:
    """The steps that a run logged."""
    items = [record.history.item for record in messages if record.HasField("history")]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in items]


def test_a_resumed_run_is_the_same_run(run: Path, wandb_records: list[list]) -> None:
    ids = [record.run.run_id for messages in wandb_records for record in messages if record.HasField("run")]
    assert len(wandb_records) == 2
    assert set(ids) == {(run / RUN_ID).read_text()}


def test_wandb_has_the_config(wandb_records: list[list]) -> None:
    updates = {}
    for record in wandb_records[0]:
        for change in (record.config.update, record.run.config.update):
            updates |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in change}
    assert updates["settings"]["method"]["sink_size"] == 4
    assert updates["model"]["id"] == "tiny"
    assert updates["seed"] == 0


def test_wandb_and_csv_have_the_same_numbers(run: Path, wandb_records: list[list]) -> None:
    table = pd.read_csv(run / "metrics" / "version_0" / "metrics.csv")
    rows = history(wandb_records[0])
    layers = [f"layers/{kind}_{layer:02}" for kind in ("score", "sparsity_25", "sparsity_50") for layer in range(3)]
    for column in ("train/loss", "train/distill", "val/answer_loss_50", *layers):
        logged = [row[column] for row in rows if column in row]
        assert len(logged) == 2, column
        assert logged == pytest.approx(table[column].dropna().tolist()), column


def test_wandb_has_the_heatmap_over_time_and_the_pattern(run: Path, wandb_records: list[list]) -> None:
    kinds = [row["gates._type"] for row in history(wandb_records[0]) if "gates._type" in row]
    assert kinds == ["images/separated"] * 2  # one for each validation
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/gates_*.png"))) == 3
    (artifact,) = [
        record.request.log_artifact.artifact if record.request.HasField("log_artifact") else record.artifact
        for record in wandb_records[0]
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]
    assert artifact.type == "head-pattern"
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"heads.json", "full_attention_heads.tsv", "mask_sparsity_50.tsv"} <= names


def test_tensorboard_has_numbers_and_the_heatmap(run: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard" / "version_0"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/answer_loss_50", "layers/sparsity_50_02"} <= set(tags["scalars"])
    assert tags["images"] == ["gates"]
    assert [event.step for event in events.Images("gates")] == [1, 2]


def test_without_training_the_pattern_is_logged_too(tmp_path: Path) -> None:
    overrides = [word for word in QUICK if not word.startswith("method.")]
    method = ["method=random", "method.sink_size=4", "method.recent_size=60"]
    finished = run_command("train", *overrides, *QUICKER, *method, folder=tmp_path)
    assert finished.status == 0, finished.output
    table = pd.read_csv(tmp_path / "run" / "metrics" / "version_0" / "metrics.csv")
    assert table["layers/score_01"].tolist() == pytest.approx([load_pattern(tmp_path / "run").scores[1].mean().item()])


def test_layers_are_counted_at_each_sparsity() -> None:
    pattern = HeadPattern(torch.tensor([[0.1, 0.2], [9.0, 9.0], [0.3, 0.9]]), 4, 16, gated_layers=(0, 2))
    assert layer_values(pattern, [0.25, 0.75]) == pytest.approx(
        {
            "layers/score_00": 0.15,
            "layers/sparsity_25_00": 0.5,
            "layers/sparsity_75_00": 1.0,
            "layers/score_02": 0.6,
            "layers/sparsity_25_02": 0.0,
            "layers/sparsity_75_02": 0.5,
        }
    )


def test_wandb_without_an_account_suggests_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # it keeps the environment of the first run in a process, which was offline
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be kept
    monkeypatch.setenv("WANDB_SILENT", "true")
    error = run_command("train", *QUICK, "logger=wandb", folder=tmp_path).error
    assert "logger.wandb.offline=true" in error
    assert not (tmp_path / "run" / "heads").exists()
