"""The memory of a step by calculation: what is counted, and which model fits which devices."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from duo_id.config import TrainSettings
from duo_id.errors import UserError
from duo_id.models import meta_model
from duo_id.plan import GIB, Shape, memory_plan
from tests.commands import settings_of
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """70 billion parameters on the meta device."""
    overrides = ["model=llama3-70b", "model.init=random"]
    settings = settings_of("train", TrainSettings, *overrides, folder=tmp_path_factory.mktemp("large"))
    return meta_model(settings.model, torch.bfloat16)


def test_a_70b_fits_eight_gpus_of_80_gb(large: PreTrainedModel) -> None:
    assert all(parameter.is_meta for parameter in large.parameters())
    plan = memory_plan(large, Shape(32768, samples=4, data=4, sequence=2))
    assert 70.5e9 * 2 / 8 < plan.weights < 30e9
    plan.check(80 * 10**9)
    memory_plan(large, Shape(32768, samples=2, data=2, sequence=4, teacher_outputs=True)).check(80 * 10**9)
    memory_plan(large, Shape(65536, sequence=8)).check(80 * 10**9)


def test_what_does_not_fit_is_refused_with_its_numbers(large: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"^not enough memory: .* GiB on each device \(weights \d+\.\d, activations"):
        memory_plan(large, Shape(32768, sharded=False, samples=8, data=8)).check(80 * 10**9)
    with pytest.raises(UserError, match=r"step\.memory=least"):
        memory_plan(large, Shape(32768, samples=8, data=8, recompute=False)).check(80 * 10**9)


def test_the_published_shape_is_what_was_measured() -> None:
    """Two streams of 32K in one batch, all layers recomputed: 46 GiB on an H200 (design, numbers to stand on)."""
    architecture = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, **architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert memory_plan(model, Shape(32768, samples=2)).total == pytest.approx(46 * GIB, rel=0.15)


def test_shares_add_up() -> None:
    model = tiny_model("llama")
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    alone = memory_plan(model, Shape(64))
    assert alone.weights == whole
    assert memory_plan(model, Shape(64, samples=2, data=2, sharded=False)).weights == whole
    assert memory_plan(model, Shape(64, samples=2, data=2)).activations == alone.activations
    assert memory_plan(model, Shape(64, sequence=2)).activations == alone.activations // 2
    assert alone.activations == 64 * 32 * 4 * 3  # tokens, hidden size, float32, layers
