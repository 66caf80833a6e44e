"""Read contexts under a mask and answer their questions, all through the dual cache, as a deployed model would.

A context is read once, in chunks, with the mask applied from its first token; each question starts from a copy of the
cache. A model that loses its state between chunks reads the context in one forward pass and the rest token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duo_id.common.compat import cache_argument
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation, continuation
from duo_id.deploy.install import dual_cache
from duo_id.evaluate.items import Item, Question
from duo_id.models.language_model import LanguageModel

GENERATED = 32  # tokens of a context that take as long as one that is generated
# Tokens of a chunk with answers inside, at most, where the cache keeps codes: a chunk sees none of its own.
CODED_CHUNK = 512
CHECK_EVERY = 8  # decode steps between checks whether all answers have ended, each of which synchronises the device


@dataclass
class Answers:
    """A model's answers to one item.

    Attributes:
        logits: one tensor (answer tokens, vocabulary) per question, teacher-forced, in the model's dtype.
        generated: the tokens it generated for each question, or None where nothing was generated.
        bytes: of the context's keys and values in the cache.
    """

    logits: list[Tensor]
    generated: list[list[int] | None]
    bytes: int = 0


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
    _stop_masks: dict[str | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _continuation: Continuation = field(default_factory=Continuation)

    @torch.no_grad()
    def read(self, items: Sequence[Item], generate: bool) -> list[Answers]:
        """Answer all questions of items whose contexts have the same number of tokens.

        Args:
            items: a batch, see `batches`.
            generate: also generate answers, greedily.

        Raises:
            UserError: no way of continuing after a context reproduces the model's own logits.
        """
        device = self.model.model.device
        context = torch.tensor([item.context for item in items], device=device)
        self._continuation = continuation(self.model.model, context)
        cache = dual_cache(self.model.model)
        in_context_logits = self._read_context(context, cache, items)
        size, past = cache.retained_bytes, context.shape[1]
        answers = [
            Answers([torch.empty(0)] * len(item.questions), [None] * len(item.questions), size) for item in items
        ]
        for (row, number), logits in in_context_logits.items():
            answers[row].logits[number] = logits
        following = [
            (row, number)
            for row, item in enumerate(items)
            for number, question in enumerate(item.questions)
            if question.place is None
        ]
        for group in self._groups(following, items):
            copies = torch.tensor([row for row, _ in group])
            questions = [items[row].questions[number] for row, number in group]
            answer_logits = self._answer_logits(cache.fork(copies), questions, past)
            for (row, number), logits in zip(group, answer_logits, strict=True):
                answers[row].logits[number] = logits
        to_generate = [pair for pair in following if generate and items[pair[0]].max_new_tokens]
        for group in self._groups(to_generate, items):
            copies = torch.tensor([row for row, _ in group])
            generated = self._generate(cache.fork(copies), [(items[row], number) for row, number in group], past)
            for (row, number), tokens in zip(group, generated, strict=True):
                answers[row].generated[number] = tokens
        return answers

    def _groups(self, pairs: list[tuple[int, int]], items: Sequence[Item]) -> list[list[tuple[int, int]]]:
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
                self._forward(chunk, cache, torch.tensor([end - start - 1], device=context.device), start)
                continue
            with self.model.head_at(chunk, torch.tensor(flat, device=context.device)) as pick:
                chunk_logits.append(pick(self._forward(chunk, cache, None, start)))
        if not wanted:
            return {}
        logits, row_of_logits = torch.cat(chunk_logits), {pair: i for i, pair in enumerate(wanted)}
        return {
            (row, number): logits[[row_of_logits[position, row] for position in positions]]
            for (row, number), positions in predictors.items()
        }

    def _answer_logits(self, cache: DualCache, questions: Sequence[Question], past: int) -> list[Tensor]:
        """Teacher-forced logits of the right answers after `past` tokens; padding comes last and changes nothing."""
        rows = [[*question.prompt, *question.answer[:-1]] for question in questions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.model.device)
        first = min(len(question.prompt) for question in questions) - 1
        keep = torch.arange(first, longest, device=ids.device)
        logits = self._forward_following(ids, cache, keep, past)
        answer_starts = [len(question.prompt) - 1 - first for question in questions]
        return [
            logits[row, answer_start : answer_start + len(question.answer)]
            for row, (answer_start, question) in enumerate(zip(answer_starts, questions, strict=True))
        ]

    def _generate(self, cache: DualCache, questions: Sequence[tuple[Item, int]], past: int) -> list[list[int]]:
        """Greedy answers: all prompts up to the length of the shortest at once, then token by token.

        A question that is still being read takes its own next token instead of the model's choice, so questions of
        different lengths need no padding.
        """
        device = self.model.model.device
        prompts = [item.questions[number].prompt for item, number in questions]
        limits = [item.max_new_tokens for item, _ in questions]
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        prompt_ids = torch.tensor([[*prompt] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        starts = torch.tensor([len(prompt) - shortest for prompt in prompts], device=device)
        ends = starts + torch.tensor(limits, device=device)
        blank, stops = self._blank_and_stop_tokens([item.stop for item, _ in questions])
        rows = torch.arange(len(questions), device=device)
        chosen: list[Tensor] = []
        begun = torch.zeros(len(questions), dtype=torch.bool, device=device)
        ended = torch.zeros_like(begun)
        last = torch.tensor([shortest - 1], device=device)
        logits = self._forward_following(prompt_ids[:, :shortest], cache, last, past)[:, -1]
        for step in range(int(ends.max())):
            self.on_work(GENERATED * len(questions))
            reading = starts > step
            token = torch.where(reading, prompt_ids[:, min(shortest + step, longest - 1)], logits.argmax(-1))
            chosen.append(token)
            begun |= ~reading & ~blank[token]
            ended |= (~reading & begun & stops[rows, token]) | (ends == step + 1)
            if step % CHECK_EVERY == CHECK_EVERY - 1 and bool(ended.all()):
                break
            logits = self._forward(token[:, None], cache, None, past + shortest + step)[:, -1]
        tokens = torch.stack(chosen, 1).tolist()
        return [row[start:end] for row, start, end in zip(tokens, starts.tolist(), ends.tolist(), strict=True)]

    def _forward_following(self, ids: Tensor, cache: DualCache, keep: Tensor, past: int) -> Tensor:
        """As `_forward` for tokens after a context, one at a time where the model needs that."""
        if not self._continuation.stepwise:
            return self._forward(ids, cache, keep, past)
        kept_positions, kept_logits = set(keep.tolist()), []
        for offset, token in enumerate(ids.split(1, 1)):
            logits = self._forward(token, cache, None, past + offset)
            if offset in kept_positions:
                kept_logits.append(logits)
        return torch.cat(kept_logits, 1)

    def _forward(self, ids: Tensor, cache: DualCache, keep: Tensor | None, past: int) -> Tensor:
        """Logits at the positions `keep` (n,) of `ids` (batch, tokens), all if None: (batch, n, vocabulary).

        `past`: tokens already in the cache.
        """
        options = {} if keep is None or not self.model.keeps_logits else {"logits_to_keep": keep}
        cache_arguments = {cache_argument(self.model.model): cache} | self._continuation.options(ids, past)
        logits = self.model.model(ids, use_cache=True, **cache_arguments, **options).logits
        return logits if options or keep is None else logits[:, keep]

    def _blank_and_stop_tokens(self, stops: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Masks of the blank tokens, (vocabulary,), and of those that end an answer, (stops, vocabulary)."""
        for stop in {*stops} - self._stop_masks.keys():
            self._stop_masks[stop] = self._stop_tokens(stop)
        blank = self._stop_masks[stops[0]][0]
        return blank, torch.stack([self._stop_masks[stop][1] for stop in stops])

    def _stop_tokens(self, stop: str | None) -> tuple[Tensor, Tensor]:
        tokenizer, device = self.model.tokenizer, self.model.model.device
        ends = end_tokens(self.model)
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        texts += [""] * (self.model.model.config.get_text_config().vocab_size - len(texts))  # embeddings may be padded
        blank = [not text.strip() and token not in ends for token, text in enumerate(texts)]
        stopping = [token in ends or (stop is not None and stop in text) for token, text in enumerate(texts)]
        return torch.tensor(blank, device=device), torch.tensor(stopping, device=device)


def work(items: Sequence[Item], generate: bool) -> int:
    """Tokens of the contexts plus those that may be generated, weighted: a proxy for the time that a batch takes."""
    generated = [item.max_new_tokens * len(item.questions) for item in items if generate]
    return sum(len(item.context) for item in items) + GENERATED * sum(generated)


def end_tokens(model: LanguageModel) -> set[int]:
    """The model's end-of-text tokens."""
    generation = getattr(model.model, "generation_config", None)
    candidates = [model.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    return {token for ids in candidates if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


def batches(items: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """Items grouped into batches, regardless of their task: at most `batch_tokens` tokens, or one item.

    Contexts in a batch have the same number of tokens. Those with answers inside are kept separate: they need more
    logits.
    """
    groups: dict[tuple[int, int, bool], list[Item]] = {}
    for item in items:
        in_context = any(question.place is not None for question in item.questions)
        groups.setdefault((item.length, len(item.context), in_context), []).append(item)
    grouped = []
    for (length, _, _), group in groups.items():
        size = max(1, batch_tokens // length)
        grouped += [group[start : start + size] for start in range(0, len(group), size)]
    return grouped


def _predicting_positions(question: Question) -> range:
    """The positions whose logits predict the tokens of an answer inside the context."""
    assert question.place is not None
    return range(question.place - 1, question.place - 1 + len(question.answer))
