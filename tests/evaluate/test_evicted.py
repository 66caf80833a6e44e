"""Answers after eviction are those of a cache that was read, evicted and asked, and keep the bytes that were asked."""

import pytest
import torch

from duo_id import Eviction, dual_cache, duo_attention, prefill
from duo_id.common.compat import cache_argument
from duo_id.common.errors import UserError
from duo_id.data.settings import HaystackSettings
from duo_id.evaluate.contenders import Contender, contenders
from duo_id.evaluate.evicted import read_evicted
from duo_id.evaluate.reading import Reader
from duo_id.evaluate.settings import EvaluateSettings, EvaluationDataSettings
from duo_id.models.language_model import LanguageModel
from duo_id.models.settings import ModelSettings
from tests.evaluate.test_contenders import FOUND, TOKENS
from tests.evaluate.test_reading import PATTERN, make_items
from tests.evaluate.test_reading import model as model


def how(tokens: int) -> Eviction:
    return Eviction(30 / tokens, "snapkv", window=8)


@pytest.mark.parametrize("batch_tokens", [10**6, 1], ids=["one batch", "one by one"])
@torch.no_grad()
def test_answers_are_those_of_evicted_caches(model: LanguageModel, batch_tokens: int) -> None:
    """After the context, and where an answer lies inside it, after what is before the token in front of the answer."""
    items = make_items()
    with duo_attention(model.model, PATTERN, sparsity=0.5):
        found = read_evicted(Reader(model, batch_tokens, 33), items, how, True)
        for item, answers in zip(items, found, strict=True):
            for question, logits, written in zip(item.questions, answers.logits, answers.generated, strict=True):
                context, prompt = item.context, question.prompt
                if question.place is not None:
                    context, prompt = item.context[: question.place - 1], item.context[question.place - 1 :][:1]
                cache = dual_cache(model.model)
                prefill(model.model, torch.tensor([context]), cache, evict=how(len(context)))
                if question.place is None:
                    assert answers.bytes == cache.retained_bytes
                asked = torch.tensor([[*prompt, *question.answer[:-1]]])
                forked = {cache_argument(model.model): cache.fork(torch.tensor([0]))}
                wanted = model.model(asked, **forked).logits[0, len(prompt) - 1 :]
                torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
                if question.place is not None:
                    assert written is None
                    continue
                ids, tokens = torch.tensor([prompt]), []
                while len(tokens) < item.max_new_tokens:
                    logits = model.model(ids, **{cache_argument(model.model): cache}).logits
                    tokens.append(int(logits[0, -1].argmax()))
                    ids = torch.tensor([tokens[-1:]])
                assert written == tokens
        plain = Reader(model, batch_tokens, 33).read(items, False)
    assert all(not torch.equal(a.logits[1], b.logits[1]) for a, b in zip(found, plain, strict=True)), (
        "something is gone"
    )


def evicting(**given: object) -> dict[str, Contender]:
    lineup = contenders({"found": FOUND, "other#1": FOUND}, [], 0, [], 0, **given)
    return {contender.heads: contender for contender in lineup if contender.evict is not None}


@pytest.mark.parametrize("score", ["snapkv", "keydiff"])
@pytest.mark.parametrize("split", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("cache", [0.6, 0.25, 0.1])
def test_mask_and_eviction_keep_the_share_together(cache: float, split: float, score: str) -> None:
    """To the token where heads share their budget; else less than a token a head is left over."""
    (contender, _) = evicting(caches=[cache], scores=[score], splits=[split]).values()
    mask, evict = contender.mask(TOKENS), contender.evict(TOKENS)
    retrieval, window = int(mask.retrieval.sum()), 20
    kept = evict.kept(TOKENS, mask.sink_size, retrieval) + (6 - retrieval) * window
    wanted = round(cache * 6 * TOKENS)
    assert kept <= wanted
    if retrieval and evict.keep < 1:
        assert kept == wanted if evict.adaptive else kept > wanted - 6
    if split == 0:
        assert retrieval == 6
        assert evict.kept(TOKENS, mask.sink_size) == round(cache * TOKENS)


def test_a_context_that_is_hardly_longer_than_the_window() -> None:
    (contender, _) = evicting(caches=[0.5], scores=["keydiff"]).values()
    for tokens in (1, 5, 20, 21, 30):
        assert contender.evict(tokens).kept(tokens, 4) <= tokens


def test_names_say_score_and_split() -> None:
    found = evicting(caches=[0.5], scores=["snapkv", "kvzip"], splits=[0.25, 0.5], kvs=["exact", "int8"])
    assert sorted(found) == [
        "found + kvzip", "found + kvzip 0.25", "found + snapkv", "found + snapkv 0.25",
        "other + kvzip 0.25#1", "other + kvzip#1", "other + snapkv 0.25#1", "other + snapkv#1",
    ]  # fmt: skip
    assert all(contender.kv == "exact" for contender in found.values())
    assert evicting(caches=[0.5], scores=["snapkv"], kvs=["exact", "int8"]).keys() == {
        "found + snapkv",
        "other + snapkv#1",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evict": ["snapkv"]}, r"^evict=\[snapkv\]: give the shares to keep, such as cache="),
        ({"evict": ["snapkv"], "cache": [0.5], "kv": ["int8"]}, r"^evict=\[snapkv\]: codes are not evicted"),
        ({"patterns": {"a + kvzip": "x"}}, r"^patterns\.a \+ kvzip: rows of evict are called so"),
    ],
    ids=["no share", "codes", "name"],
)
def test_settings_that_cannot_work(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluateSettings(
            "heads",
            ModelSettings("tiny", "tiny"),
            EvaluationDataSettings(HaystackSettings()),
            ["short"],
            [9],
            1,
            1,
            [0.5],
            1,
            **given,
        )
