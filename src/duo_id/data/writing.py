"""Texts that the model itself writes after long prompts, made once and kept: the answers of `data=self`.

Source: training on what a model itself says is sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from duo_id.attention.functions import Backends
from duo_id.attention.interface import attached
from duo_id.common.errors import UserError, check
from duo_id.common.files import whole_folder
from duo_id.common.progress import progress_bar
from duo_id.common.user_cache import cached_folder
from duo_id.data.chat import Chat
from duo_id.data.disk import vocabulary_hash
from duo_id.data.haystack import load_haystack
from duo_id.data.prompts import REQUESTS, Prompt, chat_of, counts, most_written, prompt_lengths, prompts
from duo_id.data.samples import SPLITS
from duo_id.data.settings import DataSettings
from duo_id.data.written import TEXTS, WrittenText, read_written, written_lines
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.deploy.writing import write
from duo_id.models.fingerprint import fingerprint
from duo_id.models.language_model import LanguageModel, end_tokens
from duo_id.patterns.mask import HeadMask

RULES = 1  # counts the changes of how texts are written, which old ones in the cache do not have
ROWS, CPU_ROWS = 32, 8  # texts that are written together, at most; on a CPU more are not faster
READ = 32  # tokens of a prompt take as long as one that is written
CHUNK = 2**16  # tokens of all prompts in a forward
CACHE_SHARE = 0.5  # of a GPU's free memory, for keys and values


def with_written(settings: DataSettings, model: LanguageModel, console: Console, graph: bool = True) -> DataSettings:
    """The settings with the folder and the digest of the texts that the model wrote, which it writes if need be.

    Settings of samples that are no such texts are returned as they are.

    Args:
        settings: whose haystack has its digest, see `duo_id.data.haystack.with_digest`.
        model: not attached, and not under a mask.
        console: shows the progress.
        graph: decode by CUDA graphs, on a GPU.

    Raises:
        UserError: the model cannot write such texts, there is no room for them, or they are not those of the digest.
    """
    if not settings.reads_written:
        return settings
    path = settings.self_path or str(_cached(settings, model, console, graph))
    _, digest = read_written(path, settings.self_sha256)
    check(model.ranks.broadcast(digest) == digest, "data.self_path: the processes read different texts, copy one's")
    return replace(settings, self_path=path, self_sha256=digest)


def _cached(settings: DataSettings, model: LanguageModel, console: Console, graph: bool) -> Path:
    """The folder in the user's cache, named by all that its texts depend on; a run on one device writes it."""
    check(
        not model.ranks.sharded,
        "step.shard=true: texts that a model wrote are found by its weights, which no device has: use step.shard=false "
        "or give them, data.self_path=DIR",
    )
    ends = end_tokens(model)
    check(bool(ends), f"data=self: {model.name} has no end-of-text token, so nothing that it writes ends")
    chat, lengths = chat_of(settings, model.tokenizer), prompt_lengths(settings, model.max_length)
    origin = _origin(settings, model, chat, lengths) | {"ends": sorted(ends)}
    number = sum(counts(settings).values())

    def fill(folder: Path) -> None:
        check(
            model.ranks.world == 1,
            f"trainer.devices={model.ranks.world}: texts for data=self are written on one device: write them with "
            "duo-id data data=self, or give them, data.self_path=DIR",
        )
        line = f"data=self: {model.name} writes {number} texts of up to {lengths[-1]:,} tokens, which later runs read"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
        texts = write_texts(model, settings, chat, lengths, console, graph)
        with whole_folder(folder) as new_folder:
            (new_folder / TEXTS).write_text(written_lines(texts, model.tokenizer), encoding="utf-8")
            record = {"model": model.name} | origin
            (new_folder / "origin.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return cached_folder(f"self-{hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]}", fill)


def _origin(settings: DataSettings, model: LanguageModel, chat: Chat, lengths: Sequence[int]) -> dict[str, Any]:
    """What texts depend on, as plain values."""
    return {
        "rules": RULES,
        "weights": fingerprint(model.model),
        "adapters": list(model.adapters),
        "vocabulary": vocabulary_hash(model.tokenizer),
        "chat": [chat.before, chat.after],
        "requests": REQUESTS,
        "haystack": settings.haystack.sha256 or load_haystack(settings.haystack, "test").digest,
        "lengths": lengths,
        "samples": settings.self_samples,
        "share": settings.self_share,
        "tokens": settings.self_tokens,
        "temperatures": settings.self_temperatures,
        "seed": settings.self_seed,
    }


def write_texts(
    model: LanguageModel,
    settings: DataSettings,
    chat: Chat,
    lengths: Sequence[int],
    console: Console,
    graph: bool = True,
) -> list[WrittenText]:
    """What the model writes after the prompts of all splits, with all heads seeing everything.

    Args:
        model: not attached, and not under a mask.
        settings: of the samples.
        chat: what stands around each prompt.
        lengths: of samples, ascending; those of one length are written together.
        console: shows the progress.
        graph: decode by CUDA graphs, on a GPU.

    Raises:
        UserError: the model has no dual cache, its device has too little memory, or a prompt has no room.
    """
    haystacks = {split: load_haystack(settings.haystack, split) for split in SPLITS}
    texts: list[WrittenText] = []
    with _everything_seen(model), progress_bar(console, counted=False) as progress:
        places = (number % len(lengths) for count in counts(settings).values() for number in range(count))
        bar = progress.add_task("writing", total=sum(_work(settings, lengths[place]) for place in places))
        for place, length in enumerate(lengths):
            asked = prompts(settings, model.tokenizer, chat, haystacks, lengths, place)
            rows, limit = _rows(model, length), most_written(settings, length)
            for batch in (asked[start : start + rows] for start in range(0, len(asked), rows)):
                done = progress.tasks[bar].completed
                progress.update(bar, description=f"writing {len(batch)} x {limit:,} tokens after {length - limit:,}")
                texts += _write_batch(model, batch, settings.self_seed + len(texts), graph, progress)
                progress.update(bar, completed=done + len(batch) * _work(settings, length))
    return texts


def _work(settings: DataSettings, length: int) -> float:
    """What a sample of so many tokens takes, in written tokens."""
    limit = most_written(settings, length)
    return limit + (length - limit) / READ


def _write_batch(
    model: LanguageModel, batch: Sequence[Prompt], seed: int, graph: bool, progress: Progress
) -> list[WrittenText]:
    ids = torch.tensor([prompt.tokens for prompt in batch], device=model.model.device)
    past, limit = ids.shape[1], batch[0].limit

    def advance(tokens: int) -> None:
        progress.advance(progress.task_ids[0], len(batch) * (tokens / READ if tokens == past else tokens))

    try:
        written = write(
            model.model,
            ids,
            limit,
            torch.tensor([prompt.temperature for prompt in batch]),
            end_tokens(model),
            words=len(model.tokenizer),
            seed=seed,
            chunk_size=max(CHUNK // len(batch), 1),
            graph=graph,
            on_tokens=advance,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"data=self: {len(batch)} texts of {past + limit} tokens do not fit in the device's memory: lower "
            "data.length_max"
        ) from error
    return [
        WrittenText(prompt.split, prompt.temperature, tuple(prompt.tokens), tuple(tokens))
        for prompt, tokens in zip(batch, written, strict=True)
    ]


@contextmanager
def _everything_seen(model: LanguageModel) -> Iterator[None]:
    """The model under a mask that hides nothing, whose caches can be captured."""
    with attached(model.model, Backends()) as layers:
        gated, heads = tuple(layer.index for layer in layers), layers[0].kv_heads
    everything = torch.ones(model.num_layers, heads, dtype=torch.bool)
    with duo_attention(model.model, HeadMask(everything, 0, 1, gated)):
        yield


def _rows(model: LanguageModel, tokens: int) -> int:
    """Texts of so many tokens that a device can write at once."""
    device = model.model.device
    if device.type != "cuda":
        return CPU_ROWS
    cache = dual_cache(model.model)
    cache.fill(1, 1, model.model.dtype, device)
    one = sum(layer.retained_bytes(tokens) for layer in cache.dual_layers)
    return max(min(int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0] / one), ROWS), 1)
