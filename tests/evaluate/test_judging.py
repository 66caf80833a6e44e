"""Rows by hand: loss, KL, correct tokens, and scores of generated answers."""

import math
from dataclasses import replace

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.evaluate.answers import Answers, Written
from duo_id.evaluate.contenders import Contender
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.judging import compare_logits, compare_written, judge_generated, peer_rows, repeated, score_rows
from duo_id.models.loading import byte_tokenizer


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits with these probabilities."""
    return torch.tensor(rows).log()


def test_loss_kl_and_correct_tokens_by_hand() -> None:
    masked, full = logits((0.5, 0.25, 0.25), (0.25, 0.5, 0.25)), logits((0.25, 0.5, 0.25), (0.25, 0.5, 0.25))
    metrics = compare_logits(masked, full, [0, 2])
    assert metrics["loss"] == pytest.approx(math.log(2) + math.log(4))
    assert metrics["kl"] == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2)), "KL(full || masked)"
    assert (metrics["tokens"], metrics["correct"]) == (2, 1)
    itself = compare_logits(full, full, [1, 1])
    assert (itself["kl"], itself["correct"]) == (0, 2)


def test_long_answers_are_the_sum_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, full = torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0))
    answer = [i % 7 for i in range(10)]
    unblocked = compare_logits(masked, full, answer)
    monkeypatch.setattr("duo_id.evaluate.judging.BLOCK", 3)
    assert compare_logits(masked, full, answer) == pytest.approx(unblocked)


def test_generated_answers_are_cut_and_judged() -> None:
    tokenizer = byte_tokenizer()
    item = Item("t", 100, 0, (1,), (Question((1,), (1,), ("red", "blue")),), "all", 20)
    write = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    eos = tokenizer.eos_token_id
    assert judge_generated(item, 0, write(" red and blue"), tokenizer, {eos}) == {
        "score": 1, "exact": True, "text": " red and blue", "pieces": None,
    }  # fmt: skip
    assert judge_generated(item, 0, write(" red\nblue"), tokenizer, {eos})["score"] == 0.5, "the line ends the answer"
    long = replace(item, questions=(Question((1,), (1,), ("red", "blue", "green")),), metric="lines", stop=None)
    judged = judge_generated(long, 0, write("\nred\ngreen."), tokenizer, {eos})
    assert (judged["score"], judged["pieces"]) == (pytest.approx(2 / 3), "101")
    assert judge_generated(item, 0, [*write(" red"), eos, *write(" blue")], tokenizer, {eos})["exact"] is False
    assert judge_generated(item, 0, None, tokenizer, {eos}) == {
        "score": None, "exact": None, "text": None, "pieces": None,
    }  # fmt: skip


def test_rows_say_who_was_asked_what() -> None:
    questions = (Question((1,), (0,), ("a",), depth=0.5), Question((), (1,), place=3))
    item = Item("needle", 100, 7, (1,) * 9, questions, "exact", 5)
    answers = Answers([logits((0.5, 0.5)), logits((0.25, 0.75))], [byte_tokenizer()("a")["input_ids"][1:], None], 640)
    first, second = score_rows(
        Contender("baseline", "random", 0.25, 3), item, answers, answers, byte_tokenizer(), set()
    )
    assert {key: first[key] for key in ("task", "length", "index", "question", "depth")} == {
        "task": "needle", "length": 100, "index": 7, "question": 0, "depth": 0.5,
    }  # fmt: skip
    assert (first["kind"], first["heads"], first["sparsity"], first["seed"], first["bytes"]) == (
        "baseline",
        "random",
        0.25,
        3,
        640,
    )
    assert (first["score"], first["exact"], second["score"], second["text"]) == (1, True, None, None)
    assert second["loss"] == pytest.approx(-math.log(0.75))
    assert first.keys() == second.keys()
    broken = Answers([torch.full((1, 2), torch.nan)] * 2, [None, None], 640)
    with pytest.raises(UserError, match=r"needle at 100 tokens .* under full: .*model\.dtype=float32"):
        score_rows(Contender("full", "full", 0.0, None), item, broken, broken, byte_tokenizer(), set())


def test_texts_are_compared_token_by_token() -> None:
    """By hand: one more token than full attention, the third differs; two of five runs occurred before."""
    sure = lambda *tokens: torch.eye(6)[list(tokens)] * 9  # noqa: E731
    full = Written([1, 2, 3, 4], sure(1, 2, 3, 4))
    own = Written([1, 2, 5, 5, 5, 5, 5, 5], sure(1, 2, 5, 5, 5, 5, 5, 5))
    said = Answers([], [], written=own, along=sure(1, 2, 5, 4))
    found = compare_written(said, full, sure(1, 2, 3, 5, 5, 5, 5, 5))
    one = float((sure(3).log_softmax(-1).exp() * (sure(3).log_softmax(-1) - sure(5).log_softmax(-1))).sum())
    assert (found["agreed"], found["along_correct"], found["full_written"], found["written"]) == (2, 3, 4, 8)
    assert (found["along_kl"], found["own_kl"]) == pytest.approx((one, one))
    assert found["repeated"] == pytest.approx(2 / 5), "1255, 2555 and three of 5555"
    assert repeated([1, 2, 3]) == 0


def test_answers_of_peers_become_rows() -> None:
    questions = (Question((1,), (0,), ("a",), depth=0.5), Question((), (1,), place=3))
    item = Item("needle", 100, 7, (1,) * 8, questions, "exact", 5)
    shared = {"task": "needle", "length": 100, "index": 7, "kind": "eviction", "heads": "press", "sparsity": 0.5}
    shared |= {"cache": None}
    shared |= {"seed": None, "loss": 1.0, "kl": 0.5, "tokens": 1, "correct": 1, "note": "n", "full_bytes": 80}
    generated = byte_tokenizer()("a")["input_ids"][1:]
    answers = [shared | {"question": 0, "generated": generated, "bytes": 40}]
    answers += [shared | {"question": 1, "generated": None, "bytes": 10, "full_bytes": 20}]
    first, second = peer_rows(answers, [item], byte_tokenizer(), set())
    assert (first["depth"], first["score"], first["bytes"], first["sample"]) == (0.5, 1, 40, item.digest)
    assert (second["score"], second["bytes"]) == (None, 40), "half of what two of eight tokens take, as half of all"
    assert (first["total_bytes"], second["total_bytes"]) == (40 + 2 * 10, None), "question and answer are kept whole"
    full = score_rows(
        Contender("full", "full", 0.0),
        item,
        *[Answers([logits((1.0, 0.0))] * 2, [None] * 2)] * 2,
        byte_tokenizer(),
        set(),
    )
    assert first.keys() == full[0].keys()
