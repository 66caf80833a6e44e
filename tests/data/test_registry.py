import pytest

from duo_id.common.errors import UserError
from duo_id.data import settings
from duo_id.data.choices import TASK_NAMES
from duo_id.data.registry import DRAFTED, TRAINING_TASKS, make_task
from duo_id.data.samples import SPLITS
from duo_id.data.settings import DataSettings
from duo_id.train.settings import TrainSettings
from tests.evaluate.tasks.making import tokenizer_of
from tests.support.commands import settings_of

NAMES = [name for name in TRAINING_TASKS if name not in ("disk", "self")]  # which need no finished samples


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_task(quick, tokenizer, name):
    task = make_task(quick(task=name, mixture={"passkey": 1.0}), tokenizer, "test")
    assert name == "mixture" or type(task) is DRAFTED[name]
    assert task.split == "test" if name != "mixture" else set(task.tasks) == {"passkey"}


def test_unknown_task_is_named_with_those_there_are(quick):
    choices = "passkey, key_value, .*disk, did you mean passkey"
    with pytest.raises(UserError, match=rf"data.task=passkeys: choose one of {choices}") as caught:
        quick(task="passkeys")
    assert "\n" not in str(caught.value)


def test_another_task_is_one_class_and_its_name(quick, tokenizer, monkeypatch):
    class Other:
        def __init__(self, settings, tokenizer, split, length_limit=None):
            self.split = split

    monkeypatch.setitem(TRAINING_TASKS, "other", Other)
    monkeypatch.setattr(settings, "TASK_NAMES", (*TASK_NAMES, "other"))
    assert make_task(quick(task="other"), tokenizer, "test").split == "test"


@pytest.mark.parametrize("name", NAMES)
def test_sizes_in_conf_suit_the_model_in_conf(tmp_path, name):
    data: DataSettings = settings_of("train", TrainSettings, f"data={name}", folder=tmp_path).data
    assert data.task == name
    assert (data.length_min, data.length_max) == (256, 384)
    tokenizer = tokenizer_of("smollm2")
    for split in SPLITS:
        task = make_task(data, tokenizer, split)
        samples = [task.sample(index, seed=0) for index in range(10)]
        assert all(256 <= len(sample["input_ids"]) <= 384 for sample in samples)
        assert all((sample["labels"] >= 0).sum() >= 10 for sample in samples)
