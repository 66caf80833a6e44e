"""Conversations: the questions of a context asked one after another, with the model's own answers left in the cache."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from duo_id.deploy.cache import DualCache
from duo_id.deploy.graphs import DecodeSteps
from duo_id.evaluate.batches import GENERATED
from duo_id.evaluate.items import Item
from duo_id.evaluate.stops import Stops


@dataclass(frozen=True)
class Turn:
    """One question of a conversation, answered.

    Attributes:
        logits: (answer tokens, vocabulary) of the right answer in place of the model's own, which is what stays.
        said: what the model answered, greedily, with the token that ends it, if it ended.
        end: tokens of the context and the conversation up to there. All of the answer stays but an end of text, which
            the chat template brings along with the next message.
    """

    logits: Tensor
    said: list[int]
    end: int


class Forward(Protocol):
    """What a conversation needs of `duo_id.evaluate.reading.Reader`."""

    stops: Stops

    def on_work(self, tokens: int, /) -> None:
        """Report work that is done."""

    def decode(self, cache: DualCache, rows: Sequence[int], past: int, steps: int) -> DecodeSteps:
        """Decode steps with a copy of some rows of a cache."""

    def forward_following(self, ids: Tensor, cache: DualCache, keep: Tensor, past: int) -> Tensor:
        """The same for several tokens after a context."""


@dataclass
class _Conversation:
    """One item's conversation, token by token: a question's tokens are given, an answer's chosen by the model."""

    item: Item
    given: deque[int]  # tokens of the question that are still to be read
    said: list[int] = field(default_factory=list)  # of the answer, so far
    begun: bool = False  # whether the answer has text
    ended: bool = False
    turns: list[Turn] = field(default_factory=list)
    right: Tensor | None = None  # logits of the right answer

    @property
    def over(self) -> bool:
        return len(self.turns) == len(self.item.questions)

    @property
    def answers_now(self) -> bool:
        """Whether the question has just been read."""
        return not self.over and not self.given and self.right is None

    def next_token(self, chosen: int, blank: bool, stops: bool, read: int, ends: Collection[int]) -> int:
        """The token that follows `read` tokens, given the model's choice; any one once the conversation is over."""
        if not self.given and not self.over:
            if not self.ended and len(self.said) < self.item.max_new_tokens:
                self.said.append(chosen)
                self.begun |= not blank
                self.ended = self.begun and stops
                if chosen not in ends:
                    return chosen
            assert self.right is not None
            self.turns.append(Turn(self.right, self.said, read))
            self.said, self.begun, self.ended, self.right = [], False, False, None
            if not self.over:
                self.given = deque(self.item.questions[len(self.turns)].prompt)
        return self.given.popleft() if self.given else 0


@torch.no_grad()
def converse(
    reader: Forward, cache: DualCache, items: Sequence[Item], rows: Sequence[int], past: int
) -> list[list[Turn]]:
    """Ask all questions of some items of a batch, one after another, through a copy of their contexts' cache.

    Once a question has been read, its right answer is scored on a fork of the cache, as it would follow the
    conversation so far; then the model's own greedy answer follows, and stays. All conversations advance by one token
    at a time, so that they need no padding.

    Args:
        reader: of the contexts.
        cache: with the contexts of the whole batch.
        items: of the batch.
        rows: of the batch, with the items to talk about.
        past: tokens of a context.

    Returns:
        the turns of each row.
    """
    talks = [_Conversation(items[row], deque(items[row].questions[0].prompt)) for row in rows]
    blank, stopping = reader.stops.blank, reader.stops.at([items[row].stop for row in rows])
    shortest, every = min(len(talk.given) for talk in talks), torch.arange(len(rows), device=blank.device)
    first = [[talk.given.popleft() for _ in range(shortest)] for talk in talks]
    ids, read = torch.tensor(first, device=blank.device), past + shortest
    decode = reader.decode(cache, rows, read, max(_longest(items[row]) for row in rows) - shortest)
    cache = decode.cache
    logits = reader.forward_following(ids, cache, torch.tensor([shortest - 1], device=blank.device), past)[:, -1]
    while True:
        _score_right_answers(reader, cache, talks, logits, read)
        chosen = logits.argmax(-1)
        choices = torch.stack([chosen, blank[chosen], stopping[every, chosen]], 1).tolist()
        following = [
            talk.next_token(token, bool(is_blank), bool(stops), read, reader.stops.ends)
            for talk, (token, is_blank, stops) in zip(talks, choices, strict=True)
        ]
        if all(talk.over for talk in talks):
            return [talk.turns for talk in talks]
        reader.on_work(GENERATED * len(rows))
        logits = decode(torch.tensor(following, device=blank.device)[:, None], read)
        read += 1


def _longest(item: Item) -> int:
    """Tokens of an item's conversation at most."""
    return sum(len(question.prompt) + item.max_new_tokens for question in item.questions)


def _score_right_answers(
    reader: Forward, cache: DualCache, talks: Sequence[_Conversation], logits: Tensor, past: int
) -> None:
    """Logits of right answers where a question has just been read; padding comes last and changes nothing.

    Args:
        reader: of the contexts.
        cache: of the conversations, left as it is.
        talks: the conversations.
        logits: (conversations, vocabulary) of the next token.
        past: tokens that were read.
    """
    asked = [row for row, talk in enumerate(talks) if talk.answers_now]
    answers = [list(talks[row].item.questions[len(talks[row].turns)].answer) for row in asked]
    following = max(map(len, answers), default=0) - 1
    if following > 0:
        padded = [answer[:-1] + [0] * (following + 1 - len(answer)) for answer in answers]
        ids = torch.tensor(padded, device=logits.device)
        positions = torch.arange(following, device=logits.device)
        rest = reader.forward_following(ids, cache.fork(torch.tensor(asked)), positions, past)
    for number, (row, answer) in enumerate(zip(asked, answers, strict=True)):
        first = logits[row][None]
        talks[row].right = first if len(answer) == 1 else torch.cat([first, rest[number, : len(answer) - 1]])
