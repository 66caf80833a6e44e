"""Read contexts under a mask and answer their questions, all through the dual cache, as a deployed model would.

A context is read once, in chunks, with the mask applied from its first token; each question, or the conversation of
all, starts from a copy of the cache. A model that loses its state between chunks reads the context in one forward pass
and the rest token by token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duo_id.common.compat import cache_argument
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation, continuation
from duo_id.deploy.eviction import Eviction, evicting
from duo_id.deploy.graphs import DecodeSteps, can_capture
from duo_id.deploy.install import dual_cache
from duo_id.evaluate.answers import Answers, Written
from duo_id.evaluate.batches import GENERATED, first_following
from duo_id.evaluate.conversing import converse
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.stops import Stops
from duo_id.models.language_model import LanguageModel

# Tokens of a chunk with answers inside, at most, where the cache keeps codes: a chunk sees none of its own.
CODED_CHUNK = 512
Pair = tuple[int, int]  # the row of a batch, and the number of a question
CAPTURED_FROM = 16  # decode steps from which a graph of them is worth its capture, which takes three
CHECK_EVERY = 8  # decode steps between checks whether all answers have ended, each of which synchronises the device


@dataclass
class Reader:
    """Answers items with a model under `duo_attention`.

    Args:
        model: the language model.
        batch_tokens: tokens of all contexts, or copies of contexts, in memory at once.
        chunk_size: tokens per forward pass, where the model can continue after a chunk.
        on_work: called as a batch is read, with what was done since the last call, see `work`.
    """

    model: LanguageModel
    batch_tokens: int
    chunk_size: int
    on_work: Callable[[int], None] = lambda tokens: None
    kept: tuple[Sequence[Item], DualCache] | None = None  # the last batch, if it was to be kept
    stops: Stops = field(init=False)
    _continuation: Continuation = field(default_factory=Continuation)

    def __post_init__(self) -> None:
        """Find out where the model's answers end."""
        self.stops = Stops(self.model)

    @torch.no_grad()
    def read(
        self,
        items: Sequence[Item],
        generate: bool,
        write: int = 0,
        texts: Mapping[Item, Sequence[int]] | None = None,
        keep: bool = False,
        evict: Eviction | None = None,
    ) -> list[Answers]:
        """Answer all questions of items whose contexts have the same number of tokens.

        Args:
            items: a batch, see `batches`.
            generate: also generate answers, greedily.
            write: tokens at most, to write freely after the first question that follows a context.
            texts: to follow after the same question, one for each item that has one.
            keep: the cache of the batch, for `follow`.
            evict: what retrieval heads keep once the context is read, which then has no answers inside.

        Raises:
            UserError: no way of continuing after a context reproduces the model's own logits.
        """
        device = self.model.model.device
        context = torch.tensor([item.context for item in items], device=device)
        self._continuation = continuation(self.model.model, context)
        cache = dual_cache(self.model.model)
        with evicting(self.model.model, cache, evict, context):
            in_context_logits = self._read_context(context, cache, items)
        size, past = cache.retained_bytes, context.shape[1]
        answers = [_no_answers(len(item.questions), size) for item in items]
        for (row, number), logits in in_context_logits.items():
            answers[row].logits[number] = logits
        following = [
            (row, number)
            for row, item in enumerate(items)
            for number, question in enumerate(item.questions)
            if question.place is None and not item.turns
        ]
        right = {(row, number): items[row].questions[number].answer for row, number in following}
        for (row, number), logits in self._logits_along(cache, items, right, past).items():
            answers[row].logits[number] = logits
        to_generate = [pair for pair in following if generate and items[pair[0]].max_new_tokens]
        for group in self._groups(to_generate, items):
            limits = [items[row].max_new_tokens for row, _ in group]
            texts_of_group, _ = self._generate(cache, items, group, limits, [items[row].stop for row, _ in group], past)
            for (row, number), tokens in zip(group, texts_of_group, strict=True):
                answers[row].generated[number] = tokens
                end = past + len(items[row].questions[number].prompt) + len(tokens)
                answers[row].total_bytes[number] = cache.bytes_of(end)
        for group in self._groups([(row, 0) for row, item in enumerate(items) if item.turns], items):
            rows = [row for row, _ in group]
            talks = converse(self, cache, items, rows, past)
            for row, turns in zip(rows, talks, strict=True):
                for number, turn in enumerate(turns):
                    answers[row].logits[number], answers[row].generated[number] = turn.logits, turn.said
                    answers[row].total_bytes[number] = cache.bytes_of(turn.end)
        if write:
            self._write(cache, items, answers, write, past)
        if texts:
            for row, logits in self._along(cache, items, {items.index(item): texts[item] for item in texts}, past):
                answers[row].along = logits
        if keep:
            self.kept = items, cache
        return answers

    @torch.no_grad()
    def follow(self, texts: Mapping[Item, Sequence[int]]) -> dict[Item, Tensor]:
        """Logits (tokens, vocabulary) along texts after items of the kept batch, under the mask that it was read with.

        Args:
            texts: by item, after the first question that follows its context.
        """
        assert self.kept is not None
        items, cache = self.kept
        rows = {items.index(item): text for item, text in texts.items()}
        return {items[row]: logits for row, logits in self._along(cache, items, rows, len(items[0].context))}

    def _along(
        self, cache: DualCache, items: Sequence[Item], texts: Mapping[int, Sequence[int]], past: int
    ) -> list[tuple[int, Tensor]]:
        """Logits along texts by row of the batch."""
        after = {row: first_following(items[row]) for row in texts}
        pairs = {(row, number): texts[row] for row, number in after.items() if number is not None}
        return [(row, logits) for (row, _), logits in self._logits_along(cache, items, pairs, past).items()]

    def _write(
        self, cache: DualCache, items: Sequence[Item], answers: Sequence[Answers], limit: int, past: int
    ) -> None:
        """Let the model write after the first question that follows each context."""
        pairs = [(row, number) for row, item in enumerate(items) if (number := first_following(item)) is not None]
        for group in self._groups(pairs, items):
            limits, stops = [limit] * len(group), [None] * len(group)
            written, logits = self._generate(cache, items, group, limits, stops, past, keep_logits=True)
            for (row, _), tokens, chosen_from in zip(group, written, logits, strict=True):
                answers[row].written = Written(tokens, chosen_from)

    def _logits_along(
        self, cache: DualCache, items: Sequence[Item], texts: Mapping[Pair, Sequence[int]], past: int
    ) -> dict[Pair, Tensor]:
        """Teacher-forced logits of texts after questions, by row of the batch and number of the question."""
        found: dict[Pair, Tensor] = {}
        for group in self._groups(list(texts), items):
            copies = torch.tensor([row for row, _ in group])
            questions = [(items[row].questions[number].prompt, texts[row, number]) for row, number in group]
            found |= zip(group, self._answer_logits(cache.fork(copies), questions, past), strict=True)
        return found

    def _groups(self, pairs: list[Pair], items: Sequence[Item]) -> list[list[Pair]]:
        """The questions in groups whose copies of the cache fit in memory, those of similar length together."""
        pairs = sorted(pairs, key=lambda pair: len(items[pair[0]].questions[pair[1]].prompt))
        rows = max(1, self.batch_tokens // items[0].length)
        return [pairs[start : start + rows] for start in range(0, len(pairs), rows)]

    def _read_context(self, context: Tensor, cache: DualCache, items: Sequence[Item]) -> dict[tuple[int, int], Tensor]:
        """Read contexts (batch, tokens) into the cache; returns the logits of answers inside them.

        The keys are row and question number.
        """
        in_context = {
            (row, number): question
            for row, item in enumerate(items)
            for number, question in enumerate(item.questions)
            if question.place is not None
        }
        predictors = {(row, number): _predicting_positions(question) for (row, number), question in in_context.items()}
        wanted = sorted({(position, row) for (row, _), positions in predictors.items() for position in positions})
        chunk_logits = []
        chunk_size = context.shape[1] if self._continuation.stepwise else self.chunk_size
        if in_context and cache.coded:
            chunk_size = min(chunk_size, CODED_CHUNK)
        for start in range(0, context.shape[1], chunk_size):
            end = min(start + chunk_size, context.shape[1])
            chunk = context[:, start:end]
            if start:
                self.on_work(len(context) * chunk_size)  # the previous one
            flat = [row * (end - start) + position - start for position, row in wanted if start <= position < end]
            if not flat:
                self.forward(chunk, cache, torch.tensor([end - start - 1], device=context.device), start)
                continue
            with self.model.head_at(chunk, torch.tensor(flat, device=context.device)) as pick:
                chunk_logits.append(pick(self.forward(chunk, cache, None, start)))
        if not wanted:
            return {}
        logits, row_of_logits = torch.cat(chunk_logits), {pair: i for i, pair in enumerate(wanted)}
        return {
            (row, number): logits[[row_of_logits[position, row] for position in positions]]
            for (row, number), positions in predictors.items()
        }

    def _answer_logits(
        self, cache: DualCache, questions: Sequence[tuple[Sequence[int], Sequence[int]]], past: int
    ) -> list[Tensor]:
        """Teacher-forced logits of answers to prompts after `past` tokens; padding comes last and changes nothing."""
        rows = [[*prompt, *answer[:-1]] for prompt, answer in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.model.device)
        first = min(len(prompt) for prompt, _ in questions) - 1
        keep = torch.arange(first, longest, device=ids.device)
        logits = self.forward_following(ids, cache, keep, past)
        answer_starts = [len(prompt) - 1 - first for prompt, _ in questions]
        return [
            logits[row, answer_start : answer_start + len(answer)]
            for row, (answer_start, (_, answer)) in enumerate(zip(answer_starts, questions, strict=True))
        ]

    def _generate(
        self,
        cache: DualCache,
        items: Sequence[Item],
        group: Sequence[Pair],
        limits: Sequence[int],
        stops: Sequence[str | None],
        past: int,
        keep_logits: bool = False,
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy answers: all prompts up to the length of the shortest at once, then token by token.

        A question that is still being read takes its own next token instead of the model's choice, so questions of
        different lengths need no padding.

        Returns:
            tokens, with the one that ends the answer, and the logits (tokens, vocabulary) from which they were chosen
            if `keep_logits`.
        """
        device = self.model.model.device
        prompts = [items[row].questions[number].prompt for row, number in group]
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        prompt_ids = torch.tensor([[*prompt] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        starts = torch.tensor([len(prompt) - shortest for prompt in prompts], device=device)
        ends = starts + torch.tensor(limits, device=device)
        steps = max(len(prompt) - shortest + limit for prompt, limit in zip(prompts, limits, strict=True))
        decode = self.decode(cache, [row for row, _ in group], past + shortest, steps)
        blank, stopping = self.stops.blank, self.stops.at(stops)
        rows = torch.arange(len(group), device=device)
        chosen: list[Tensor] = []
        chosen_from: list[Tensor] = []
        begun = torch.zeros(len(group), dtype=torch.bool, device=device)
        ended, lengths = torch.zeros_like(begun), torch.zeros_like(starts)
        last = torch.tensor([shortest - 1], device=device)
        logits = self.forward_following(prompt_ids[:, :shortest], decode.cache, last, past)[:, -1]
        for step in range(steps):
            self.on_work(GENERATED * len(group))
            reading = starts > step
            token = torch.where(reading, prompt_ids[:, min(shortest + step, longest - 1)], logits.argmax(-1))
            chosen.append(token)
            if keep_logits:
                chosen_from.append(logits)
            lengths += ~reading & ~ended
            begun |= ~reading & ~blank[token]
            ended |= (~reading & begun & stopping[rows, token]) | (ends == step + 1)
            if step % CHECK_EVERY == CHECK_EVERY - 1 and bool(ended.all()):
                break
            logits = decode(token[:, None], past + shortest + step)
        places = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
        tokens = torch.stack(chosen, 1).tolist()
        texts = [row[start:end] for row, (start, end) in zip(tokens, places, strict=True)]
        if not keep_logits:
            return texts, []
        return texts, [row[start:end] for row, (start, end) in zip(torch.stack(chosen_from, 1), places, strict=True)]

    def decode(self, cache: DualCache, rows: Sequence[int], past: int, steps: int) -> DecodeSteps:
        """Decode steps, `steps` at most, with a copy of some rows of a cache, which is to hold `past` tokens first."""
        captured = steps >= CAPTURED_FROM and can_capture(self.model.model, cache, self._continuation)
        copied = cache.fork(torch.tensor(rows), past + steps if captured else None)
        return DecodeSteps(self.model.model, copied, self._continuation)

    def forward_following(self, ids: Tensor, cache: DualCache, keep: Tensor, past: int) -> Tensor:
        """As `forward` for tokens after a context, one at a time where the model needs that."""
        if not self._continuation.stepwise:
            return self.forward(ids, cache, keep, past)
        kept_positions, kept_logits = set(keep.tolist()), []
        for offset, token in enumerate(ids.split(1, 1)):
            logits = self.forward(token, cache, None, past + offset)
            if offset in kept_positions:
                kept_logits.append(logits)
        return torch.cat(kept_logits, 1)

    def forward(self, ids: Tensor, cache: DualCache, keep: Tensor | None, past: int) -> Tensor:
        """Logits at the positions `keep` (n,) of `ids` (batch, tokens), all if None: (batch, n, vocabulary).

        `past`: tokens already in the cache.
        """
        options = {} if keep is None or not self.model.keeps_logits else {"logits_to_keep": keep}
        cache_arguments = {cache_argument(self.model.model): cache} | self._continuation.options(ids, past)
        logits = self.model.model(ids, use_cache=True, **cache_arguments, **options).logits
        return logits if options or keep is None else logits[:, keep]


def _no_answers(questions: int, size: int) -> Answers:
    """To so many questions, of a context of `size` bytes."""
    return Answers([torch.empty(0)] * questions, [None] * questions, size, [None] * questions)


def _predicting_positions(question: Question) -> range:
    """The positions whose logits predict the tokens of an answer inside the context."""
    assert question.place is not None
    return range(question.place - 1, question.place - 1 + len(question.answer))
