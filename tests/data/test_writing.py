"""Texts that a tiny model writes once, and that later runs read."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from duo_id.common import user_cache
from duo_id.common.errors import UserError
from duo_id.data import writing
from duo_id.data.haystack import with_digest
from duo_id.data.registry import make_task
from duo_id.data.writing import with_written
from duo_id.data.written import TEXTS, read_written
from duo_id.models.language_model import LanguageModel, end_tokens
from duo_id.models.tokenizers import byte_tokenizer
from tests.support.tiny import hooks_of, tiny_model

CHANGES = {
    "self_samples": 5,
    "self_share": 0.05,
    "self_tokens": 20,
    "self_temperatures": [0.5],
    "self_seed": 1,
    "length_max": 420,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache."""
    monkeypatch.setattr(user_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "duo_id"


@pytest.fixture
def model():
    return LanguageModel(tiny_model("llama", vocab_size=260), byte_tokenizer(), "tiny", "tiny", None, "random")


@pytest.fixture
def settings(quick):
    """Four training texts of 380 to 400 tokens, and one for each other split."""
    sizes = {"length_min": 380, "length_max": 400, "num_lengths": 3, "self_samples": 4, "self_tokens": 30}
    return with_digest(quick(task="self", **sizes))


def console():
    return Console(file=io.StringIO(), width=200)


def written(settings, model):
    return with_written(settings, model, console())


def test_texts_are_what_the_model_writes_and_samples_hold_them(settings, model, folder):
    found = written(settings, model)
    assert Path(found.self_path).parent == folder
    texts, digest = read_written(found.self_path)
    assert found.self_sha256 == digest
    assert [text.split for text in texts].count("train") == 4
    for text in texts:
        assert len(text.written) == 30 or text.written[-1] in end_tokens(model)
        assert max(text.written) < 258, "beyond are rows of the embedding without a token"
        if text.temperature == 0:
            ids = torch.tensor([*text.prompt, *text.written])
            logits = model.model(ids[None]).logits[0, len(text.prompt) - 1 : -1, :258]
            assert logits.argmax(-1).tolist() == list(text.written)
    drawn = [text for text in texts if text.temperature == 0.7]
    assert drawn
    lengths = {len(make_task(found, model.tokenizer, "train").sample(index, 0)["input_ids"]) for index in range(4)}
    assert lengths == {len(text) for text in texts if text.split == "train"}
    assert "text" in json.loads((Path(found.self_path) / TEXTS).read_text().splitlines()[0]), "for people"


def test_a_bar_moves_and_a_line_says_what_is_done(settings, model, folder):
    output = console()
    with_written(settings, model, output)
    lines = output.file.getvalue().splitlines()
    assert lines[0] == "data=self: tiny writes 6 texts of up to 400 tokens, which later runs read"
    assert lines[-1].startswith("writing 1 x 30 tokens after 370: 100%")


def test_the_model_is_left_as_it_was(settings, model, folder):
    hooks, implementation = hooks_of(model.model), model.model.config._attn_implementation
    state = torch.get_rng_state()
    written(settings, model)
    assert hooks_of(model.model) == hooks
    assert model.model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), state)


def test_they_are_written_once(settings, model, folder, monkeypatch):
    first = written(settings, model)
    monkeypatch.setattr(writing, "write_texts", lambda *_: pytest.fail("written again"))
    again = LanguageModel(tiny_model("llama", vocab_size=260), byte_tokenizer(), "other", "name", None, "elsewhere")
    assert written(settings, again) == first
    mixed = replace(settings, task="mixture", mixture={"passkey": 1.0, "self": 0.5})
    assert written(mixed, model).self_path == first.self_path
    for changes in ({"task": "passkey"}, {"task": "mixture", "mixture": {"passkey": 1.0, "self": 0.0}}):
        assert written(replace(settings, **changes), model) == replace(settings, **changes)


@pytest.mark.parametrize("key", [*CHANGES, "weights", "haystack"])
def test_other_settings_have_other_texts(settings, model, folder, tmp_path, key):
    first = written(settings, model)
    if key == "weights":
        model.model.model.norm.weight.data.neg_()
    elif key == "haystack":
        (tmp_path / "own.txt").write_text(" ".join(f"word{number}" for number in range(3000)))
        haystack = replace(settings.haystack, source="file", path=str(tmp_path / "own.txt"), sha256=None)
        changed = with_digest(replace(settings, haystack=haystack))
    if key in CHANGES:
        changed = replace(settings, **{key: CHANGES[key]})
    second = written(settings if key == "weights" else changed, model)
    assert first.self_path != second.self_path
    assert first.self_sha256 != second.self_sha256


def test_active_adapters_write_texts_of_their_own(settings, model, folder):
    adapted = replace(model, adapters=[{"name": "default", "type": "LORA"}])
    assert written(settings, model).self_path != written(settings, adapted).self_path


def test_an_interruption_leaves_nothing_and_the_next_run_writes_all(settings, model, folder, monkeypatch):
    plain, calls = writing.write, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(settings, model)
    assert not [path for path in folder.iterdir() if path.name.startswith("self-")]
    assert len(read_written(written(settings, model).self_path)[0]) == 6


def test_the_digest_of_a_run_holds(settings, model, folder):
    found = written(settings, model)
    assert written(replace(settings, self_sha256=found.self_sha256), model) == found
    with pytest.raises(UserError, match=r"data.self_sha256=abc: the texts of .* start a new run without"):
        written(replace(settings, self_sha256="abc"), model)


def test_a_folder_that_is_given_is_read(settings, model, folder, tmp_path):
    cached = Path(written(settings, model).self_path)
    cached.rename(tmp_path / "own")
    found = written(replace(settings, self_path=str(tmp_path / "own"), self_seed=7), model)
    assert found.self_path == str(tmp_path / "own")
    assert not cached.exists()


def test_models_that_cannot_write_are_refused_by_name(settings, model, folder):
    model.tokenizer.eos_token = None
    model.model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match=r"^data=self: tiny has no end-of-text token, so nothing that it writes ends$"):
        written(settings, model)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length_max": 600}, "data.length_max=600 exceeds the 512 tokens that the model takes: lower it"),
        ({"length_min": 120, "self_share": 0.9}, "data.length_min=120 leaves 0 tokens for a passage"),
        ({"self_chat": True}, "data.self_chat=true: the model's tokenizer has none"),
    ],
    ids=["limit", "room", "chat"],
)
def test_what_has_no_room_is_refused_before_anything_is_kept(settings, model, folder, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        written(replace(settings, **changes), model)
    assert "\n" not in str(caught.value)
    assert not folder.exists() or not [path for path in folder.iterdir() if not path.name.startswith(".")]


def test_several_devices_read_what_one_has_written(settings, model, folder):
    ranks = SimpleNamespace(world=2, sharded=False, broadcast=lambda value: value)
    with pytest.raises(UserError, match=r"trainer.devices=2: texts for data=self are written on one device"):
        written(settings, replace(model, ranks=ranks))
    found = written(settings, model)
    assert written(settings, replace(model, ranks=ranks)) == found
    ranks.broadcast = lambda value: "another's"
    with pytest.raises(UserError, match=r"data.self_path: the processes read different texts"):
        written(settings, replace(model, ranks=ranks))
    ranks.sharded = True
    with pytest.raises(UserError, match=r"step.shard=true: .* use step.shard=false or give them, data.self_path=DIR"):
        written(settings, replace(model, ranks=ranks))
