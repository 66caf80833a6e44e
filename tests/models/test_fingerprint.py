"""A fingerprint tells weights and configs apart, and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.models import fingerprint as module
from duo_id.models.fingerprint import fingerprint
from tests.support.tiny import tiny_model


def test_the_same_model_has_the_same_one() -> None:
    model = tiny_model("llama")
    again = copy.deepcopy(model).requires_grad_(True)
    again.config._name_or_path = "elsewhere"
    again.config._attn_implementation = "eager"
    assert fingerprint(model) == fingerprint(again) == fingerprint(tiny_model("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[2].mlp.up_proj.weight.data.mul_(1.001),
        lambda model: model.model.norm.weight.data[-1:].add_(1e-3),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
        lambda model: model.bfloat16(),
    ],
    ids=["trained", "a number of a small tensor", "config", "dtype"],
)
def test_another_model_has_another(change: Callable[[PreTrainedModel], object]) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_first_and_last_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 3)
    probed = module._probe(torch.arange(10, dtype=torch.int16).view(2, 5))
    assert probed.view(torch.int16).tolist() == [0, 4, 9]
