import re
from collections import Counter
from itertools import combinations

import pytest

from duo_id.data.many_shot import KINDS, PILES, SEEN, SHOWN, ManyShotTask
from duo_id.data.samples import SPLITS
from duo_id.data.words import WORDS
from duo_id.errors import UserError
from tests.data.conftest import find

CARD = r"^Card with ([a-z ]+) goes to ([a-z ]+)$"


def parts(sample, tokenizer):
    """A decoded sample: the cards [(words, pile)] that are shown, and those that are asked about."""
    text = tokenizer.decode(sample["input_ids"], clean_up_tokenization_spaces=False)
    _, head, rest = text.partition("\n\nCards with words on them are laid on piles.")
    shown, end, asked = rest.partition("\n\nNow go on with other cards.\n\n")
    assert head
    assert end
    cards, questions = re.findall(CARD, shown, re.MULTILINE), re.findall(CARD, asked, re.MULTILINE)
    assert len(cards) == shown.count("\n") - 1  # every other line is a card
    assert len(questions) == asked.count("\n")
    return cards, questions


def piles_of(cards):
    """The words on the cards of each pile."""
    found = {}
    for words, pile in cards:
        found.setdefault(pile, set()).update(words.split())
    return found


def test_piles_share_no_words_and_questions_follow_the_examples(quick, tokenizer):
    task = ManyShotTask(quick(length_min=2500, length_max=2500), tokenizer, "train")
    for index in range(20):
        cards, asked = parts(task.sample(index, seed=0), tokenizer)
        piles = piles_of(cards)
        assert len(piles) == PILES
        assert all(len(words) == KINDS for words in piles.values())
        assert not any(first & second for first, second in combinations(piles.values(), 2))
        assert all(len(set(words.split())) == SHOWN for words, _ in cards + asked)
        assert all(set(words.split()) <= piles[pile] for words, pile in asked)
        assert len(asked) == 3


def test_piles_are_shown_evenly(quick, tokenizer):
    task = ManyShotTask(quick(), tokenizer, "train")
    firsts = Counter()
    for index in range(40):
        cards, _ = parts(task.sample(index, seed=0), tokenizer)
        counts = Counter(pile for _, pile in cards)
        assert min(counts.values()) >= max(max(counts.values()) - 1, SEEN)
        firsts["".join(sorted(cards[0][0].split()))] += 1
    assert len(firsts) > 30


def test_answers_have_the_tokens_of_the_examples(quick, any_tokenizer):
    task = ManyShotTask(quick(answer_words=4), any_tokenizer, "train")
    sample = task.sample(0, seed=0)
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    for turn in (1, 2, 3):
        answer, place = sample["input_ids"][answers == turn].tolist(), int((answers == turn).nonzero()[0])
        found = find(task.pile + answer + task.card_end, tokens)
        assert place - len(task.pile) in found
        assert sum(begin < int((answers > 0).nonzero()[0]) - len(task.pile) for begin in found) >= SEEN


def test_cards_fill_the_context(quick, tokenizer):
    task = ManyShotTask(quick(), tokenizer, "train")
    most = len(task.card) + len(task.pile) + len(task.card_end) + 5 * task.longest_word
    for index in range(30):
        tokens = task.sample(index, seed=0)["input_ids"].tolist()
        (head,) = find(task.head, tokens)
        assert 0 <= head < most


def test_splits_share_no_words(quick, tokenizer):
    words = {}
    for split in SPLITS:
        task = ManyShotTask(quick(), tokenizer, split)
        cards = [card for index in range(40) for card in parts(task.sample(index, seed=0), tokenizer)[0]]
        words[split] = {word for card in cards for text in card for word in text.split()}
        assert len(words[split]) == 80
    assert set().union(*words.values()) == set(WORDS)


def test_too_few_examples_are_refused(quick, tokenizer):
    with pytest.raises(UserError, match=r"30 questions about piles of 2 words and 3 examples of each"):
        ManyShotTask(quick(num_questions=30), tokenizer, "train")
