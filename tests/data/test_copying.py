import re
from itertools import pairwise

import pytest

from duo_id.common.errors import UserError
from duo_id.data.copying import CopyingTask
from tests.data.conftest import find

TEXT_END = "\n\nThese were the pages. Quotations from them follow.\n"


def parts(task, sample):
    """The tokens of the hay, and [(quoted tokens, answer's tokens)]."""
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    (end,) = find(task.text_end, tokens)
    asked = []
    for turn in range(1, int(answers.max()) + 1):
        places = (answers == turn).nonzero()[:, 0].tolist()
        question = tokens[: places[0]]
        assert question[-task.quoted - len(task.question) : -task.quoted] == task.question
        asked.append((question[-task.quoted :], [tokens[place] for place in places]))
    return tokens[len(task.head) : end], asked


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_quotations_go_on_as_in_the_hay(quick, any_tokenizer):
    task = CopyingTask(quick(answer_tokens=7), any_tokenizer, "train")
    for index in range(30):
        hay, asked = parts(task, task.sample(index, seed=0))
        assert len(asked) == 3
        for quoted, answer in asked:
            assert len(answer) == 7
            (place,) = find(quoted, hay)  # stands there once
            assert hay[place + len(quoted) :][:7] == answer
            assert decode(any_tokenizer, hay).count(decode(any_tokenizer, quoted)) == 1


def test_whole_sample_reads_as_intended(quick, tokenizer):
    text = tokenizer.decode(CopyingTask(quick(), tokenizer, "train").sample(0, seed=0)["input_ids"])
    hay, end, questions = text.partition(TEXT_END)
    assert hay.startswith("Read these pages with care: parts of them have to be quoted afterwards.\n\n")
    assert end
    quotations = questions.removeprefix("\nQuotation:").removesuffix("\n").split("\n\nQuotation:")
    assert len(quotations) == 3
    assert all(hay.count(quotation) == 1 for quotation in quotations)


def test_as_many_words_are_quoted_whatever_the_tokenizer(quick, any_tokenizer):
    task = CopyingTask(quick(), any_tokenizer, "train")
    quoted = [quoted for index in range(10) for quoted, _ in parts(task, task.sample(index, seed=0))[1]]
    words = [len(decode(any_tokenizer, tokens).split()) for tokens in quoted]
    assert 2 <= sum(words) / len(words) <= 7


def test_quotations_begin_with_a_word_but_where_there_are_none(quick, tokenizer):
    task = CopyingTask(quick(), tokenizer, "train")
    quoted = [quoted for index in range(50) for quoted, _ in parts(task, task.sample(index, seed=0))[1]]
    assert sum(bool(re.match(r" \w", tokenizer.decode(tokens))) for tokens in quoted) > 0.95 * len(quoted)


def test_text_without_spaces_is_quoted_too(quick, any_tokenizer, make_haystack):
    text = "".join(chr(0x4E00 + (97 * n * n + n) % 20000) for n in range(9000))
    task = CopyingTask(quick(length_min=1600, length_max=2000), any_tokenizer, "train", haystack=make_haystack([text]))
    hay, asked = parts(task, task.sample(0, seed=0))
    assert all(len(find(quoted, hay)) == 1 for quoted, _ in asked)


def test_passages_are_spread_over_the_hay_and_do_not_overlap(quick, tokenizer):
    task = CopyingTask(quick(length_min=900, depth_min=0.1, depth_max=0.7), tokenizer, "train")
    depths, orders = [], set()
    for index in range(60):
        hay, asked = parts(task, task.sample(index, seed=0))
        places = [find(quoted, hay)[0] for quoted, _ in asked]
        orders.add(tuple(sorted(range(3), key=places.__getitem__)))
        assert all(second - first >= task.passage for first, second in pairwise(sorted(places)))
        depths += [place / len(hay) for place in places]
        assert max(places) + task.passage <= 0.7 * len(hay) + 1
    assert len(orders) == 6
    assert 0.09 < min(depths) < 0.14
    assert max(depths) > 0.55


def test_haystack_that_repeats_itself_is_named(quick, tokenizer, make_haystack):
    haystack = make_haystack(["word " * 9999])
    with pytest.raises(UserError, match=r"repeats itself.* data.haystack") as caught:
        CopyingTask(quick(), tokenizer, "train", haystack=haystack)
    assert "\n" not in str(caught.value)


def test_hay_without_words_of_its_own_is_passed_over(quick, tokenizer, make_haystack):
    text = " ".join(f"word{n}" for n in range(1000))
    haystack = make_haystack([f"{'=' * 2000} {text} {'-' * 2000}"])
    task = CopyingTask(quick(), tokenizer, "train", haystack=haystack)
    for index in range(20):
        hay, asked = parts(task, task.sample(index, seed=0))
        assert all(len(find(quoted, hay)) == 1 for quoted, _ in asked)


def test_passages_at_one_depth_are_refused(quick, tokenizer):
    with pytest.raises(UserError, match=r"data.depth_max=0.5 must exceed data.depth_min"):
        CopyingTask(quick(depth_min=0.5, depth_max=0.5), tokenizer, "train")
