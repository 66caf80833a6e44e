"""Samples of texts that a model wrote, and files that hold something else."""

import json
import shutil

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.common.integrity import write_sums
from duo_id.data.datamodule import SampleModule
from duo_id.data.registry import make_task
from duo_id.data.written import TEXTS, WrittenText, read_written, written_lines


def text(split, prompt, written, temperature=0.0):
    return WrittenText(split, temperature, tuple(range(prompt)), tuple(range(100, 100 + written)))


TEXTS_OF = [text("train", 20 + 10 * number, 3 + number) for number in range(6)]
TEXTS_OF += [text("validation", 12, 4), text("test", 30, 1, temperature=0.7), text("test", 31, 2)]


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = tmp_path / "written"
    path.mkdir()
    (path / TEXTS).write_text(written_lines(TEXTS_OF, tokenizer))
    write_sums(path)
    return path


@pytest.fixture
def task(folder, quick, tokenizer):
    def make(split="train", limit=None, **changes):
        return make_task(quick(task="self", self_path=str(folder), **changes), tokenizer, split, limit)

    return make


def test_what_is_read_is_what_was_written(folder):
    texts, digest = read_written(str(folder))
    assert texts == TEXTS_OF
    assert read_written(str(folder), digest)[1] == digest


def test_what_the_model_wrote_is_the_answer(task):
    sample = task("test").sample(0, seed=0)
    prompt = int((sample["answers"] == 0).sum())
    (found,) = [one for one in TEXTS_OF if one.split == "test" and len(one.prompt) == prompt]
    assert sample["input_ids"].tolist() == [*found.prompt, *found.written]
    assert sample["labels"].tolist() == [-100] * prompt + list(found.written)
    assert sample["answers"].tolist() == [0] * prompt + [1] * len(found.written)
    assert {column.dtype for column in sample.values()} == {torch.int64}


def test_passes_are_complete_and_in_orders_of_their_own(task):
    def lengths(number, seed):
        return [len(task().sample(6 * number + index, seed)["input_ids"]) for index in range(6)]

    assert all(sorted(lengths(number, 0)) == [len(one) for one in TEXTS_OF[:6]] for number in range(3))
    assert len({tuple(lengths(number, seed)) for number in range(2) for seed in range(2)}) > 1
    assert lengths(1, 0) == lengths(1, 0)


def test_a_curriculum_begins_with_the_shortest(task):
    made = task(curriculum=12)
    lengths = [{len(made.sample(index, seed)["input_ids"]) for seed in range(40)} for index in range(12)]
    assert [len(drawn) for drawn in lengths] == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    assert lengths[0] == {len(TEXTS_OF[0])}
    assert len(task("test", curriculum=12).sample(0, 0)["input_ids"]) in (31, 33)


def test_a_mixture_has_them_in_its_proportion(task, folder, quick, tokenizer):
    weights = {"passkey": 1.0, "self": 1.0}
    mixed = make_task(quick(task="mixture", mixture=weights, self_path=str(folder)), tokenizer, "train")
    assert [len(mixed.sample(index, 0)["input_ids"]) >= 700 for index in range(6)] == [True, False] * 3


def test_more_than_there_are_is_told_with_the_settings_to_change(folder, quick, tokenizer):
    module = SampleModule(quick(task="self", self_path=str(folder)), tokenizer, seed=0)
    with pytest.raises(
        UserError, match=r"3 test samples .* data.self_path=.* has 2: lower comparison.samples, or raise data.self_s"
    ):
        module.samples("test", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "all"}, "data.score=all: self has no questions, choose answers, or data.mixture.self=0"),
        ({"self_path": None}, "data=self reads what a model wrote: give data.self_path=DIR"),
        ({"self_path": "not/there"}, "data.self_path=not/there: there is no texts.jsonl in it"),
        ({"self_sha256": "abc"}, "data.self_sha256=abc: the texts of data.self_path=.* have the digest .*"),
        ({"length_min": 1, "length_max": 77}, r"has texts of 78 tokens, more than .* \(77\): give others"),
        ({"limit": 77}, r"has texts of 78 tokens, more than .* \(77\): give others"),
    ],
    ids=["score", "no folder", "not there", "another digest", "too long", "too long for the model"],
)
def test_what_does_not_fit_is_one_line(task, folder, quick, tokenizer, changes, message):
    limit = changes.pop("limit", None)
    settings = quick(**{"task": "self", "self_path": str(folder)} | changes)
    with pytest.raises(UserError, match=message) as caught:
        make_task(settings, tokenizer, "train", limit)
    assert "\n" not in str(caught.value)


ROW = {"split": "train", "temperature": 0.0, "prompt": [1, 2], "written": [3]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"split": "all"}, "line 1: split=all is none of train, validation, test"),
        (ROW | {"prompt": []}, "line 1: prompt="),
        (ROW | {"written": [-1]}, "line 1: written.0=-1 must be greater than or equal to 0"),
        (ROW | {"written": ["a"]}, "line 1: written.0='a' is no whole number"),
        (ROW | {"written": [256]}, "has token 256, and the model knows 256: give what this model wrote"),
        (ROW | {"temperature": -1.0}, "line 1: temperature=-1.0 must be"),
        ({"split": "train"}, "line 1 lacks temperature, prompt, written"),
        (ROW | {"split": "test"}, "has no train texts"),
        ([1], "line 1: expected a JSON object, found list"),
    ],
    ids=["split", "no prompt", "negative", "a word", "unknown token", "temperature", "missing", "no train", "a list"],
)
def test_files_are_data_of_one_schema(task, folder, row, message):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / TEXTS).write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        task()
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_told(task, folder):
    path = folder / TEXTS
    path.write_text(path.read_text().replace("101", "102", 1))
    with pytest.raises(UserError, match=r"is not what was written: .* remove data.self_path="):
        task()
