"""A small evaluation for the peers, and what its answers must be, by plain forwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.peers import write_samples
from duo_id.models.loading import byte_tokenizer
from tests.support.tiny import tiny_model

SINK, RECENT, TOKENS = 4, 12, 120


def model_folder(folder: Path, **changes: object) -> PreTrainedModel:
    """A tiny model, saved to `folder` with a tokenizer that reads bytes."""
    model = tiny_model("llama", vocab_size=258, **changes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def make_items() -> list[Item]:
    """Two contexts with two questions after them and one inside."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 256, (count,), generator=generator).tolist())

    items = []
    for index in range(2):
        context = draw(TOKENS)
        inside = Question(prompt=(), answer=context[80:84], place=80)
        questions = (Question(draw(5), draw(3)), inside, Question(draw(3), draw(2)))
        items.append(Item("words", 160, index, context, questions, max_new_tokens=6, stop=None))
    return items


def write_run(folder: Path, model: Path, items: Sequence[Item], **changes: Any) -> None:
    """A run folder with `samples.jsonl`."""
    told = {
        "model": str(model),
        "revision": None,
        "dtype": "float32",
        "chat_template": False,
        "generate": True,
        "seed": 0,
    }
    windows = {"sink_size": SINK, "recent_size": RECENT, "sparsities": [0.0, 0.5], "shares": [0.0, 0.5]}
    write_samples(folder / "samples.jsonl", told | windows | changes, items)


def kept_tokens(share: float, tokens: int) -> int:
    """Tokens a head that a mask keeps on average."""
    return round((1 - share) * tokens + share * min(tokens, SINK + RECENT))


def answer_logits(model: PreTrainedModel, item: Item, question: Question, kept: Tensor | None = None) -> Tensor:
    """Logits of an answer's tokens in one forward of context, prompt and answer.

    Args:
        model: a model of the tests.
        item: with the context.
        question: the question.
        kept: bool (1 or query heads, context); what comes after the context does not see the others. None: all.
    """
    context = list(item.context if question.place is None else item.context[: question.place - 1])
    prompt = list(question.prompt if question.place is None else item.context[question.place - 1 : question.place])
    tokens = [*context, *prompt, *question.answer[:-1]]
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    if kept is not None:
        seen = seen.repeat(1, len(kept), 1, 1)
        seen[0, :, len(context) :, : len(context)] &= kept[:, None]
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return model(torch.tensor([tokens]), attention_mask=hidden).logits[0, -len(question.answer) :]


def measures(logits: Tensor, full: Tensor, answer: Sequence[int]) -> tuple[float, float, int]:
    """Loss, KL and correct tokens, by their definitions."""
    here, there = logits.softmax(-1), full.softmax(-1)
    loss = sum(-here[place, token].log().item() for place, token in enumerate(answer))
    kl = (there * (there / here).log()).sum().item()
    return loss, kl, int((logits.argmax(-1) == torch.tensor(answer)).sum())


def cache_bytes(model: PreTrainedModel, entries: float) -> int:
    """Bytes of float32 keys and values of so many entries, on average, in each KV head of each layer."""
    config = model.config
    head_size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return round(entries * config.num_hidden_layers * config.num_key_value_heads * head_size * 4 * 2)


def greedy(model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
    """The next tokens, each by a forward of its own, up to one that ends texts."""
    written: list[int] = []
    while len(written) < count and not {2, 257} & set(written):
        written.append(int(F.log_softmax(model(torch.tensor([[*tokens, *written]])).logits[0, -1], -1).argmax()))
    return written
