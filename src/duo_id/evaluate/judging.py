"""Turn a model's answers into rows: one per question and contender, with everything measured about the answer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError
from duo_id.evaluate.answers import Answers, Written
from duo_id.evaluate.batches import first_following
from duo_id.evaluate.contenders import Contender
from duo_id.evaluate.items import Item
from duo_id.evaluate.metrics import METRICS, first_answer, lines
from duo_id.report.rows import ASKED, ScoredRow

BLOCK = 4096  # rows of logits in float32 at a time
RUN = 4  # tokens in a row that count as repeated


def score_rows(
    contender: Contender,
    item: Item,
    answers: Answers,
    full: Answers,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    of_full: Tensor | None = None,
) -> list[ScoredRow]:
    """The rows of one item.

    Args:
        contender: that answered.
        item: the context and its questions.
        answers: of the contender.
        full: of full attention, the reference of KL.
        tokenizer: of the model.
        ends: tokens that end a text, see `duo_id.evaluate.stops`.
        of_full: logits of full attention along what the contender wrote, if it wrote anything.
    """
    rows = []
    written_after = first_following(item)
    for number, question in enumerate(item.questions):
        measured = compare_logits(answers.logits[number], full.logits[number], question.answer)
        if math.isnan(measured["loss"]):
            raise UserError(
                f"an answer to {item.task} at {item.length} tokens has a NaN loss under {contender.heads}: "
                "compute in model.dtype=float32, or check the model"
            )
        row = {"task": item.task, "length": item.length, "index": item.index, "sample": item.digest, "question": number}
        row |= {"turn": turn_of(item, number), "depth": question.depth} | contender_columns(contender) | measured
        row |= judge_generated(item, number, answers.generated[number], tokenizer, ends)
        row |= {"bytes": answers.bytes, "total_bytes": answers.total_bytes[number] if answers.total_bytes else None}
        if number == written_after and answers.written is not None and full.written is not None:
            row |= compare_written(answers, full.written, of_full)
        rows.append(row)
    return rows


def contender_columns(contender: Contender) -> ScoredRow:
    """A contender's identity, as columns."""
    return dict(zip(ASKED, contender.key, strict=True))


def turn_of(item: Item, number: int) -> int | None:
    """Which turn of a conversation question `number` is, from 1; None where each is asked alone."""
    return number + 1 if item.turns else None


def judge_generated(
    item: Item, number: int, generated: Sequence[int] | None, tokenizer: PreTrainedTokenizerBase, ends: set[int]
) -> ScoredRow:
    """Score, exactness, text and right pieces of a generated answer to question `number`; each None without one."""
    if generated is None:
        return {"score": None, "exact": None, "text": None, "pieces": None}
    end = next((index for index, token in enumerate(generated) if token in ends), len(generated))
    text = first_answer(str(tokenizer.decode(list(generated[:end]))), item.stop)
    references = item.questions[number].references
    score = METRICS[item.metric](text, references)
    pieces = "".join("01"[right] for right in lines(text, references)) if item.metric == "lines" else None
    return {"score": score, "exact": score == 1, "text": text, "pieces": pieces}


def compare_written(answers: Answers, full: Written, of_full: Tensor | None) -> ScoredRow:
    """What a contender wrote, against what full attention wrote after the same question.

    Args:
        answers: with what it wrote, and its logits along the text of full attention (none: it is full attention).
        full: the text of full attention.
        of_full: logits of full attention along the contender's text (none: it is full attention).
    """
    own = answers.written
    assert own is not None
    pairs = enumerate(zip(own.tokens, full.tokens, strict=False))
    along = compare_logits(full.logits if answers.along is None else answers.along, full.logits, full.tokens)
    drift = compare_logits(own.logits, own.logits if of_full is None else of_full, own.tokens)
    return {
        "full_written": len(full.tokens),
        "along_kl": along["kl"],
        "along_correct": along["correct"],
        "agreed": next((place for place, (a, b) in pairs if a != b), min(len(own.tokens), len(full.tokens))),
        "written": len(own.tokens),
        "own_kl": drift["kl"],
        "repeated": repeated(own.tokens),
    }


def repeated(tokens: Sequence[int]) -> float:
    """The share of a text's runs of `RUN` tokens that occurred before in it; 0 where it has none."""
    runs = [tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def peer_rows(
    answers: Sequence[ScoredRow], items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, ends: set[int]
) -> list[ScoredRow]:
    """Ordinary rows from what `duo_id.evaluate.peers.read_answers` returns.

    For an answer inside the context, a peer caches only the tokens before it; its bytes are scaled up to the whole
    context. What follows a context is kept by all heads, at the full cache's bytes a token.
    """
    following: dict[tuple[Any, ...], int] = {}  # tokens after a context, by contender; answers come in order
    items_by_key = {(item.task, item.length, item.index): item for item in items}
    rows = []
    for answer in answers:
        item_key = answer["task"], answer["length"], answer["index"]
        item = items_by_key[item_key]
        question = item.questions[answer["question"]]
        row = {key: value for key, value in answer.items() if key not in ("generated", "full_bytes", "note")}
        row |= {"sample": item.digest, "turn": turn_of(item, answer["question"]), "depth": question.depth}
        row["total_bytes"] = None
        if question.place is not None:
            row["bytes"] = round(row["bytes"] * len(item.context) / (question.place - 1))
        elif answer["generated"] is not None:
            said = len(question.prompt) + sum(token not in ends for token in answer["generated"])
            key = (*item_key, *(answer[column] for column in ASKED))
            following[key] = said + (following.get(key, 0) if item.turns else 0)
            row["total_bytes"] = row["bytes"] + round(answer["full_bytes"] * following[key] / len(item.context))
        rows.append(row | judge_generated(item, answer["question"], answer["generated"], tokenizer, ends))
    return rows


@torch.no_grad()
def compare_logits(logits: Tensor, full: Tensor, answer: Sequence[int]) -> ScoredRow:
    """Loss, KL from full attention and correct tokens of one answer.

    Args:
        logits: (answer tokens, vocabulary), of the contender.
        full: the same shape, of full attention.
        answer: its tokens.
    """
    targets = torch.tensor(answer, device=logits.device)
    loss = kl = 0.0
    for start in range(0, len(targets), BLOCK):
        block = slice(start, start + BLOCK)
        log_probs, full_log_probs = (F.log_softmax(x[block].float(), -1) for x in (logits, full))
        loss += float(F.nll_loss(log_probs, targets[block], reduction="sum"))
        if logits is not full:
            kl += float(F.kl_div(log_probs, full_log_probs, reduction="sum", log_target=True))
    correct = int((logits.argmax(-1) == targets).sum())
    return {"loss": loss, "kl": max(kl, 0.0), "tokens": len(targets), "correct": correct}
