"""Attention over dense matrices, which shares no code with the package: what all fast paths are tested against."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from duo_id.data.samples import UNSCORED, Sample
from duo_id.step.objectives import Outputs

NAME = "tests_dense"


@dataclass
class Seen:
    """What each layer did: its full attention's weights (heads, tokens, tokens), and its output."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def dense_attention(
    model: PreTrainedModel,
    sink: int = 0,
    recent: int = 1,
    alpha: Mapping[int, Tensor] | None = None,
    blend: str = "student",
    teacher: Mapping[int, Tensor] | None = None,
) -> Iterator[Seen]:
    """Give the model dense attention over single samples without padding.

    Args:
        model: any.
        sink: first tokens that a streaming head sees.
        recent: latest tokens that it sees.
        alpha: the gates of some layers, by index; the others do as their model does.
        blend: student | detached | teacher.
        teacher: recorded outputs of these layers.
    """
    seen, gates = Seen(), alpha or {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        index, group, tokens = module.layer_idx, query.shape[1] // key.shape[1], query.shape[2]
        scaling, sliding = options.get("scaling"), options.get("sliding_window")
        scores = query @ key.repeat_interleave(group, 1).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
        causal = (j <= i) & (i - j < (sliding or tokens))
        streaming = (j <= i) & ((j < sink) | (i - j < recent))

        def over(visible: Tensor) -> tuple[Tensor, Tensor]:
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return weights, weights @ value.repeat_interleave(group, 1)

        weights, full = over(causal)
        seen.weights[index], seen.outputs[index] = weights[0].detach(), full.detach()
        out = full
        if index in gates:
            gate = gates[index].repeat_interleave(group)[:, None, None]
            if blend == "teacher":
                assert teacher is not None
                full = teacher[index]
            out = gate * (full.detach() if blend == "detached" else full) + (1 - gate) * over(streaming)[1]
        return out.transpose(1, 2).contiguous().to(query.dtype), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)


def plain_outputs(model: PreTrainedModel, sample: Sample, layers: list[int]) -> Outputs:
    """What a plain forward leaves at the labelled tokens; `layers` are those whose blocks' outputs are wanted."""
    places = (sample["labels"] != UNSCORED).nonzero()[:, 0]
    caught: dict[int, Tensor] = {}

    def catching(index: int) -> Callable[..., None]:
        return lambda module, given, out: caught.__setitem__(index, out if isinstance(out, Tensor) else out[0])

    blocks: Any = model.base_model.layers
    hooks = [blocks[index].register_forward_hook(catching(index)) for index in layers]
    ids = sample["input_ids"][None]
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    logits = model.get_output_embeddings()(hidden)
    behind = tuple(caught[index][0, places] for index in layers)
    return Outputs(hidden[places], behind, logits[places - 1], ids[0, places])


def slow_objective(name: str, student: Outputs, teacher: Outputs) -> Tensor:
    """An objective at each token, (tokens,), one token after the other."""
    return torch.stack([_at(name, student, teacher, token) for token in range(student.hidden.shape[-2])])


def _at(name: str, student: Outputs, teacher: Outputs, token: int) -> Tensor:
    if name == "hidden_l2":
        return F.mse_loss(student.hidden[token], teacher.hidden[token])
    if name == "relative_l2":
        return _relative(student.hidden[token], teacher.hidden[token])
    if name == "layer_l2":
        pairs = zip(student.layers, teacher.layers, strict=True)
        return torch.stack([_relative(own[token], theirs[token]) for own, theirs in pairs]).mean()
    if name == "kl_next_token":
        return _at("kl", student, teacher, token) + 0.3 * _at("next_token", student, teacher, token)
    assert student.logits is not None
    if name == "next_token":
        assert student.targets is not None
        return F.cross_entropy(student.logits[token], student.targets[token])
    assert teacher.logits is not None
    own, theirs = student.logits[token].log_softmax(-1), teacher.logits[token].log_softmax(-1)
    return F.kl_div(own, theirs, reduction="sum", log_target=True)


def _relative(own: Tensor, theirs: Tensor) -> Tensor:
    return ((own - theirs) ** 2).sum() / (theirs**2).sum()
