"""What a step keeps: levels by hand-worked costs, and the counted bytes of a real model."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.step.budget import memory_bytes
from duo_id.step.chunks import ELEMENT_BYTES, ELEMENTS
from duo_id.step.memory import MeasuredCosts, MemoryPlanner
from duo_id.step.recompute import Keep, activation_checkpointing
from tests.attention.test_memo import counted
from tests.step.test_distillation import batch_of, distilling, gates_of
from tests.support.planted import random_sample

KEPT = [dict(zip(Keep, (10.0, 6.0, 2.0, 1.0), strict=True))] * 4
COSTS = MeasuredCosts(
    weights=1000, kept=KEPT, other=2, again=lambda tokens: [(0, 3 * tokens, 7 * tokens, 10 * tokens)] * 4
)


def test_budgets_are_read() -> None:
    assert memory_bytes("60GiB") == 60 * 2**30
    assert memory_bytes("1.5 GB") == 1_500_000_000
    assert memory_bytes("auto") is memory_bytes("outputs") is memory_bytes("least") is None
    for wrong in ("60", "GiB", "1.2.3GiB", "-1GiB", "much"):
        with pytest.raises(UserError, match=r"step.memory=.*: choose auto, outputs, least, or a budget such as 60GiB"):
            memory_bytes(wrong)


def test_without_a_limit_everything_is_kept() -> None:
    plan = COSTS.plan(100, None)
    assert set(plan.levels) == {Keep.ALL}
    assert (plan.weights, plan.activations, plan.buffers) == (1000, 100 * (2 + 40), 2000)


@pytest.mark.parametrize("budget", range(3600, 7300, 100))
def test_the_fewest_operations_that_fit(budget: int) -> None:
    """Against all 256 ways to choose the levels of four layers."""
    tokens = 100

    def spent(levels: tuple[Keep, ...]) -> float:
        return 1000 + 200 + 2000 + tokens * sum(row[level] for row, level in zip(KEPT, levels, strict=True))

    def work(levels: tuple[Keep, ...]) -> float:
        return sum(row[level] for row, level in zip(COSTS.again(tokens), levels, strict=True))

    plan = COSTS.plan(tokens, budget)
    fitting = [levels for levels in itertools.product(Keep, repeat=4) if spent(levels) <= budget]
    assert spent(plan.levels) <= budget
    assert work(plan.levels) == min(work(levels) for levels in fitting)
    assert plan.weights + plan.activations + plan.buffers == spent(plan.levels)
    assert list(plan.levels) == sorted(plan.levels, reverse=True), "early layers keep the least"


def test_a_part_of_a_gpus_budget_is_spared() -> None:
    gpu = MeasuredCosts(weights=1000, kept=KEPT, other=2, again=COSTS.again, reserve=100)
    least = 1000 + 200 + 2000 + 100 + 100 * 4 * 1  # weights, outside, buffers, libraries, inputs alone
    for budget in (least / 0.94 + 1, 6000, 7000):
        plan = gpu.plan(100, int(budget))
        assert plan.buffers == 2000 + 100
        assert plan.weights + plan.activations + plan.buffers <= 0.94 * budget
    with pytest.raises(UserError, match="needs at least"):
        gpu.plan(100, int(least / 0.94 - 1))
    assert set(gpu.plan(100, None).levels) == {Keep.ALL}


def test_too_little_is_one_line_with_the_numbers() -> None:
    with pytest.raises(UserError) as error:
        MeasuredCosts(2**34, KEPT, 0, again=COSTS.again).plan(2**20, 2**34)
    assert "a step of 1,048,576 tokens needs at least 16.1 GiB of its device (weights 16 + activations" in str(
        error.value
    )
    assert "and there are 16: raise step.memory, lower data.length_max" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("blend", ["student", "teacher", "detached"])
def test_every_plan_gives_the_same_gradients(
    family: str, blend: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model, batch = make_model(family), batch_of(random_sample(61, 1))
    with distilling(model, "layer_l2", blend) as distillation:
        shape = len(distillation.gated_model.layers), distillation.gated_model.layers[0].kv_heads
        alpha = gates_of(*shape).requires_grad_()
        loss = distillation.loss(alpha, batch)
        expected = (loss, *torch.autograd.grad(loss, alpha))
        with activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation:
            for levels in [(level,) * 3 for level in Keep] + [tuple(Keep)[:3], tuple(Keep)[:0:-1]]:
                recomputation.levels[:] = levels
                loss = distillation.loss(alpha, batch)
                found = (loss, *torch.autograd.grad(loss, alpha))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_mlps_run_once_more_where_they_are_not_kept(make_model: Callable[..., PreTrainedModel]) -> None:
    model, batch, calls = make_model("llama"), batch_of(random_sample(40, 1)), [0, 0]
    for layer in model.model.layers:
        for place, part in enumerate((layer.mlp.act_fn, layer.self_attn.o_proj)):
            part.register_forward_pre_hook(lambda *_, place=place: calls.__setitem__(place, calls[place] + 1))
    with (
        distilling(model, "hidden_l2") as distillation,
        activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
    ):
        teacher = distillation.teacher(batch)
        recomputation.levels[:] = (Keep.INPUT, Keep.ATTENTION, Keep.ALL)
        calls[:] = 0, 0
        distillation.loss(gates_of(3, 2).requires_grad_(), batch, teacher).backward()
    assert calls == [3 + 2, 3 + 1]


def test_attention_is_not_computed_again_where_its_output_is_kept(make_model: Callable[..., PreTrainedModel]) -> None:
    model, batch = make_model("llama"), batch_of(random_sample(61, 1))
    with (
        distilling(model, "hidden_l2") as distillation,
        activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
    ):
        teacher, found = distillation.teacher(batch), []
        for level in Keep:
            recomputation.levels[:] = [level] * 3
            with counted() as calls:
                distillation.loss(gates_of(3, 2).requires_grad_(), batch, teacher).backward()
            found.append(calls.number)
    # Three layers: full attention, that of the first tokens of streaming heads, and that of the blocks after these.
    assert found == [9, 9, 9 + 3, 9 + 9], "blocks alone come again, then all"


def test_the_planner_sets_the_levels_of_each_step(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with (
        distilling(model, "hidden_l2") as distillation,
        activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
    ):
        kept = [dict(zip(Keep, (10.0, 5.0, 2.0, 1.0), strict=True))] * 3
        costs = MeasuredCosts(0, kept, 0, again=lambda tokens: COSTS.again(tokens)[:3])
        planner = MemoryPlanner(recomputation, costs, 4500)
        planner.apply_plan(100)
        assert recomputation.levels == [Keep.ATTENTION, Keep.ALL, Keep.ALL]
        assert "of 3 layers keep 3 everything, 0 their attention, 0 their input and" in str(planner.apply_plan(80))
        assert recomputation.levels == [Keep.ALL] * 3
        with pytest.raises(UserError, match="a step of 1,000 tokens needs at least"):
            planner.apply_plan(1000)


def test_logits_take_a_chunk_at_most_and_only_until_the_backward_pass() -> None:
    costs = replace(COSTS, logits=ELEMENT_BYTES * 1000.0)
    few, many = (costs.plan_for([Keep.INPUT] * len(KEPT), tokens, None) for tokens in (100, 10**6))
    assert few.buffers == 100 * 1000 * ELEMENT_BYTES, "more than a layer that is computed again"
    assert many.buffers == max(ELEMENTS * ELEMENT_BYTES, COSTS.plan_for([Keep.INPUT] * len(KEPT), 10**6, None).buffers)


def test_room_is_what_a_plan_leaves() -> None:
    plan = COSTS.plan(100, 10**6)
    assert plan.room == 10**6 - plan.total
    assert COSTS.plan(100, None).room == math.inf
    assert COSTS.plan_for([Keep.ALL] * len(KEPT), 10**6, 1).room == 0
