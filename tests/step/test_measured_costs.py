"""Counted bytes against those that autograd saves."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.attention.interface import bound
from duo_id.attention.priced import priced_layers
from duo_id.step.chunks import ELEMENT_BYTES
from duo_id.step.measured_costs import measure_costs
from duo_id.step.recompute import Keep, activation_checkpointing
from tests.step.test_distillation import batch_of, distilling, gates_of
from tests.support.planted import random_sample


@pytest.mark.parametrize("blend", ["student", "teacher"])
def test_counted_bytes_foretell_those_of_longer_steps(blend: str, make_model: Callable[..., PreTrainedModel]) -> None:
    """Never less than autograd saves in a step of more tokens, as a plain list of tensors, and at most a fifth more."""
    model = make_model("llama", max_position_embeddings=4096)
    with (
        distilling(model, "hidden_l2", blend) as distillation,
        activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
    ):
        costs = measure_costs(distillation, recomputation)
        assert distillation.last is not None
        distillation.last = None  # the most that a step keeps: its last layer computes all tokens
        assert costs.weights == 4 * sum(parameter.numel() for parameter in model.parameters()) + sum(
            buffer.nbytes for buffer in model.buffers()
        )
        batch = batch_of(random_sample(1080, 1))
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        teacher = distillation.teacher(batch)
        for tensor in teacher.attention.values():
            note(tensor)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = distillation.student(gates_of(3, 2).requires_grad_(), batch, teacher)
        total = sum(size for pointer, size in saved.items() if pointer not in known)
        plan = costs.plan(1080, None)
        del outputs
    assert total <= plan.activations <= 1.2 * total
    # Float32, 4 heads of 16 and their log-sums, of all tokens and of those 10 at which a streaming head sees all.
    output = (4 * 4 * 16 + 4 * 4) * (266 + 10) / 266 if blend == "student" else 4 * (4 * 16 + 4) * 10 / 266
    for row in costs.kept:
        assert row[Keep.ALL] > row[Keep.ATTENTION] > row[Keep.OUTPUT] >= row[Keep.INPUT]
        assert row[Keep.OUTPUT] - row[Keep.INPUT] == pytest.approx(output)
    assert costs.kept[1][Keep.INPUT] == 4 * 32, "one hidden state a token"
    assert (costs.other > 3 * 4 * 64) == (blend == "teacher"), "the teacher's outputs of three layers"


def test_priced_spans_keep_how_they_differ(make_model: Callable[..., PreTrainedModel]) -> None:
    model, tokens, saved = make_model("llama"), 300, []
    with (
        distilling(model, "kl") as distillation,
        activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
    ):
        gated_model = distillation.gated_model
        one, three = (measure_costs(distillation, recomputation, count) for count in (1, 3))
        for others in ([4], [4, 8, 16]):
            spans = torch.full((3, 2), -1, dtype=torch.int32)
            others = torch.tensor(others, dtype=torch.int32).view(-1, 1, 1).expand(-1, 3, 2)
            shares = torch.zeros(others.shape, requires_grad=True)
            kept: list[int] = []
            functions = priced_layers(gated_model.layers, spans, others, shares, 2, gated_model.backends)
            with (
                bound(gated_model.layers, functions),
                torch.autograd.graph.saved_tensors_hooks(partial(_note, kept), lambda tensor: tensor),
            ):
                outputs = distillation.outputs(batch_of(random_sample(tokens, 1)))
            saved.append(sum(kept))
            del outputs
    for row, before in zip(three.kept, one.kept, strict=True):
        assert row[Keep.ALL] - before[Keep.ALL] == row[Keep.ATTENTION] - before[Keep.ATTENTION] == 2 * 4 * 64
        assert row[Keep.OUTPUT] == before[Keep.OUTPUT]
    counted = 2 * 4 * 64 * (tokens + tokens + 10)  # the last layer attends from the labelled tokens alone
    assert saved[1] - saved[0] == counted


def _note(kept: list[int], tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 5:  # how the heads of a group differ: nothing else has as many dimensions
        kept.append(tensor.untyped_storage().nbytes())
    return tensor


@pytest.mark.parametrize(
    ("objective", "tokens", "words"), [("hidden_l2", "labelled", 0), ("kl", "labelled", 96), ("hidden_l2", "far", 96)]
)
def test_logits_count_where_they_are_computed(
    objective: str, tokens: str, words: int, make_model: Callable[..., PreTrainedModel]
) -> None:
    with (
        distilling(make_model("llama"), objective, tokens=tokens) as distillation,
        activation_checkpointing(
            distillation.gated_model.model.model, distillation.gated_model.layers, Keep.ALL
        ) as recomputation,
    ):
        costs = measure_costs(distillation, recomputation)
    assert costs.logits == ELEMENT_BYTES * words


def test_what_is_kept_does_not_grow_with_the_vocabulary(make_model: Callable[..., PreTrainedModel]) -> None:
    others = []
    for words in (96, 960):
        model = make_model("llama", vocab_size=words)
        with (
            distilling(model, "kl") as distillation,
            activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
        ):
            others.append(measure_costs(distillation, recomputation).other)
    assert others[0] == others[1] > 0
