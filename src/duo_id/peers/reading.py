"""Read contexts under a press and answer their questions, each from the same compressed cache."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kvpress.presses.base_press import BasePress
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from duo_id.common.errors import UserError, one_line
from duo_id.peers.answers import Json

MASKED = "masked_key_indices"  # module attribute where presses that mask without freeing keep masked entries
BLOCK = 4096  # rows of logits in float32 at a time


@dataclass
class CompressedCache:
    """A cache after its context was read.

    Attributes:
        cache: compressed.
        sizes: entries per head, by layer.
        tokens: of the context and what was appended to it, which is also the next position.
        bytes: of the context's keys and values that are neither evicted nor masked.
    """

    cache: Any  # of transformers, with keys and values as tensors
    sizes: list[int]
    tokens: int
    bytes: int

    def restore(self) -> None:
        """Drop everything after the context and what was appended to it."""
        for layer, size in zip(self.cache.layers, self.sizes, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]


def load_model(header: Json, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the samples were made for.

    Raises:
        UserError: they cannot be loaded.
    """
    source, options = header["model"], {"revision": header["revision"]}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        dtype, target = getattr(torch, header["dtype"]), {"": torch.device(device)}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=target, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the model {source} cannot be loaded on {device}: {one_line(error)}") from None
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def read(
    model: PreTrainedModel, context: Sequence[int], press: BasePress | None, eager: bool = False
) -> CompressedCache:
    """Read a context of at least one token, under a press or (None) with the full cache.

    Args:
        model: loaded after kvpress was imported.
        context: tokens.
        press: compresses each layer's entries once the layer has read the whole context.
        eager: read with eager attention, which passes its weights to the press.
    """
    assert len(context) > 0
    modules = [module for module in model.modules() if getattr(module, MASKED, None) is not None]
    for module in modules:
        setattr(module, MASKED, None)  # left by the previous context; eager attention would not reset it
    cache: Any = DynamicCache()
    with _attn_implementation(model, "eager") if eager else nullcontext(), press(model) if press else nullcontext():
        model.model(input_ids=torch.tensor([context], device=model.device), past_key_values=cache)
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    return CompressedCache(cache, sizes, len(context), retained_bytes(cache, model.modules()))


def retained_bytes(cache: Any, modules: Iterable[Any]) -> int:
    """Bytes of a cache's keys and values, minus those of masked entries."""
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    for module in modules:
        masked = getattr(module, MASKED, None)
        if masked is not None:
            layer = cache.layers[module.layer_idx]
            entry = sum(states[0, 0, 0].nbytes for states in (layer.keys, layer.values))
            total -= len(masked[0]) * entry
    return total


@torch.no_grad()
def force(model: PreTrainedModel, cache: CompressedCache, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Teacher-forced logits of the right answer after the context and a prompt of at least one token.

    Returns:
        (answer tokens, vocabulary), in the model's dtype.
    """
    logits = _forward(model, cache, [*prompt, *answer[:-1]], cache.tokens, len(answer))
    cache.restore()
    return logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: CompressedCache,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop: str | None,
) -> list[int]:
    """The greedy answer, up to an end-of-text token, or to `stop` after the first non-blank text."""
    stop_tokens, generated, position = end_tokens(model, tokenizer), [], cache.tokens
    logits = _forward(model, cache, prompt, position, 1)
    position += len(prompt)
    while True:
        generated.append(int(logits[-1].argmax()))
        ended = generated[-1] in stop_tokens or (stop is not None and stop in str(tokenizer.decode(generated)).lstrip())
        if ended or len(generated) >= max_new_tokens:
            break
        logits = _forward(model, cache, generated[-1:], position, 1)
        position += 1
    cache.restore()
    return generated


@torch.no_grad()
def append(model: PreTrainedModel, cache: CompressedCache, tokens: Sequence[int]) -> None:
    """Let tokens stay in the cache, uncompressed: whatever is asked from now on follows them."""
    _forward(model, cache, tokens, cache.tokens, 1)
    cache.sizes = [size + len(tokens) for size in cache.sizes]
    cache.tokens += len(tokens)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The model's end-of-text tokens."""
    candidates = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    return {token for ids in candidates if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


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
        block = slice(start, start + BLOCK)
        log_probs, full_log_probs = (F.log_softmax(x[block].float(), -1) for x in (logits, full))
        loss += float(F.nll_loss(log_probs, targets[block], reduction="sum"))
        full_loss += float(F.nll_loss(full_log_probs, targets[block], reduction="sum"))
        kl += float(F.kl_div(log_probs, full_log_probs, reduction="sum", log_target=True))
    correct = int((logits.argmax(-1) == targets).sum())
    return {"loss": loss, "kl": kl, "tokens": len(targets), "correct": correct, "full_loss": full_loss}


def _forward(
    model: PreTrainedModel, cache: CompressedCache, tokens: Sequence[int], position: int, num_logits: int
) -> Tensor:
    """Logits (num_logits, vocabulary) of the last `num_logits` of `tokens`, which start at `position`."""
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(position, position + len(tokens), device=model.device)[None]
    with _own_masks(model, cache.cache) if len(set(cache.sizes)) > 1 else nullcontext():
        output = model(input_ids=ids, past_key_values=cache.cache, position_ids=positions, logits_to_keep=num_logits)
    return output.logits[0]


@contextmanager
def _own_masks(model: PreTrainedModel, cache: Any) -> Iterator[None]:
    """Masks that fit what each layer holds, where transformers makes one for as many entries as the first layer has."""

    def fit(module: Any, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = options["attention_mask"]  # (1, 1, tokens, entries); None for a single token
        if mask is not None:
            surplus = mask.shape[3] - mask.shape[2] - cache.layers[module.layer_idx].keys.shape[2]
            columns = torch.arange(surplus, mask.shape[3], device=mask.device).clamp(min=0)  # all see the first entry
            mask = mask[..., columns]
        return given, options | {"attention_mask": mask}

    hooks = [layer.self_attn.register_forward_pre_hook(fit, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attn_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
