import json
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from duo_id.common.config import conf_dir, parse
from duo_id.common.errors import UserError
from duo_id.data import __main__ as command
from duo_id.data.registry import TRAINING_TASKS, make_task
from duo_id.data.settings import DataSettings


@pytest.fixture
def script():
    return command


@pytest.fixture
def tokenizer(monkeypatch):
    """One token a byte, and the only one that the script can load."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    monkeypatch.setattr("duo_id.models.loading.load_tokenizer", lambda settings: tokenizer)
    return tokenizer


def compose(*overrides, name=None):
    """The config of this name; without one, a bare config to add groups to."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.fixture
def make_config(tmp_path):
    """What the script gets for a task."""
    sizes = ("data.length_min=800", "data.length_max=900", "data.num_passkeys=2", "data.passkey_words=3")
    counts = ("data.num_questions=2", "data.num_turns=2", "n=4", "n_validation=1", "n_test=0", "seed=3")
    return lambda task: compose(f"out={tmp_path / 'set'}", f"data={task}", *sizes, *counts, name="data_gen")


@pytest.fixture
def config(make_config):
    return make_config("passkey")


@pytest.mark.parametrize("task", [task for task in TRAINING_TASKS if task not in ("disk", "self")])
def test_what_is_written_is_what_training_would_draw(script, make_config, tokenizer, capsys, task):
    config = make_config(task)
    script.generate(config)
    assert capsys.readouterr().out.strip() == config.out
    written = make_task(parse(DataSettings, compose("+data=disk", f"data.path={config.out}").data), tokenizer, "train")
    drawn = make_task(parse(DataSettings, config.data), tokenizer, "train")
    expected = {tuple(drawn.sample(index, 3)["input_ids"].tolist()) for index in range(4)}
    assert {tuple(written.sample(index, 0)["input_ids"].tolist()) for index in range(4)} == expected
    labels = written.sample(0, 0)["labels"]
    assert torch.equal(labels >= 0, written.sample(0, 0)["answers"] > 0)
    card = json.loads((Path(config.out) / "card.json").read_text())
    assert card["samples"] == {"train": 4, "validation": 1}
    assert (card["settings"]["data"]["task"], card["settings"]["data"]["num_passkeys"]) == (task, 2)


def test_existing_folder_is_refused(script, config, tokenizer):
    Path(config.out).mkdir()
    with pytest.raises(UserError, match=r"out=.* exists"):
        script.generate(config)


def test_missing_out_is_named(script, config, tokenizer):
    config.out = "???"
    with pytest.raises(UserError, match="out"):
        script.generate(config)


def test_data_configs_compose_to_valid_settings(tmp_path):
    assert parse(DataSettings, compose("+data=passkey").data).haystack.source == "embedded"
    file = parse(DataSettings, compose("+data=passkey", "data/haystack=file", "data.haystack.path=a.txt").data)
    assert (file.haystack.source, file.haystack.path, file.task) == ("file", "a.txt", "passkey")
    assert parse(DataSettings, compose("+data=passkey", "data/haystack=hub").data).haystack.id
    disk = parse(DataSettings, compose("+data=disk", f"data.path={tmp_path}").data)
    assert (disk.task, disk.path) == ("disk", str(tmp_path))
    with pytest.raises(UserError, match=r"data.path=DIR"):
        parse(DataSettings, compose("+data=disk").data)
    with pytest.raises(UserError, match=r"data.haystack.path=FILE"):
        parse(DataSettings, compose("+data=passkey", "data/haystack=file").data)
