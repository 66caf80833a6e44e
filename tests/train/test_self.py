"""Heads found on what the model itself wrote: by the command, from Python, resumed, and written to disk."""

import shutil
from pathlib import Path

import pytest

import duo_id
from duo_id import load_pattern
from duo_id.common import user_cache
from duo_id.common.record import read_settings
from duo_id.data import __main__ as data_command
from duo_id.data import writing
from duo_id.data.written import TEXTS, read_written
from duo_id.models.tokenizers import byte_tokenizer
from tests.support.commands import QUICK, run_command
from tests.support.tiny import tiny_model

SHORT = [*(override for override in QUICK if override != "data=passkey"), "data.self_samples=8", "data.self_tokens=20"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setattr(user_cache, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


def folder_in(cache: Path) -> Path:
    (folder,) = cache.glob("self-*")
    return folder


@pytest.mark.parametrize(
    "data", [["data=self"], ["data=mixture", "data.mixture.self=1", "data.mixture.copying=0"]], ids=["alone", "mixed"]
)
def test_a_run_writes_texts_once_and_records_their_digest(data: list[str], cache: Path, tmp_path: Path) -> None:
    sizes = ["data.num_questions=1", "data.answer_words=2", "data.text_skip=8"]
    finished = run_command("train", *SHORT, *data, *sizes, folder=tmp_path)
    assert finished.status == 0, finished.output
    assert "data=self: tiny writes 12 texts of up to 800 tokens" in finished.output
    digest = read_written(str(folder_in(cache)))[1]
    for settings in (load_pattern(tmp_path / "run").provenance["settings"], read_settings(tmp_path / "run")[0]):
        assert (settings["data"]["self_sha256"], settings["data"]["self_path"]) == (digest, None)
    again = run_command(
        "train", *SHORT, *data, *sizes, "seed=0", f"hydra.run.dir={tmp_path / 'again'}", folder=tmp_path
    )
    assert again.status == 0, again.output
    assert "writes 12 texts" not in again.output
    scores = [load_pattern(tmp_path / name).scores for name in ("run", "again")]
    assert scores[0].equal(scores[1])


def test_a_resumed_run_reads_the_same_texts_or_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command("train", *SHORT, "data=self", "repeats=2", folder=tmp_path).status == 0
    shutil.rmtree(tmp_path / "run" / "seed-1")  # as if stopped in the second
    resume = f"resume={tmp_path / 'run'}"
    moved = tmp_path / "own"
    folder_in(cache).rename(moved)
    resumed = run_command("train", resume, f"data.self_path={moved}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert "writes 12 texts" not in resumed.output

    shutil.rmtree(tmp_path / "run" / "seed-1")
    monkeypatch.setattr(writing, "write_texts", lambda *_: read_written(str(moved))[0][::-1])
    refused = run_command("train", resume, "data.self_path=null", folder=tmp_path)
    assert "self_sha256=" in refused.error
    assert refused.error.endswith("start a new run without data.self_sha256")


def test_heads_of_a_model_in_memory(cache: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=258), byte_tokenizer()
    settings = {"data.self_samples": 4, "data.self_tokens": 20, "progress": False}
    pattern = duo_id.identify(model, tokenizer, "self", steps=2, lengths=(400, 450), **settings)
    assert pattern.provenance["settings"]["data"]["self_sha256"] == read_written(str(folder_in(cache)))[1]
    query = duo_id.identify(model, tokenizer, "self", "saliency", samples=2, lengths=(400, 450), **settings)
    assert query.scores.unique().numel() > 3


def test_they_can_be_written_to_disk(cache: Path, tmp_path: Path) -> None:
    out = ["out=set", "n=3", "n_validation=1", "n_test=0"]
    made = [override for override in SHORT if override.startswith(("data.", "model="))]
    finished = run_command("data_gen", "data=self", *made, *out, folder=tmp_path, command=data_command.generate)
    assert finished.status == 0, finished.output
    assert (folder_in(cache) / TEXTS).is_file()
    read = [override for override in SHORT if not override.startswith("data.")]
    disk = ["data=disk", "data.path=set", "comparison.samples=1", "comparison.validation_samples=1"]
    refused = run_command("train", *read, *disk, folder=tmp_path)
    assert "has no test split" in refused.error
