"""Score all contenders on all items, batch by batch, so that full attention reads each context once for all of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from rich.console import Console

from duo_id.common.errors import UserError
from duo_id.common.progress import progress_bar
from duo_id.deploy.chunks import continuation
from duo_id.deploy.install import duo_attention
from duo_id.evaluate.answers import Answers
from duo_id.evaluate.batches import batches, work
from duo_id.evaluate.contenders import Contender
from duo_id.evaluate.evicted import read_evicted
from duo_id.evaluate.items import Item
from duo_id.evaluate.journal import Journal
from duo_id.evaluate.judging import score_rows
from duo_id.evaluate.reading import Reader
from duo_id.models.language_model import LanguageModel, end_tokens

CPU_CONTEXT_TOKENS = 4096
Texts = Mapping[Item, Sequence[int]]  # tokens, by the item they follow


def run(
    model: LanguageModel,
    items: Sequence[Item],
    contenders: Sequence[Contender],
    journal: Journal,
    generate: bool,
    batch_tokens: int | None,
    chunk_size: int,
    console: Console,
    write: int = 0,
) -> None:
    """Answer all items that are missing from the journal, starting with the first samples of all tasks and lengths.

    An interrupted run thus covers every task and length.

    Args:
        model: the language model, without a mask.
        items: the items to answer.
        contenders: full attention first.
        journal: receives the rows after each batch of each contender.
        generate: also generate answers.
        batch_tokens: see `Reader`; None: as many as fit the device, see `context_tokens_for`.
        chunk_size: tokens per forward pass.
        console: shows progress, and a note if contexts are not read in chunks.
        write: tokens at most of a free text after the first question of each context, compared with full attention's.

    Raises:
        UserError: a batch does not fit in memory, or the model's output with a cache differs from that without one.
    """
    full = contenders[0]
    assert full.kind == "full"
    batch_tokens = batch_tokens or context_tokens_for(model)
    reader = Reader(model, batch_tokens, chunk_size)
    rows = partial(score_rows, tokenizer=model.tokenizer, ends=end_tokens(model))

    def missing(contender: Contender, batch: Sequence[Item]) -> list[Item]:
        return [item for item in batch if not journal.has(item, contender.key, generate, write > 0)]

    def under(contender: Contender, batch: Sequence[Item]) -> AbstractContextManager[None]:
        assert contender.mask is not None
        return duo_attention(model.model, contender.mask(len(batch[0].context)), kv=contender.kv)

    def answer(
        batch: Sequence[Item], contender: Contender, generate: bool, texts: Texts | None = None
    ) -> list[Answers]:
        """The answers of a batch; `texts` to follow, for all but full attention, whose cache is kept for the others."""
        with fitting(batch), under(contender, batch):
            if contender.evict is not None:
                return read_evicted(reader, batch, contender.evict, generate, write, texts)
            return reader.read(batch, generate, write, texts, keep=bool(write) and contender is full)

    @contextmanager
    def fitting(batch: Sequence[Item]) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(batch)} contexts of {batch[0].length} tokens do not fit in the device's memory: "
                f"lower batch_tokens={batch_tokens} or lengths"
            ) from error

    pending = [item for item in items if any(missing(contender, [item]) for contender in contenders)]
    pending.sort(key=lambda item: item.index)
    plan = [
        (batch, {contender: subset for contender in contenders[1:] if (subset := missing(contender, batch))})
        for batch in sorted(batches(pending, batch_tokens), key=lambda batch: batch[0].index)
    ]
    if plan:
        _warn_if_stepwise(model, plan[0][0][0], full, chunk_size, console)
    with progress_bar(console, counted=False) as progress:
        total = sum(
            work(batch, generate and bool(missing(full, batch)), write)
            + sum(work(subset, generate, write) for subset in subsets.values())
            for batch, subsets in plan
        )
        bar, planned = progress.add_task("evaluating", total=total), 0

        def advance(done: int) -> None:
            """Never beyond the end of a batch, which is longer than planned where a model reads token by token."""
            progress.update(bar, completed=min(planned, progress.tasks[bar].completed + done))

        reader.on_work = advance
        for batch, subsets in plan:
            unrecorded = missing(full, batch)
            planned += work(batch, generate and bool(unrecorded), write)
            progress.update(bar, description=f"{full.heads}: {len(batch)} x {batch[0].length:,} tokens")
            reference = dict(zip(batch, answer(batch, full, generate and bool(unrecorded)), strict=True))
            journal.add(row for item in unrecorded for row in rows(full, item, reference[item], reference[item]))
            progress.update(bar, completed=planned)
            for contender, subset in subsets.items():
                planned += work(subset, generate, write)
                progress.update(bar, description=f"{contender.heads}: {len(subset)} x {subset[0].length:,} tokens")
                texts = {item: said.tokens for item in subset if (said := reference[item].written) is not None}
                answers = dict(zip(subset, answer(subset, contender, generate, texts), strict=True))
                own = {item: said.tokens for item, a in answers.items() if (said := a.written) is not None}
                of_full = {}
                if own:
                    with fitting(batch), under(full, batch):
                        of_full = reader.follow(own)
                journal.add(
                    row
                    for item, answered in answers.items()
                    for row in rows(contender, item, answered, reference[item], of_full=of_full.get(item))
                )
                progress.update(bar, completed=planned)
            reader.kept = None  # before the next batch takes its memory


def _warn_if_stepwise(model: LanguageModel, item: Item, full: Contender, chunk_size: int, console: Console) -> None:
    """Probe how the model continues a cached context, and print a note if it cannot read in chunks."""
    assert full.mask is not None
    with duo_attention(model.model, full.mask(len(item.context))):
        reading = continuation(model.model, torch.tensor([item.context], device=model.model.device))
    if reading.stepwise:
        console.print(
            f"{model.name} loses its state when several tokens follow cached ones: each context is read in one forward "
            f"pass, regardless of chunk_size={chunk_size}, and the tokens after it one by one",
            soft_wrap=True,
            markup=False,
        )


def context_tokens_for(model: LanguageModel) -> int:
    """Tokens whose full KV cache takes a seventh of a GPU's free memory, as the cache is copied and the copies grow.

    On a CPU a few thousand: larger batches are no faster there, and progress is saved after each batch.
    """
    device, config = model.model.device, model.model.config.get_text_config()
    if device.type != "cuda":
        return CPU_CONTEXT_TOKENS
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * dim * model.model.dtype.itemsize
    return max(1, int(torch.cuda.mem_get_info(device)[0] / 7 / token))
