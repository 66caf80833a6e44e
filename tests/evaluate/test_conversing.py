"""Conversations through the dual cache are those of plain forwards over all that was said."""

from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.attention import codes
from duo_id.common.compat import cache_argument
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.evaluate import stops
from duo_id.evaluate.answers import Answers
from duo_id.evaluate.batches import GENERATED, batches, work
from duo_id.evaluate.conversing import _Conversation
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.reading import Reader
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from tests.evaluate.test_reading import make_items as make_others
from tests.evaluate.test_reading import tokens
from tests.support.families import FAMILY_SIZES, LAYERS, SIZES
from tests.support.tiny import tiny_model

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=16)
ENTRY = 2 * 16 * 4  # bytes of a key and a value of one head
STOP = "\N{REPLACEMENT CHARACTER}"  # half of all bytes are read as that


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny_model("llama", vocab_size=258), byte_tokenizer(), "tiny", "tiny", None, "random")


def make_items(stop: str | None = STOP) -> list[Item]:
    """Conversations of three turns, with questions, right answers and limits of different lengths."""
    return [
        Item("t", 160, index, tokens(index, 100), questions_of(index), "exact", 9 + index, stop, turns=True)
        for index in range(3)
    ]


def questions_of(index: int) -> tuple[Question, ...]:
    turns = range(3)
    return tuple(Question(tokens(10 * turn + index, 5 + index + turn), tokens(90 + turn, 1 + turn)) for turn in turns)


def read(model: LanguageModel, items: list[Item], batch_tokens: int = 10**6, chunk_size: int = 10**6) -> list[Answers]:
    reader = Reader(model, batch_tokens, chunk_size)
    return [answers for batch in batches(items, batch_tokens) for answers in reader.read(batch, False)]


def logits_of(model: LanguageModel, ids: list[int]) -> Tensor:
    return model.model(torch.tensor([ids]), use_cache=False).logits[0]


def check_conversation(model: LanguageModel, mask: HeadMask, item: Item, answers: Answers) -> list[int]:
    """A conversation is that of forwards without a cache, token by token; returns its length at each answer's end."""
    ends = stops.end_tokens(model)
    texts = [model.tokenizer.decode([token]) for token in range(258)]
    stopping = [token in ends or (item.stop is not None and item.stop in text) for token, text in enumerate(texts)]
    blank = [not text.strip() and token not in ends for token, text in enumerate(texts)]
    ids, lengths = list(item.context), []
    with duo_attention(model.model, mask), torch.no_grad():
        for number, question in enumerate(item.questions):
            ids += question.prompt
            right = logits_of(model, [*ids, *question.answer])[len(ids) - 1 : -1]
            torch.testing.assert_close(answers.logits[number], right, atol=1e-4, rtol=0)
            said: list[int] = []
            while len(said) < item.max_new_tokens:
                said.append(int(logits_of(model, [*ids, *said])[-1].argmax()))
                if stopping[said[-1]] and not all(blank[token] for token in said):
                    break
            assert answers.generated[number] == said
            ids += [token for token in said if token not in ends]
            lengths.append(len(ids))
    return lengths


@pytest.mark.parametrize(
    ("sparsity", "batch_tokens", "chunk_size"),
    [(0.5, 10**6, 10**6), (0.5, 1, 7), (0.5, 256, 33), (0, 256, 33), (1, 10**6, 10**6)],
    ids=["together", "alone", "by-twos", "no-head-streams", "all-stream"],
)
def test_turns_are_those_of_plain_forwards(
    sparsity: float, batch_tokens: int, chunk_size: int, model: LanguageModel
) -> None:
    """Answers of different lengths stay, right answers do not; other items of the batch are answered as always."""
    mask, retrieval = PATTERN.binarize(sparsity=sparsity), round(6 * (1 - sparsity))
    items = make_items()
    with duo_attention(model.model, mask):
        found = read(model, [*items, *make_others(1)], batch_tokens, chunk_size)
        (other,) = read(model, make_others(1))
    said = set()
    for item, answers in zip(items, found, strict=False):
        lengths = check_conversation(model, mask, item, answers)
        assert answers.total_bytes == [ENTRY * (retrieval * length + (6 - retrieval) * 20) for length in lengths]
        said |= {len(text) for text in answers.generated if text}
    assert len(said) > 2, "answers of different lengths"
    torch.testing.assert_close(found[-1].logits, other.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", ["exact", "int4"])
def test_right_answers_see_what_a_cache_without_copies_holds(
    kv: str, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of the conversation too, whose tokens were read one by one after the first question's beginning."""
    monkeypatch.setattr(codes, "GROUP", 16)
    items = make_items()
    shortest = min(len(item.questions[0].prompt) for item in items)
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5), kv=kv), torch.no_grad():
        for item, answers in zip(items, read(model, items), strict=True):
            said: list[int] = []
            for question, logits, text in zip(item.questions, answers.logits, answers.generated, strict=True):
                said += question.prompt
                cache = dual_cache(model.model)
                options = {cache_argument(model.model): cache, "use_cache": True}
                pieces = [[*item.context], said[:shortest], *([token] for token in said[shortest:])]
                outputs = [model.model(torch.tensor([piece]), **options).logits[0, -1:] for piece in pieces][-1:]
                if len(question.answer) > 1:
                    outputs.append(model.model(torch.tensor([question.answer[:-1]]), **options).logits[0])
                torch.testing.assert_close(logits, torch.cat(outputs), atol=1e-4, rtol=0)
                said += [token for token in text or () if token not in stops.end_tokens(model)]


def test_a_cache_that_forgets_its_answers_answers_otherwise(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check above would find."""
    plain = _Conversation.next_token

    def forgetful(talk: _Conversation, *given: Any) -> int:
        answers = not talk.given
        token = plain(talk, *given)
        return 0 if answers else token

    monkeypatch.setattr(_Conversation, "next_token", forgetful)
    (item, *_), mask = make_items(), PATTERN.binarize(sparsity=0)
    with duo_attention(model.model, mask):
        (answers,) = read(model, [item])
    with pytest.raises(AssertionError):
        check_conversation(model, mask, item, answers)


def test_an_end_of_text_ends_an_answer_and_does_not_stay(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, (item, *_) = PATTERN.binarize(sparsity=0.5), make_items(stop=None)
    with duo_attention(model.model, mask):
        (answers,) = read(model, [item])
    assert [len(text or []) for text in answers.generated] == [9, 9, 9], "nothing ends them"
    assert answers.generated[0] is not None
    end = answers.generated[0][3]
    monkeypatch.setattr(stops, "end_tokens", lambda model: {end})
    with duo_attention(model.model, mask):
        (answers,) = read(model, [item])
    assert answers.generated[0].index(end) + 1 == len(answers.generated[0]) <= 4
    check_conversation(model, mask, item, answers)


@pytest.mark.parametrize("family", ["jamba", "bamba"])
def test_models_that_lose_their_state_between_chunks_converse_too(family: str) -> None:
    numbers = LAYERS | SIZES | FAMILY_SIZES[family] | {"vocab_size": 258, "max_position_embeddings": 512}
    odd = LanguageModel(tiny_model(family, **numbers), byte_tokenizer(), "tiny", "tiny", None, "random")
    mask = HeadMask(torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]], dtype=torch.bool), 4, 16, [1, 3])
    items = make_items()
    with duo_attention(odd.model, mask):
        found = read(odd, items)
    for item, answers in zip(items, found, strict=True):
        check_conversation(odd, mask, item, answers)


def test_work_of_conversations_is_reported_token_by_token(model: LanguageModel) -> None:
    done: list[int] = []
    items = make_items()
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5)):
        Reader(model, 10**6, 10**6, done.append).read(items, False)
    questions = sum(len(question.prompt) for item in items for question in item.questions)
    assert work(items, False) == work(items, True) == 300 + GENERATED * (questions + 3 * (9 + 10 + 11))
    assert 0 < sum(done) <= work(items, False)
