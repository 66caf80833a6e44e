import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.text import TextTask
from tests.data.conftest import find


@pytest.mark.parametrize("skip", [1, 64, 699])
def test_all_tokens_after_the_skipped_ones_are_labelled(quick, any_tokenizer, skip):
    sample = TextTask(quick(text_skip=skip), any_tokenizer, "train").sample(0, seed=0)
    tokens, places = sample["input_ids"], torch.arange(len(sample["input_ids"]))
    assert torch.equal(sample["labels"], torch.where(places < skip, -100, tokens))
    assert torch.equal(sample["answers"], (places >= skip).long())


@pytest.mark.parametrize(("most", "labelled"), [(1, 1), (100, 100), (636, 636), (637, 636), (None, 636)])
def test_the_last_tokens_alone_are_labelled(quick, any_tokenizer, most, labelled):
    sample = TextTask(quick(text_skip=64, text_tokens=most), any_tokenizer, "train").sample(0, seed=0)
    assert sample["answers"].tolist() == [0] * (700 - labelled) + [1] * labelled
    whole = TextTask(quick(text_skip=64), any_tokenizer, "train").sample(0, seed=0)
    assert torch.equal(sample["input_ids"], whole["input_ids"])


def test_first_token_is_never_labelled(quick, any_tokenizer):
    sample = TextTask(quick(text_skip=0), any_tokenizer, "train").sample(0, seed=0)
    assert sample["labels"][0] == -100
    assert (sample["labels"][1:] >= 0).all()


def test_it_is_plain_text_of_the_haystack(quick, tokenizer, bos_tokenizer, make_haystack):
    document = " ".join(f"word{n}" for n in range(3000))
    for chosen in (tokenizer, bos_tokenizer):
        task = TextTask(quick(), chosen, "train", haystack=make_haystack([document]))
        samples = [task.sample(index, seed=0)["input_ids"] for index in range(20)]
        texts = [chosen.decode(tokens, skip_special_tokens=True) for tokens in samples]
        assert sum(text in document for text in texts) >= 17  # few go on at the haystack's beginning
    assert all(find([bos_tokenizer.bos_token_id], tokens.tolist()) == [0] for tokens in samples)


@pytest.mark.parametrize("score", ["questions", "all"])
def test_there_are_no_questions_to_score(quick, tokenizer, score):
    with pytest.raises(UserError, match=f"data.score={score}: text has no questions") as caught:
        TextTask(quick(score=score), tokenizer, "train")
    assert "\n" not in str(caught.value)


def test_nothing_left_to_label_is_refused(quick, tokenizer):
    with pytest.raises(UserError, match=r"data.length_min=700 .* data.text_skip=700, which need 701 tokens"):
        TextTask(quick(text_skip=700), tokenizer, "train")
