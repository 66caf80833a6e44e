"""Damaged files and full disks: one line that names the file and what to do, and nothing half written."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from duo_id import convert
from duo_id.common.errors import UserError
from duo_id.models.loading import byte_tokenizer, load_model
from duo_id.models.settings import ModelSettings
from duo_id.train.checkpoints import CHECKPOINT, AtomicCheckpointIO
from tests.support.commands import QUICK, run_command
from tests.support.tiny import tiny_model

FEW = ["comparison.validation_samples=0", "comparison.random_masks=0", "comparison.samples=1"]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


FORM = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 1, "loops": {}} | {
    name: [{}] for name in ("optimizer_states", "lr_schedulers")
}


@pytest.mark.parametrize("exists", [False, True])
def test_a_checkpoint_that_does_not_fit_is_one_line_and_the_one_before_stays(exists: bool, tmp_path: Path) -> None:
    path, io = tmp_path / "run" / CHECKPOINT, AtomicCheckpointIO()
    if exists:
        io.save_checkpoint(FORM | {"state_dict": {"gates": torch.ones(2)}}, path)
    with small_disk(2**16), pytest.raises(UserError) as error:
        io.save_checkpoint({"gates": torch.zeros(2**18)}, path)
    advice = f"resume={tmp_path / 'run'} from the previous checkpoint" if exists else "start again"
    assert str(error.value).startswith(f"{path} cannot be written (")
    assert str(error.value).endswith(f": make room there, then {advice}")
    assert "\n" not in str(error.value)
    assert list(path.parent.iterdir()) == [path] * exists
    if exists:
        assert torch.equal(io.load_checkpoint(path)["state_dict"]["gates"], torch.ones(2))


def test_a_run_on_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("duo_id.train.checkpoints.torch.save", full)
    error = run_command("train", *QUICK, *FEW, folder=tmp_path).error
    assert f"{tmp_path / 'run' / CHECKPOINT} cannot be written (No space left on device): make room there" in error


@pytest.mark.parametrize(
    "contents", [b"", b"PK\x03\x04", b"\x80\x02", bytes(100)], ids=["empty", "zip", "pickle", "zeros"]
)
def test_a_damaged_checkpoint_is_one_line(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        AtomicCheckpointIO().load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"resume: {path} is not a checkpoint (")
    assert message.endswith("): remove it to train from the start")
    assert ("it is empty" in message) == (contents == b"")
    assert "\n" not in message


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_shape(weights: bytes) -> bytes:
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    name = next(name for name in header if name.endswith("q_proj.weight"))
    header[name]["shape"] = header[name]["shape"][::-1]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + size :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda weights: b"",
    "no-header": lambda weights: weights[:5],
    "half-a-header": lambda weights: weights[:300],
    "cut-off": lambda weights: weights[:-100],
    "zeros": lambda weights: bytes(len(weights)),
    "huge-header": lambda weights: b"\xff" * 8 + weights[8:],
    "no-json": lambda weights: weights[:8] + b"?" + weights[9:],
    "no-type": lambda weights: weights.replace(b'"F32"', b'"F3?"'),
    "other-shape": other_shape,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_one_line(name: str, model_files: dict[str, bytes], tmp_path: Path) -> None:
    reason = "do not fit its config.json (" if name == "other-shape" else "model.safetensors is damaged ("
    for file, contents in model_files.items():
        (tmp_path / file).write_bytes(DAMAGES[name](contents) if file == "model.safetensors" else contents)
    with pytest.raises(UserError) as error:
        load_model(ModelSettings(id=str(tmp_path)))
    assert str(error.value).startswith(f"model.id={tmp_path}: ")
    assert reason in str(error.value)
    assert str(error.value).endswith(": copy it there again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model", "added_tokens", "normalizer"])
def test_a_damaged_tokenizer_is_one_line(key: str, model_files: dict[str, bytes], tmp_path: Path) -> None:
    for name, contents in model_files.items():
        (tmp_path / name).write_bytes(contents)
    damaged = json.loads(model_files["tokenizer.json"]) | {key: "abc"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=f"model.id={tmp_path} .* cannot be loaded: .*"):
        load_model(ModelSettings(id=str(tmp_path)))


def test_an_error_of_another_kind_is_no_damage(
    model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, contents in model_files.items():
        (tmp_path / name).write_bytes(contents)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("of the device")

    monkeypatch.setattr("duo_id.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="of the device"):
        load_model(ModelSettings(id=str(tmp_path)))


@pytest.mark.parametrize("name", ["kvzip", "heads"])
def test_a_conversion_on_a_full_disk_names_the_file(name: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with small_disk(200), pytest.raises((UserError, OSError), match=str(tmp_path)) as error:
        convert.main(["SmolLM2-135M-Instruct", str(target), f"format={name}", "lossy=true"])
    assert "\n" not in str(error.value)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not [file for file in names if file.startswith(".") or file in ("made", "heads.json")]
