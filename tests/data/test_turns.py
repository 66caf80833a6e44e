import re
from collections import Counter

import pytest

from duo_id.common.errors import UserError
from duo_id.data.samples import SPLITS
from duo_id.data.turns import TurnsTask

TOLD = {
    "passkey": r"\nRemember: the (\w+) passkey is: ([a-z ]+)\.\n",
    "entry": r"\nEntry ([a-z]+ [a-z]+): ([a-z ]+)\n",
    "fact": r"\nThe (\w+ of \w+) is ([a-z ]+)\.\n",
}
ASKED = {
    "passkey": r"What is the (\w+) passkey\? The \1 passkey is: ([a-z ]+)",
    "entry": r"Look up entry ([a-z]+ [a-z]+): ([a-z ]+)",
    "fact": r"What is the (\w+ of \w+)\? The \1 is ([a-z ]+)",
}


def parts(sample, tokenizer):
    """What a sample tells, {kind: {key: words}}, and its turns, [(kind, key, words)]."""
    text, end, turns = tokenizer.decode(sample["input_ids"]).partition(
        "\n\nThat was the text. Here are the questions.\n"
    )
    assert end
    told = {kind: dict(re.findall(pattern, text)) for kind, pattern in TOLD.items()}
    asked = []
    for line in turns.splitlines():
        ((kind, match),) = [(kind, match) for kind, pattern in ASKED.items() if (match := re.fullmatch(pattern, line))]
        asked.append((kind, *match.groups()))
    return told, asked


@pytest.fixture
def task(quick, tokenizer):
    return lambda turns, split="train", **changes: TurnsTask(
        quick(num_turns=turns, length_min=1800, length_max=2400, **changes), tokenizer, split
    )


@pytest.mark.parametrize(("turns", "kinds"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (8, (3, 3, 2))], ids=str)
def test_each_turn_asks_for_what_the_context_tells(task, tokenizer, turns, kinds):
    made = task(turns)
    for index in range(20):
        sample = made.sample(index, seed=0)
        told, asked = parts(sample, tokenizer)
        assert all(told[kind][key] == words for kind, key, words in asked)
        counts = Counter(kind for kind, _, _ in asked)
        assert tuple(counts[kind] for kind in TOLD) == kinds
        for place, (_, _, words) in enumerate(asked, start=1):
            assert tokenizer.decode(sample["input_ids"][sample["answers"] == place]) == f" {words}"
        assert sample["answers"].max() == turns


def test_as_many_entries_and_facts_are_told_that_nobody_asks_for(task, tokenizer):
    made = task(6)
    for index in range(10):
        told, asked = parts(made.sample(index, seed=0), tokenizer)
        assert {kind: len(keys) for kind, keys in told.items()} == {"passkey": 2, "entry": 4, "fact": 4}
        things = Counter(key.split(" of ")[0] for key in told["fact"])
        assert things == dict.fromkeys((key.split(" of ")[0] for kind, key, _ in asked if kind == "fact"), 2)


def test_questions_come_in_an_order_of_their_own(task, tokenizer):
    made = task(3)
    orders = Counter(tuple(kind for kind, _, _ in parts(made.sample(index, 0), tokenizer)[1]) for index in range(120))
    assert len(orders) == 6
    assert min(orders.values()) > 5


def test_splits_share_no_words(task, tokenizer):
    found = {}
    for split in SPLITS:
        made = task(8, split)
        drawn = [parts(made.sample(index, 0), tokenizer)[0] for index in range(60)]
        texts = [text for told in drawn for kind in ("entry", "fact") for pair in told[kind].items() for text in pair]
        found[split] = {word for text in texts for word in text.split()} - {"of"}
    assert not found["train"] & found["validation"] | found["train"] & found["test"]
    assert not found["validation"] & found["test"]


def test_more_turns_than_there_are_things_are_refused(task):
    with pytest.raises(UserError, match=r"data.num_turns=37 must be at most 36"):
        task(37)
    with pytest.raises(UserError, match=r"too short for 30 turns .* or lower data.num_turns, data.passkey_words"):
        task(30)
