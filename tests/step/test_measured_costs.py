"""Counted bytes against those that autograd saves."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

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
