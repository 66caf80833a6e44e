"""Prompts that a model writes after."""

from collections import Counter

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.chat import Chat, plain
from duo_id.data.haystack import load_haystack
from duo_id.data.prompts import REQUESTS, chat_of, counts, prompt_lengths, prompts
from duo_id.data.samples import SPLITS
from duo_id.data.settings import HaystackSettings
from tests.data.conftest import byte_level_bpe


@pytest.fixture
def made(quick, tokenizer):
    def make(chat=None, **changes):
        settings = quick(self_samples=8, self_temperatures=[0, 0.7], **changes)
        lengths = prompt_lengths(settings, None)
        haystacks = {split: load_haystack(settings.haystack, split) for split in SPLITS}
        given = settings, tokenizer, chat or plain(tokenizer), haystacks, lengths
        return [prompt for place in range(len(lengths)) for prompt in prompts(*given, place)]

    return make


def test_each_split_has_its_number_in_lengths_and_temperatures_that_take_turns(made):
    found = made()
    assert Counter(prompt.split for prompt in found) == {"train": 8, "validation": 2, "test": 2}
    train = [prompt for prompt in found if prompt.split == "train"]
    sizes = [(len(prompt.tokens) + prompt.limit, prompt.limit) for prompt in train]
    assert sizes == 3 * [(700, 175)] + 3 * [(800, 200)] + 2 * [(900, 225)]
    assert [prompt.temperature for prompt in train] == [0, 0.7, 0, 0, 0.7, 0, 0, 0.7]


def test_a_prompt_is_a_passage_of_its_split_and_a_request(made, tokenizer):
    texts = {}
    for split in SPLITS:
        haystack = load_haystack(HaystackSettings(), split)
        texts[split] = haystack._text(haystack.start, haystack.stop - haystack.start)
    for prompt in made():
        text = tokenizer.decode(prompt.tokens)
        passage, _, request = text.removesuffix("\n\n").rpartition("\n\n")
        assert request in REQUESTS
        inside = {split: passage[100:300] in whole for split, whole in texts.items()}
        assert inside == {split: split == prompt.split for split in SPLITS}


def test_prompts_are_functions_of_the_seed(made):
    assert made() == made()
    others = made(self_seed=1)
    assert all(first.tokens != second.tokens for first, second in zip(made(), others, strict=True))


@pytest.mark.parametrize(("changes", "limit"), [({"self_tokens": 50}, 50), ({"self_share": 0.5}, 350)], ids=str)
def test_no_more_is_written_than_the_settings_allow(made, changes, limit):
    prompt = made(**changes)[0]
    assert (prompt.limit, len(prompt.tokens)) == (limit, 700 - limit)


def test_a_chat_stands_around_the_prompt(made):
    for prompt in made(chat=Chat((1, 2), (3, 4, 5))):
        assert (prompt.tokens[:2], prompt.tokens[-3:]) == ([1, 2], [3, 4, 5])


def test_the_template_is_used_where_there_is_one(quick):
    tokenizer = byte_level_bpe()
    assert chat_of(quick(), tokenizer) == plain(tokenizer)
    with pytest.raises(
        UserError, match=r"^data.self_chat=true: the model's tokenizer has none, give data.self_chat=fa"
    ):
        chat_of(quick(self_chat=True), tokenizer)
    tokenizer.chat_template = "<s>[{{ messages[0]['content'] }}]</s>"
    assert len(chat_of(quick(), tokenizer).after) == 2
    assert chat_of(quick(self_chat=False), tokenizer) == plain(tokenizer)


def test_lengths_are_few_and_reach_from_the_shortest_to_the_longest(quick):
    assert prompt_lengths(quick(), None) == [700, 800, 900]
    assert prompt_lengths(quick(num_lengths=1), None) == [700]
    many = prompt_lengths(quick(num_lengths=50), None)
    assert (len(many), many[0], many[-1]) == (8, 700, 900)
    assert max(torch.tensor(many).diff()) <= 33
    with pytest.raises(UserError, match=r"data.length_max=900 exceeds the 800 tokens"):
        prompt_lengths(quick(), 800)


def test_no_room_for_a_passage_is_told(made):
    with pytest.raises(UserError, match=r"data.length_min=200 leaves 0 tokens .* 180 tokens .* lower data.self_share"):
        made(length_min=200, self_share=0.9)


def test_held_out_texts_are_a_quarter_and_at_least_one(quick):
    assert counts(quick(self_samples=1)) == {"train": 1, "validation": 1, "test": 1}
    assert counts(quick(self_samples=64)) == {"train": 64, "validation": 16, "test": 16}
