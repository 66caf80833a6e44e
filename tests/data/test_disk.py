import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.datamodule import SampleModule
from duo_id.data.disk import write_dataset
from duo_id.data.registry import make_task
from duo_id.data.samples import Sample
from duo_id.data.settings import DataGenSettings, DataSettings
from duo_id.models.settings import ModelSettings


class Numbered:
    """A task whose sample `index` has index + 1 tokens, all of them the index."""

    def sample(self, index, seed):
        tokens = torch.full((index + 1,), index)
        return Sample(input_ids=tokens, labels=tokens - 100, answers=tokens + seed)


@pytest.fixture
def settings(tmp_path, quick):
    return DataGenSettings(
        model=ModelSettings(name="tiny", id="some/tiny"),
        data=quick(),
        out=str(tmp_path / "made" / "here"),
        n=5,
        n_validation=2,
        n_test=0,
        seed=7,
    )


@pytest.fixture
def written(settings, tokenizer):
    return write_dataset(settings, tokenizer, {"train": Numbered(), "validation": Numbered()})


@pytest.fixture
def disk(written, quick):
    return quick(task="disk", path=str(written))


def test_rows_come_back_in_an_order_of_seed_and_pass(disk, tokenizer):
    task = make_task(disk, tokenizer, "train")

    def one_pass(number, seed=0):
        samples = [task.sample(index, seed) for index in range(5 * number, 5 * number + 5)]
        return [int(sample["input_ids"][0]) for sample in samples]

    orders = [one_pass(number) for number in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [one_pass(0, seed) for seed in range(5)] != [orders[0]] * 5
    assert [one_pass(number) for number in range(4)] == orders
    again = make_task(disk, tokenizer, "train")
    assert int(again.sample(13, 0)["input_ids"][0]) == orders[2][3]


def test_columns_come_back_whole(disk, tokenizer):
    for index in range(2):
        sample = make_task(disk, tokenizer, "validation").sample(index, seed=0)
        tokens = sample["input_ids"]
        assert len(tokens) == int(tokens[0]) + 1
        assert torch.equal(sample["labels"], tokens - 100)
        assert torch.equal(sample["answers"], tokens + 7)
        assert {column.dtype for column in sample.values()} == {torch.int64}


def test_card_says_how_it_was_made(written, settings):
    card = json.loads((written / "card.json").read_text())
    assert card["samples"] == {"train": 5, "validation": 2}
    assert card["longest"] == 5
    assert card["settings"]["data"]["length_max"] == settings.data.length_max
    assert card["settings"]["seed"] == 7
    readme = (written / "README.md").read_text()
    assert readme.startswith("---\npretty_name: passkey")
    assert "  - split: validation\n    path: validation/*.arrow\n---" in readme
    assert json.dumps(card, indent=2) in readme


def test_folder_is_a_plain_dataset_and_nothing_else_stays(written):
    assert sorted(path.name for path in written.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "card.json",
        "dataset_dict.json",
        "train",
        "validation",
    ]
    assert [path.name for path in written.parent.iterdir()] == ["here"]
    assert written.stat().st_mode & 0o055 == (written.parent.stat().st_mode & 0o055)
    assert {split: len(rows) for split, rows in datasets.load_from_disk(written).items()} == {
        "train": 5,
        "validation": 2,
    }


def test_failure_leaves_nothing_behind(settings, tokenizer, tmp_path):
    class Failing(Numbered):
        def sample(self, index, seed):
            if index == 3:
                raise KeyboardInterrupt
            return super().sample(index, seed)

    with pytest.raises(BaseException):  # noqa: B017, PT011
        write_dataset(settings, tokenizer, {"train": Failing(), "validation": Numbered()})
    assert list((tmp_path / "made").iterdir()) == []


def test_a_full_disk_is_told_with_the_folder(settings, tokenizer):
    class Full(Numbered):
        def sample(self, index, seed):
            raise OSError(errno.ENOSPC, "No space left on device")

    told = rf"out={settings.out} cannot be written \(No space left on device\): make room"
    with pytest.raises(UserError, match=told):
        write_dataset(settings, tokenizer, {"train": Full(), "validation": Full()})


def test_existing_folder_is_refused(written, settings, tokenizer):
    before = (written / "card.json").read_bytes()
    with pytest.raises(UserError, match=r"out=.* exists"):
        write_dataset(replace(settings, n=1), tokenizer, {"train": Numbered(), "validation": Numbered()})
    assert (written / "card.json").read_bytes() == before


def test_nothing_to_write_is_refused(settings, tokenizer):
    with pytest.raises(UserError, match="n=0: there are no samples"):
        write_dataset(replace(settings, n=0, n_validation=0), tokenizer, {})


def test_another_vocabulary_is_refused(disk, bos_tokenizer):
    with pytest.raises(UserError, match=r"data.path=.* vocabulary of model=tiny, which differs from this model's"):
        make_task(disk, bos_tokenizer, "train")


def test_samples_beyond_the_models_limit_are_refused(disk, tokenizer):
    make_task(disk, tokenizer, "train", length_limit=5)
    with pytest.raises(UserError, match="has samples of 5 tokens, but the model takes 4"):
        make_task(disk, tokenizer, "train", length_limit=4)


def test_missing_split_is_named(disk, tokenizer):
    with pytest.raises(UserError, match="has no test split, only train, validation"):
        make_task(disk, tokenizer, "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "is not a dataset written by data_gen/"),
        ({"card.json": "oops"}, "is not a dataset written by data_gen/"),
        ({"card.json": "[]"}, "is not a dataset written by data_gen/"),
        ({"card.json": "{}", "dataset_dict.json": '{"splits": []}'}, "is not a dataset written by data_gen/"),
    ],
)
def test_folder_that_is_no_dataset_is_named(tmp_path, quick, tokenizer, files, message):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    settings: DataSettings = quick(task="disk", path=str(folder))
    with pytest.raises(UserError, match=f"data.path=.*{message}") as caught:
        make_task(settings, tokenizer, "train")
    assert "\n" not in str(caught.value)


def test_more_held_out_samples_than_there_are_is_refused(written, tokenizer):
    module = SampleModule(DataSettings(task="disk", path=str(written)), tokenizer, seed=0)
    rows = len(module.task("validation"))
    assert len(module.samples("validation", rows)) == rows
    asked = f"{rows + 1} validation samples are requested, but data.path=.* has {rows}: lower comparison.validation_sam"
    with pytest.raises(UserError, match=asked):
        module.samples("validation", rows + 1)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"longest": "8"}, "card.json: longest='8' is no whole number"),
        ({"vocabulary": None}, "card.json: vocabulary=None is no text"),
        ({"settings": {}}, "card.json: settings lacks model"),
        ({"settings": {"model": {"name": [1]}}}, r"card.json: settings\.model\.name=\[\.\.\.\] is no text"),
    ],
)
def test_a_damaged_card_is_named(written, disk, tokenizer, card, message):
    (written / "SHA256SUMS").unlink()  # others may leave none
    path = Path(disk.path) / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | card))
    with pytest.raises(UserError, match=f"data.path=.*{message}"):
        make_task(disk, tokenizer, "train")


@pytest.mark.parametrize("column", [[0.5], "text", [["a"]], [1]], ids=str)
def test_other_columns_are_named(written, disk, tokenizer, column):
    rows = {name: column if name == "labels" else [[1, 2]] for name in ("input_ids", "labels", "answers")}
    rows["labels"] = column if isinstance(column, list) else [column]
    (written / "SHA256SUMS").unlink()
    shutil.rmtree(written / "train")
    datasets.Dataset.from_dict(rows).save_to_disk(str(written / "train"))
    with pytest.raises(UserError, match=r"data\.path=.*the split train has no rows of input_ids, labels, answers"):
        make_task(disk, tokenizer, "train")
