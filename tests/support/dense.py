"""Dense attention that shares no code with the package: the reference of all fast paths."""

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
class Recorded:
    """By layer: its full attention's weights (heads, tokens, tokens), and its output."""

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
) -> Iterator[Recorded]:
    """Give the model dense attention over single samples without padding.

    Args:
        model: any model.
        sink: first tokens that a streaming head sees.
        recent: latest tokens that it sees.
        alpha: the gates of some layers, by index; the others have the model's own attention.
        blend: student | detached | teacher.
        teacher: recorded outputs of these layers.
    """
    recorded, gates = Recorded(), alpha or {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        index, group, tokens = module.layer_idx, query.shape[1] // key.shape[1], query.shape[2]
        scaling, sliding = options.get("scaling"), options.get("sliding_window")
        scores = query @ key.repeat_interleave(group, 1).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
        causal = (j <= i) & (i - j < (sliding or tokens))
        streaming = (j <= i) & ((j < sink) | (i - j < recent))

        def attend_to(visible: Tensor) -> tuple[Tensor, Tensor]:
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return weights, weights @ value.repeat_interleave(group, 1)

        weights, full = attend_to(causal)
        recorded.weights[index], recorded.outputs[index] = weights[0].detach(), full.detach()
        out = full
        if index in gates:
            gate = gates[index].repeat_interleave(group)[:, None, None]
            if blend == "teacher":
                assert teacher is not None
                full = teacher[index]
            out = gate * (full.detach() if blend == "detached" else full) + (1 - gate) * attend_to(streaming)[1]
        return out.transpose(1, 2).contiguous().to(query.dtype), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    original = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield recorded
    finally:
        model.set_attn_implementation(original)


def plain_outputs(model: PreTrainedModel, sample: Sample, layers: list[int]) -> Outputs:
    """The outputs of a plain forward at the labelled tokens, including those of the blocks of `layers`."""
    positions = (sample["labels"] != UNSCORED).nonzero()[:, 0]
    captured: dict[int, Tensor] = {}

    def capture(index: int) -> Callable[..., None]:
        return lambda module, inputs, out: captured.__setitem__(index, out if isinstance(out, Tensor) else out[0])

    blocks: Any = model.base_model.layers
    hooks = [blocks[index].register_forward_hook(capture(index)) for index in layers]
    ids = sample["input_ids"][None]
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    logits = model.get_output_embeddings()(hidden)
    block_outputs = tuple(captured[index][0, positions] for index in layers)
    return Outputs(hidden[positions], block_outputs, logits[positions - 1], ids[0, positions])


def slow_objective(name: str, student: Outputs, teacher: Outputs) -> Tensor:
    """An objective at each token, (tokens,), computed token by token."""
    return torch.stack([_at(name, student, teacher, token) for token in range(student.hidden.shape[-2])])


def _at(name: str, student: Outputs, teacher: Outputs, token: int) -> Tensor:
    if name == "hidden_l2":
        return F.mse_loss(student.hidden[token], teacher.hidden[token])
    if name == "relative_l2":
        return _relative(student.hidden[token], teacher.hidden[token])
    if name == "layer_l2":
        pairs = zip(student.layers, teacher.layers, strict=True)
        return torch.stack([_relative(ours[token], reference[token]) for ours, reference in pairs]).mean()
    if name == "kl_next_token":
        return _at("kl", student, teacher, token) + 0.3 * _at("next_token", student, teacher, token)
    assert student.logits is not None
    if name == "next_token":
        assert student.targets is not None
        return F.cross_entropy(student.logits[token], student.targets[token])
    assert teacher.logits is not None
    log_p, log_q = student.logits[token].log_softmax(-1), teacher.logits[token].log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True)


def _relative(output: Tensor, reference: Tensor) -> Tensor:
    return ((output - reference) ** 2).sum() / (reference**2).sum()
