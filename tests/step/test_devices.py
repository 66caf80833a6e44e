"""The calculated memory of a step: what is counted, and which model fits which devices."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.distributed.ranks import Ranks
from duo_id.models.loading import meta_model
from duo_id.step.budget import memory_bytes
from duo_id.step.devices import calculated_costs, fit_memory, shared_step
from duo_id.step.memory import GIB, SPARED, Plan, libraries
from duo_id.step.recompute import Keep
from duo_id.step.settings import StepSettings
from duo_id.train.settings import TrainSettings
from tests.support.commands import settings_of
from tests.support.tiny import tiny_model

META, GPU = torch.device("meta"), torch.device("cuda")  # neither is used: planning needs no weights
LEAST = StepSettings(memory="least")
A100 = StepSettings(memory="80GB")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """70 billion parameters on the meta device."""
    overrides = ["model=llama3-70b", "model.init=random"]
    settings = settings_of("train", TrainSettings, *overrides, folder=tmp_path_factory.mktemp("large"))
    return meta_model(settings.model, torch.bfloat16)


def planned(
    model: PreTrainedModel, ranks: Ranks, tokens: int, samples: int = 1, step: StepSettings = LEAST, **changes: Any
) -> Plan:
    costs = calculated_costs(model, ranks, **({"device": META} | changes))
    return fit_memory(step, costs, ranks.tokens(tokens, samples), memory_bytes(step.memory))[1]


def test_a_70b_fits_eight_gpus_of_80_gb(large: PreTrainedModel) -> None:
    assert all(parameter.is_meta for parameter in large.parameters())
    plan = planned(large, Ranks(4, 2, sharded=True), 32768, 4, A100, device=GPU)
    assert 70.5e9 * 2 / 8 < plan.weights < 30e9
    assert set(plan.levels) == {Keep.INPUT}
    planned(large, Ranks(2, 4, sharded=True), 32768, 2, A100, device=GPU, teacher_outputs=True)
    planned(large, Ranks(1, 8, sharded=True), 65536, 1, A100, device=GPU)


def test_what_does_not_fit_is_refused_with_its_numbers(large: PreTrainedModel) -> None:
    message = r"^step\.memory: a step of 32,768 tokens needs at least [\d.]+ GiB of its device \(weights"
    for sharded in (False, True):
        with pytest.raises(UserError, match=message):
            planned(large, Ranks(8, 1, sharded=sharded), 32768, 8, A100, device=GPU)


def test_layers_keep_everything_where_it_fits() -> None:
    costs, step = calculated_costs(tiny_model("llama"), Ranks(2), META), StepSettings(compile=True)
    everything = costs.plan_for([Keep.ALL] * 3, 64, None)
    assert fit_memory(step, costs, 64, everything.total) == (step, replace(everything, budget=everything.total))
    outputs = costs.plan_for([Keep.OUTPUT] * 3, 64, None)
    for budget, memory, level in (
        (everything.total - 1, "outputs", Keep.OUTPUT),
        (outputs.total, "outputs", Keep.OUTPUT),
        (outputs.total - 1, "least", Keep.INPUT),
    ):
        lowered, plan = fit_memory(step, costs, 64, budget)
        assert lowered == StepSettings(compile=True, memory=memory)
        assert set(plan.levels) == {level}
        assert fit_memory(lowered, costs, 64, None) == (lowered, replace(plan, budget=None)), "what fits is kept"
    with pytest.raises(UserError, match="needs at least"):
        fit_memory(StepSettings(memory="outputs"), costs, 64, outputs.total - 1)


def test_without_full_attention_there_is_no_output_to_keep() -> None:
    costs = calculated_costs(tiny_model("llama"), Ranks(2), META, teacher_outputs=True)
    budget = costs.plan_for([Keep.ALL] * 3, 64, None).total - 1
    assert fit_memory(StepSettings(), costs, 64, budget)[0].memory == "least"


def test_gpus_have_libraries_and_a_part_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one GPU, see `tests.step.test_memory`; the fullest GPU counts."""
    model, room = tiny_model("llama"), [80 * GIB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room[0] - 2 * GIB, 90 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(Ranks, "reduce_max", lambda self, value, device: [value + GIB])
    plan = shared_step(model, LEAST, Ranks(2), GPU, 64, 2, teacher_outputs=False)[1]
    assert (plan.budget, plan.spared) == (79 * GIB, SPARED)
    assert plan.buffers == planned(model, Ranks(2), 64, 2).buffers + libraries(GPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cuda_graphs": True}, r"step\.cuda_graphs=true"), ({"shape": "paper", "memory": "least"}, r"step\.shape=paper")],
)
def test_single_device_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message} only works on a single device"):
        shared_step(tiny_model("llama"), StepSettings(**change), Ranks(2), META, 64, 2, teacher_outputs=False)


@pytest.fixture(scope="module")
def middling() -> PreTrainedModel:
    """Llama-3-8B's shape on the meta device."""
    architecture = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, **architecture)
    with META:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_the_published_shape_is_what_was_measured(middling: PreTrainedModel) -> None:
    """Two streams of 32K in one batch, all layers recomputed: 46 GiB on an H200."""
    assert planned(middling, Ranks(), 32768, 2).total == pytest.approx(46 * GIB, rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "tokens", "memory", "blend", "measured"),
    [
        pytest.param(Ranks(), 32768, "least", "student", 27.9, id="one GPU"),
        pytest.param(Ranks(), 65536, "least", "student", 40.8, id="one GPU, 64K"),
        pytest.param(Ranks(), 32768, "auto", "student", 118.6, id="one GPU, everything kept"),
        pytest.param(Ranks(), 32768, "auto", "teacher", 118.7, id="one GPU, everything kept, teacher"),
        pytest.param(Ranks(2, 1, sharded=True), 32768, "least", "student", 21.3, id="data parallel"),
        pytest.param(Ranks(1, 2, sharded=True), 65536, "least", "student", 21.3, id="sequence parallel"),
        pytest.param(Ranks(1, 2, sharded=True), 131072, "least", "student", 34.2, id="sequence parallel, 128K"),
    ],
)
def test_compiled_steps_are_what_was_measured(
    middling: PreTrainedModel, ranks: Ranks, tokens: int, memory: str, blend: str, measured: float
) -> None:
    """Peaks of each H100 or H200, from docs/performance.md."""
    changes = {"compiled": True, "teacher_outputs": blend == "teacher"}
    plan = planned(middling, ranks, tokens, ranks.data, StepSettings(memory=memory), **changes)
    assert 0.99 * measured < plan.total / GIB < 1.11 * measured


def test_half_a_million_tokens_fit_two_gpus_of_141_gb(middling: PreTrainedModel, large: PreTrainedModel) -> None:
    two, step = Ranks(1, 2, sharded=True), StepSettings(memory="139GiB")
    assert set(planned(middling, two, 2**19, step=step, compiled=True, device=GPU).levels) == {Keep.INPUT}
    for teacher, level in ((False, Keep.OUTPUT), (True, Keep.INPUT)):
        plan = planned(large, two, 32768, step=step, compiled=True, teacher_outputs=teacher, device=GPU)
        assert set(plan.levels) == {level}


def test_shares_add_up() -> None:
    model = tiny_model("llama")
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4 + sum(x.nbytes for x in model.buffers())
    alone = planned(model, Ranks(), 64)
    assert alone.weights == whole
    assert planned(model, Ranks(2), 64, 2).weights == whole
    assert planned(model, Ranks(2, sharded=True), 64, 2).activations == alone.activations
    halves = planned(model, Ranks(1, 2, sharded=True), 63)
    assert halves.activations == alone.activations // 2
    assert halves.tokens == 32, "the longer part"
    assert alone.activations == 64 * 32 * 4 * 3  # tokens, hidden size, float32, layers
    teacher = planned(model, Ranks(), 64, teacher_outputs=True)
    assert teacher.activations - alone.activations == 64 * 4 * 16 * 4 * 3  # heads x head_dim
    kept = 4 * (4 * 32 + 2 * 8 * 16 + 3 * 4 * 16 + 3 * 48)  # states, projections, attention's outputs, the MLP
    assert alone.buffers == 64 * (kept + 4 * (2 * 8 * 16 + 3 * 4 * 16)), "attention's gradients: its part is the wider"
    assert halves.buffers - alone.buffers // 2 == 32 * 2 * 4 * (2 * 4 + 2 * 2) * 16  # queries and outputs, keys, values
    smaller = planned(model, Ranks(), 64, compiled=True)
    assert smaller.buffers == 64 * 4 * ((2 * 32 + 8 * 16 + 2 * 4 * 16 + 2 * 48) + (8 * 16 + 2 * 4 * 16))
