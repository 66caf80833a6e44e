"""Reads contexts under a mask and answers their questions, all through the dual cache, as a deployed model would.

A context is read once, in chunks, under the mask from its first token on; its questions go on from copies of the cache.
A model that loses its state between chunks reads the context in one forward, and what follows it token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duo_id.common.compat import cache_argument
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation, continuation
from duo_id.deploy.install import dual_cache
from duo_id.evaluate.items import Item, Question
from duo_id.models.language_model import LanguageModel

CHECK_EVERY = 8  # decode steps between two looks at whether all answers have ended, each of which waits for the device


@dataclass
class Answers:
    """What a model makes of one item.

    Attributes:
        logits: one (answer tokens, vocabulary) a question, teacher-forced, in the model's dtype.
        generated: the tokens of its own answer to each question, or None where none was asked for.
        bytes: of keys and values that the cache keeps of the context.
    """

    logits: list[Tensor]
    generated: list[list[int] | None]
    bytes: int = 0


@dataclass
class Reader:
    """Answers items with a model that is under `duo_attention`.

    Args:
        model: the language model.
        batch_tokens: tokens of all contexts, or copies of contexts, that are held at the same time.
        chunk_size: tokens of a forward, where the model can go on after a chunk.
    """

    model: LanguageModel
    batch_tokens: int
    chunk_size: int
    _endings: dict[str | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _how: Continuation = field(default_factory=Continuation)

    @torch.no_grad()
    def read(self, items: Sequence[Item], generate: bool) -> list[Answers]:
        """Answer all questions of items whose contexts have the same number of tokens.

        Args:
            items: a batch, see `batches`.
            generate: also let the model answer by itself, greedily.

        Raises:
            UserError: no way to go on after a context gives the model's own logits.
        """
        device = self.model.model.device
        context = torch.tensor([item.context for item in items], device=device)
        self._how = continuation(self.model.model, context)
        cache = dual_cache(self.model.model)
        inside = self._read_context(context, cache, items)
        size, past = cache.retained_bytes, context.shape[1]
        answers = [
            Answers([torch.empty(0)] * len(item.questions), [None] * len(item.questions), size) for item in items
        ]
        for (row, number), logits in inside.items():
            answers[row].logits[number] = logits
        asked = [
            (row, number)
            for row, item in enumerate(items)
            for number, question in enumerate(item.questions)
            if question.place is None
        ]
        for part in self._parts(asked, items):
            copies = torch.tensor([row for row, _ in part])
            questions = [items[row].questions[number] for row, number in part]
            for (row, number), logits in zip(part, self._force(cache.fork(copies), questions, past), strict=True):
                answers[row].logits[number] = logits
        writing = [pair for pair in asked if generate and items[pair[0]].max_new_tokens]
        for part in self._parts(writing, items):
            copies = torch.tensor([row for row, _ in part])
            written = self._decode(cache.fork(copies), [(items[row], number) for row, number in part], past)
            for (row, number), tokens in zip(part, written, strict=True):
                answers[row].generated[number] = tokens
        return answers

    def _parts(self, asked: list[tuple[int, int]], items: Sequence[Item]) -> list[list[tuple[int, int]]]:
        """The questions in groups whose copies of the cache fit, those of like length together."""
        asked = sorted(asked, key=lambda pair: len(items[pair[0]].questions[pair[1]].prompt))
        rows = max(1, self.batch_tokens // items[0].length)
        return [asked[start : start + rows] for start in range(0, len(asked), rows)]

    def _read_context(self, context: Tensor, cache: DualCache, items: Sequence[Item]) -> dict[tuple[int, int], Tensor]:
        """Read contexts (batch, tokens) into the cache; the logits of the questions whose answers stand in them."""
        inside = {
            (row, number): question
            for row, item in enumerate(items)
            for number, question in enumerate(item.questions)
            if question.place is not None
        }
        wanted = sorted({(place, row) for (row, _), question in inside.items() for place in _places(question)})
        found = []
        chunk_size = context.shape[1] if self._how.stepwise else self.chunk_size
        for start in range(0, context.shape[1], chunk_size):
            end = min(start + chunk_size, context.shape[1])
            part = context[:, start:end]
            here = [row * (end - start) + place - start for place, row in wanted if start <= place < end]
            if not here:
                self._forward(part, cache, torch.tensor([end - start - 1], device=context.device), start)
                continue
            with self.model.head_at(part, torch.tensor(here, device=context.device)) as pick:
                found.append(pick(self._forward(part, cache, None, start)))
        if not wanted:
            return {}
        logits, order = torch.cat(found), {pair: i for i, pair in enumerate(wanted)}
        return {
            (row, number): logits[[order[place, row] for place in _places(question)]]
            for (row, number), question in inside.items()
        }

    def _force(self, cache: DualCache, questions: Sequence[Question], past: int) -> list[Tensor]:
        """Logits of the right answers, read at once after `past` tokens; padding comes after and changes nothing."""
        rows = [[*question.prompt, *question.answer[:-1]] for question in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.model.device)
        first = min(len(question.prompt) for question in questions) - 1
        keep = torch.arange(first, longest, device=ids.device)
        logits = self._follow(ids, cache, keep, past)
        begins = [len(question.prompt) - 1 - first for question in questions]
        return [
            logits[row, begin : begin + len(question.answer)]
            for row, (begin, question) in enumerate(zip(begins, questions, strict=True))
        ]

    def _decode(self, cache: DualCache, asked: Sequence[tuple[Item, int]], past: int) -> list[list[int]]:
        """Greedy answers: the beginning of all prompts at once, as long as the shortest, then token by token.

        A question that is still being read takes its own next token in place of the one that the model would choose, so
        questions of different lengths need no padding.
        """
        device = self.model.model.device
        prompts = [item.questions[number].prompt for item, number in asked]
        limits = [item.max_new_tokens for item, _ in asked]
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        given = torch.tensor([[*prompt] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        starts = torch.tensor([len(prompt) - shortest for prompt in prompts], device=device)
        ends = starts + torch.tensor(limits, device=device)
        blank, stops = self._token_kinds([item.stop for item, _ in asked])
        rows = torch.arange(len(asked), device=device)
        written: list[Tensor] = []
        begun = torch.zeros(len(asked), dtype=torch.bool, device=device)
        ended = torch.zeros_like(begun)
        logits = self._follow(given[:, :shortest], cache, torch.tensor([shortest - 1], device=device), past)[:, -1]
        for step in range(int(ends.max())):
            reading = starts > step
            token = torch.where(reading, given[:, min(shortest + step, longest - 1)], logits.argmax(-1))
            written.append(token)
            begun |= ~reading & ~blank[token]
            ended |= (~reading & begun & stops[rows, token]) | (ends == step + 1)
            if step % CHECK_EVERY == CHECK_EVERY - 1 and bool(ended.all()):
                break
            logits = self._forward(token[:, None], cache, None, past + shortest + step)[:, -1]
        tokens = torch.stack(written, 1).tolist()
        return [row[start:end] for row, start, end in zip(tokens, starts.tolist(), ends.tolist(), strict=True)]

    def _follow(self, ids: Tensor, cache: DualCache, keep: Tensor, past: int) -> Tensor:
        """As `_forward`, of what follows a context, token by token where the model needs that."""
        if not self._how.stepwise:
            return self._forward(ids, cache, keep, past)
        wanted, found = set(keep.tolist()), []
        for place, token in enumerate(ids.split(1, 1)):
            logits = self._forward(token, cache, None, past + place)
            if place in wanted:
                found.append(logits)
        return torch.cat(found, 1)

    def _forward(self, ids: Tensor, cache: DualCache, keep: Tensor | None, past: int) -> Tensor:
        """Logits at the positions `keep` (n,) of `ids` (batch, tokens), all if None: (batch, n, vocabulary).

        `past` tokens are in the cache.
        """
        options = {} if keep is None or not self.model.keeps_logits else {"logits_to_keep": keep}
        given = {cache_argument(self.model.model): cache} | self._how.options(ids, past)
        logits = self.model.model(ids, use_cache=True, **given, **options).logits
        return logits if options or keep is None else logits[:, keep]

    def _token_kinds(self, stops: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Which tokens are blank, (vocabulary,), and which end an answer under each stop, (stops, vocabulary)."""
        for stop in {*stops} - self._endings.keys():
            self._endings[stop] = self._stop_tokens(stop)
        blank = self._endings[stops[0]][0]
        return blank, torch.stack([self._endings[stop][1] for stop in stops])

    def _stop_tokens(self, stop: str | None) -> tuple[Tensor, Tensor]:
        tokenizer, device = self.model.tokenizer, self.model.model.device
        ends = end_tokens(self.model)
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        texts += [""] * (self.model.model.config.get_text_config().vocab_size - len(texts))  # some embeddings are spare
        blank = [not text.strip() and token not in ends for token, text in enumerate(texts)]
        stopping = [token in ends or (stop is not None and stop in text) for token, text in enumerate(texts)]
        return torch.tensor(blank, device=device), torch.tensor(stopping, device=device)


def end_tokens(model: LanguageModel) -> set[int]:
    """The tokens with which the model ends a text."""
    generation = getattr(model.model, "generation_config", None)
    found = [model.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    return {token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


def batches(items: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """The items in groups that are read together, whatever their task: at most `batch_tokens` tokens, or one item.

    Contexts have the same number of tokens. Those with answers inside are kept apart: they need more logits.
    """
    groups: dict[tuple[int, int, bool], list[Item]] = {}
    for item in items:
        inside = any(question.place is not None for question in item.questions)
        groups.setdefault((item.length, len(item.context), inside), []).append(item)
    found = []
    for (length, _, _), group in groups.items():
        size = max(1, batch_tokens // length)
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found


def _places(question: Question) -> range:
    """The positions whose logits predict the tokens of an answer that stands in the context."""
    assert question.place is not None
    return range(question.place - 1, question.place - 1 + len(question.answer))
