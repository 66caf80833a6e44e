"""Reading through the dual cache gives the logits of a plain masked forward, and the tokens of `generate`."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from duo_id.attention import codes
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import continuation
from duo_id.deploy.graphs import DecodeSteps
from duo_id.deploy.install import duo_attention
from duo_id.evaluate import reading, stops
from duo_id.evaluate.answers import Answers
from duo_id.evaluate.batches import GENERATED, batches, work
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.reading import Reader
from duo_id.models.language_model import LanguageModel, end_tokens
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from tests.support.families import FAMILY_SIZES, LAYERS, SIZES
from tests.support.tiny import tiny_model

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=16)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(tiny_model("llama", vocab_size=258), byte_tokenizer(), "tiny", "tiny", None, "random")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some answers come from captured steps, and some do not."""
    monkeypatch.setattr(reading, "CAPTURED_FROM", NEW_TOKENS)


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def make_items(count: int = 3) -> list[Item]:
    """Questions of different lengths after the context, and one inside it, at different positions; different limits."""
    items = []
    for index in range(count):
        context = tokens(index, 100)
        questions = (
            Question(tokens(10 + index, 5), tokens(20 + index, 4)),
            Question((), context[50 + index : 56 + index], place=50 + index),
            Question(tokens(30 + index, 9 + index), tokens(40 + index, 1)),
        )
        items.append(Item("t", 128, index, context, questions, max_new_tokens=NEW_TOKENS + index, stop=None))
    return items


def read(model: LanguageModel, items: list[Item], batch_tokens: int, chunk_size: int = 10**6) -> list[Answers]:
    reader = Reader(model, batch_tokens, chunk_size)
    return [answers for batch in batches(items, batch_tokens) for answers in reader.read(batch, True)]


def until_end(model: LanguageModel, text: list[int]) -> list[int]:
    """A text up to the token that ends it, if one does."""
    return text[: next((place for place, token in enumerate(text) if token in end_tokens(model)), len(text)) + 1]


def check_answers(model: LanguageModel, mask: HeadMask, batch_tokens: int, chunk_size: int) -> None:
    """The reader's answers are those of whole texts without a cache, and of `generate`."""
    items = make_items()
    with duo_attention(model.model, mask), torch.no_grad():
        read_answers = read(model, items, batch_tokens, chunk_size)
        for item, answers in zip(items, read_answers, strict=True):
            for number, question in enumerate(item.questions):
                inside = question.place is not None
                ids = torch.tensor([item.context if inside else (*item.context, *question.prompt, *question.answer)])
                start = question.place if inside else len(item.context) + len(question.prompt)
                logits = model.model(ids, use_cache=False).logits[0, start - 1 : start - 1 + len(question.answer)]
                torch.testing.assert_close(answers.logits[number], logits, atol=1e-4, rtol=0)
                if inside:
                    assert answers.generated[number] is None
                    continue
                prompt = ids[:, :start]
                options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
                expected = model.model.generate(prompt, max_new_tokens=item.max_new_tokens, **options)[0, start:]
                assert answers.generated[number] == until_end(model, expected.tolist())


@pytest.mark.parametrize(("batch_tokens", "chunk_size"), [(10**6, 10**6), (10**6, 7), (1, 10**6), (256, 33)])
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_answers_are_those_of_plain_forwards(
    sparsity: float, batch_tokens: int, chunk_size: int, model: LanguageModel
) -> None:
    check_answers(model, PATTERN.binarize(sparsity=sparsity), batch_tokens, chunk_size)


@pytest.mark.parametrize("batch_tokens", [10**6, 256, 1], ids=str)
def test_free_text_is_that_of_generate(batch_tokens: int, model: LanguageModel) -> None:
    """What a mask writes, its logits, those along another text, and those of full attention along what it wrote."""
    items = [*make_items(), replace(make_items(1)[0], index=9, questions=make_items(1)[0].questions[1:2])]
    full, mask = PATTERN.binarize(sparsity=0), PATTERN.binarize(sparsity=1)
    reader, others = Reader(model, batch_tokens, 40), {item: tokens(50 + item.index, 7) for item in items[:3]}
    for batch in batches(items, batch_tokens):
        with duo_attention(model.model, full):
            of_full = reader.read(batch, False, write=11, keep=True)
        followed = {item: others[item] for item in batch if item in others}
        with duo_attention(model.model, mask):
            of_mask = reader.read(batch, False, write=11, texts=followed)
        own = {item: said.written.tokens for item, said in zip(batch, of_mask, strict=True) if said.written}
        with duo_attention(model.model, full):
            along_own = reader.follow(own)
        for item, *both in zip(batch, of_full, of_mask, strict=True):
            if item not in others:
                assert [said.written for said in both] == [None, None], "all its answers are inside the context"
                continue
            prompt = torch.tensor([(*item.context, *item.questions[0].prompt)])
            for heads, said in zip((full, mask), both, strict=True):
                assert said.written is not None
                with duo_attention(model.model, heads), torch.no_grad():
                    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
                    expected = model.model.generate(prompt, max_new_tokens=11, **options)[0, prompt.shape[1] :]
                assert said.written.tokens == expected.tolist()
                check_along(model, heads, prompt, said.written.tokens, said.written.logits)
            assert both[1].along is not None
            check_along(model, mask, prompt, others[item], both[1].along)
            check_along(model, full, prompt, own[item], along_own[item])


def check_along(model: LanguageModel, mask: HeadMask, prompt: Tensor, text: Sequence[int], found: Tensor) -> None:
    """Logits along a text are those of a forward without a cache."""
    ids = torch.cat([prompt, torch.tensor([list(text)])], 1)
    with duo_attention(model.model, mask), torch.no_grad():
        logits = model.model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
def test_a_gpu_says_what_a_cpu_says(sparsity: float, model: LanguageModel) -> None:
    """Answers, conversations and free text, all of them long enough for graphs."""
    talk = Item("t", 160, 7, tokens(7, 100), make_items(1)[0].questions[:1] * 3, "exact", 30, turns=True)
    items = [*(replace(item, max_new_tokens=40) for item in make_items()), talk]
    said = []
    for device in ("cpu", "cuda"):
        moved = replace(model, model=model.model.to(device))
        with duo_attention(moved.model, PATTERN.binarize(sparsity=sparsity)):
            said.append(Reader(moved, 10**6, 40).read(items, True, write=50))
    model.model.to("cpu")
    for on_cpu, on_gpu in zip(*said, strict=True):
        assert on_cpu.generated == on_gpu.generated
        assert (on_cpu.written and on_cpu.written.tokens) == (on_gpu.written and on_gpu.written.tokens)


def test_free_text_ends_where_the_model_ends_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token that ends it, even where others write on."""
    items = make_items()
    with duo_attention(model.model, PATTERN.binarize(sparsity=0)):
        plain = [said.written for said in Reader(model, 10**6, 10**6).read(items, False, write=11)]
        assert plain[0] is not None
        end = plain[0].tokens[4]
        monkeypatch.setattr(stops, "end_tokens", lambda model: {end})
        ended = [said.written for said in Reader(model, 10**6, 10**6).read(items, False, write=11)]
    for before, after in zip(plain, ended, strict=True):
        assert before is not None
        assert after is not None
        first = before.tokens.index(end) + 1 if end in before.tokens else 11
        assert after.tokens == before.tokens[:first]
        assert len(after.logits) == first


@pytest.mark.parametrize("family", ["jamba", "bamba"])
@pytest.mark.parametrize(("batch_tokens", "chunk_size"), [(10**6, 33), (1, 10**6)])
def test_models_that_lose_their_state_or_place_between_chunks_answer_as_without_a_cache(
    family: str, batch_tokens: int, chunk_size: int
) -> None:
    numbers = LAYERS | SIZES | FAMILY_SIZES[family] | {"vocab_size": 258, "max_position_embeddings": 512}
    odd = LanguageModel(tiny_model(family, **numbers), byte_tokenizer(), "tiny", "tiny", None, "random")
    retrieval = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    check_answers(odd, HeadMask(retrieval, 4, 16, [1, 3]), batch_tokens, chunk_size)


def test_bytes_are_those_of_the_context(model: LanguageModel) -> None:
    entry = 2 * 16 * 4  # key and value, head_dim, float32
    for sparsity, entries in ((0, 6 * 100), (0.5, 3 * 100 + 3 * 20), (1, 6 * 20)):
        with duo_attention(model.model, PATTERN.binarize(sparsity=sparsity)):
            assert {answers.bytes for answers in read(model, make_items(), 10**6)} == {entries * entry}
            for item, answers in zip(make_items(), read(model, make_items(), 10**6), strict=True):
                for question, said, total in zip(item.questions, answers.generated, answers.total_bytes, strict=True):
                    following = len(question.prompt) + len(said or ())
                    grown = round(6 * (1 - sparsity)) * following  # in heads that stream, the oldest make room
                    assert total == ((entries + grown) * entry if question.place is None else None)


def test_answers_inside_a_context_see_codes_of_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as one chunk holds it, it would see none; questions after it do as they are."""
    monkeypatch.setattr(codes, "GROUP", 16)
    monkeypatch.setattr(reading, "CODED_CHUNK", 32)
    found = {}
    for kv in ("exact", "int4"):
        with duo_attention(model.model, PATTERN.binarize(sparsity=0), kv=kv):
            ((after, inside, _),) = [answers.logits for answers in read(model, make_items(1), 10**6)]
            found[kv] = after, inside
    difference = [(one - other).abs().max() for one, other in zip(*found.values(), strict=True)]
    assert min(difference) > 1e-4
    with duo_attention(model.model, PATTERN.binarize(sparsity=0), kv="int4"):
        ((_, small, _),) = [answers.logits for answers in read(model, make_items(1), 10**6, 32)]
    assert small.equal(found["int4"][1])


def test_inside_a_context_the_head_computes_the_answers_alone(model: LanguageModel) -> None:
    """Their positions differ by context, and no context computes logits at those of another."""
    items = [
        Item("t", 128, index, tokens(index, 100), (Question((), (1,) * 6, place=10 + 20 * index),))
        for index in range(4)
    ]
    computed: list[torch.Size] = []
    hook = model.model.lm_head.register_forward_hook(lambda module, inputs, output: computed.append(output.shape))
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5)):
        continuation(model.model, torch.tensor([items[0].context]))  # tried already
        computed.clear()
        Reader(model, 10**6, 100).read(items, False)
    hook.remove()
    assert [tuple(shape[:2]) for shape in computed] == [(1, 4 * 6)]


def test_answers_end_at_the_stop_and_decoding_ends_with_the_last_of_them(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    newline, letter, blank = (byte_tokenizer()(x, add_special_tokens=False)["input_ids"][0] for x in "\na ")
    forwards = []
    read_prompt, decode = Reader.forward_following, DecodeSteps.__call__
    script = {0: newline, 1: blank, 2: letter, 3: letter, 4: newline}  # a blank line in front ends nothing

    def following(reader: Reader, ids: Tensor, cache: DualCache, keep: Tensor, past: int) -> Tensor:
        logits = read_prompt(reader, ids, cache, keep, past)
        if len(keep) == 1:
            logits[:, -1] = 0
            logits[:, -1, script[0]] = 1
            forwards.append(ids.shape)
        return logits

    def decoded(steps: DecodeSteps, ids: Tensor, past: int) -> Tensor:
        logits = decode(steps, ids, past).zero_()
        logits[:, script.get(len(forwards), letter)] = 1
        forwards.append(ids.shape)
        return logits

    monkeypatch.setattr(Reader, "forward_following", following)
    monkeypatch.setattr(DecodeSteps, "__call__", decoded)
    monkeypatch.setattr("duo_id.evaluate.reading.CHECK_EVERY", 1)
    item = Item("t", 128, 0, tokens(0, 100), (Question(tokens(1, 5), tokens(2, 4)),), max_new_tokens=50)
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5)):
        (answers,) = read(model, [item], 10**6)
    assert answers.generated == [[newline, blank, letter, letter, newline]]
    assert len(forwards) == 5


def test_nothing_is_generated_where_nothing_is_asked_for(model: LanguageModel) -> None:
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5)):
        (answers, *_) = Reader(model, 10**6, 10**6).read(make_items(1), False)
    assert answers.generated == [None, None, None]


def test_batches_hold_what_can_be_read_together() -> None:
    question = (Question((1,), (2,)),)
    items = [Item("a", 10, i, (1,) * 8, question) for i in range(5)]
    items += [Item("b", 10, 0, (1,) * 8, question), Item("a", 20, 0, (1,) * 18, question)]
    items += [Item("a", 10, 5, (1,) * 7, question), Item("c", 10, 0, (1,) * 8, (Question((), (1,), place=2),))]
    grouped = batches(items, 25)
    assert [[(item.task, item.length, item.index) for item in batch] for batch in grouped] == [
        [("a", 10, 0), ("a", 10, 1)],
        [("a", 10, 2), ("a", 10, 3)],
        [("a", 10, 4), ("b", 10, 0)],
        [("a", 20, 0)],
        [("a", 10, 5)],
        [("c", 10, 0)],
    ]


def test_work_is_reported_chunk_by_chunk_and_token_by_token(model: LanguageModel) -> None:
    done: list[int] = []
    items = make_items(2)
    (batch, *_) = batches(items, 10**6)
    with duo_attention(model.model, PATTERN.binarize(sparsity=0.5)):
        Reader(model, 10**6, 25, done.append).read(batch, True)
    assert done[:3] == [2 * 25] * 3, "the chunks before the last"
    assert len(done) >= 3 + NEW_TOKENS
    assert work(batch, False) == 200
    assert work(batch, True) == 200 + GENERATED * 3 * (NEW_TOKENS + NEW_TOKENS + 1)
