"""Reads contexts under a press and answers their questions, each from the same compressed cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kvpress.presses.base_press import BasePress
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

MASKED = "masked_key_indices"  # where presses that mask without freeing leave, on a module, what is masked
BLOCK = 4096  # rows of logits that are in float32 at a time


@dataclass
class Held:
    """A cache after its context was read.

    Attributes:
        cache: compressed.
        sizes: entries a head of each layer.
        tokens: of the context: the position of what comes next.
        bytes: of the keys and values that are kept and not masked.
    """

    cache: Cache
    sizes: list[int]
    tokens: int
    bytes: int

    def restore(self) -> None:
        """Forget what came after the context."""
        for layer, size in zip(self.cache.layers, self.sizes, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]


@torch.no_grad()
def read(model: PreTrainedModel, context: Sequence[int], press: BasePress | None, eager: bool = False) -> Held:
    """Read a context of at least one token, under a press or (None) with the full cache.

    Args:
        model: loaded after kvpress was imported.
        context: tokens.
        press: compresses each layer's entries once the layer has read the whole context.
        eager: read with eager attention, which hands its weights to the press.
    """
    assert len(context) > 0
    modules = [module for module in model.modules() if getattr(module, MASKED, None) is not None]
    for module in modules:
        setattr(module, MASKED, None)  # of the context before; eager attention would not reset it
    cache = DynamicCache()
    with _attention(model, "eager") if eager else nullcontext(), press(model) if press else nullcontext():
        model.model(input_ids=torch.tensor([context], device=model.device), past_key_values=cache)
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    return Held(cache, sizes, len(context), retained_bytes(cache, model.modules()))


def retained_bytes(cache: Cache, modules: Iterator[Any]) -> int:
    """Bytes of a cache's keys and values, less those of the entries that a module masks."""
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    for module in modules:
        masked = getattr(module, MASKED, None)
        if masked is not None:
            layer = cache.layers[module.layer_idx]
            entry = sum(states[0, 0, 0].nbytes for states in (layer.keys, layer.values))
            total -= len(masked[0]) * entry
    return total


@torch.no_grad()
def force(model: PreTrainedModel, held: Held, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits of the right answer's tokens after the context and a prompt of at least one token.

    Returns:
        (answer tokens, vocabulary), in the model's dtype.
    """
    logits = _forward(model, held, [*prompt, *answer[:-1]], held.tokens, len(answer))
    held.restore()
    return logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held: Held,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop: str | None,
) -> list[int]:
    """The greedy answer: up to a token that ends texts, or up to `stop` after the first text that is not blank."""
    ends, written, place = end_tokens(model, tokenizer), [], held.tokens
    logits = _forward(model, held, prompt, place, 1)
    place += len(prompt)
    while True:
        written.append(int(logits[-1].argmax()))
        ended = written[-1] in ends or (stop is not None and stop in tokenizer.decode(written).lstrip())
        if ended or len(written) >= max_new_tokens:
            break
        logits = _forward(model, held, written[-1:], place, 1)
        place += 1
    held.restore()
    return written


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens with which the model ends a text."""
    found = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    return {token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


def compare(logits: Tensor, full: Tensor, answer: Sequence[int]) -> dict[str, Any]:
    """Loss and KL from full attention in nats, summed, and correct tokens of one answer.

    Args:
        logits: (answer tokens, vocabulary), under a press.
        full: the same shape, of full attention.
        answer: its tokens.
    """
    targets = torch.tensor(answer, device=logits.device)
    loss = full_loss = kl = 0.0
    for start in range(0, len(targets), BLOCK):
        part = slice(start, start + BLOCK)
        here, there = (F.log_softmax(each[part].float(), -1) for each in (logits, full))
        loss += float(F.nll_loss(here, targets[part], reduction="sum"))
        full_loss += float(F.nll_loss(there, targets[part], reduction="sum"))
        kl += float(F.kl_div(here, there, reduction="sum", log_target=True))
    correct = int((logits.argmax(-1) == targets).sum())
    return {"loss": loss, "kl": kl, "tokens": len(targets), "correct": correct, "full_loss": full_loss}


def _forward(model: PreTrainedModel, held: Held, tokens: Sequence[int], place: int, wanted: int) -> Tensor:
    """Logits of the last `wanted` of `tokens`, the first of which stands at position `place`: (wanted, vocabulary)."""
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(place, place + len(tokens), device=model.device)[None]
    return model(input_ids=ids, past_key_values=held.cache, position_ids=positions, logits_to_keep=wanted).logits[0]


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
