"""Lengths and windows that the model and its device decide."""

from typing import Any

import pytest
import torch

from duo_id.common.composing import compose
from duo_id.common.errors import UserError
from duo_id.methods.settings import AttentionSettings, GateSettings
from duo_id.train.fitting import LONGEST, train_settings
from duo_id.train.settings import TrainSettings
from tests.support.tiny import tiny_model

BEST = ["~logger", "experiment=best", "model.init=random"]


def settings_of(*overrides: str, model: Any = None) -> TrainSettings:
    return train_settings(compose("train", [*BEST, *overrides]), model)


@pytest.mark.parametrize(
    ("limit", "lengths", "recent"),
    [
        (8192, (1000, 8000), 256),
        (32768, (4000, 32000), 1024),
        (131072, (4000, LONGEST), 1024),  # time forbids more
        (16384, (2000, 16000), 512),
        (5000, (1000, 5000), 128),  # an eighth would have no room for the passkeys
        (2048, (1000, 2000), 64),
        (700, (700, 700), 64),
    ],
)
def test_lengths_and_windows_follow_the_models_limit(limit: int, lengths: tuple[int, int], recent: int) -> None:
    settings = settings_of(f"model.architecture.max_position_embeddings={limit}")
    assert (settings.data.length_min, settings.data.length_max) == lengths
    assert settings.method.recent_size == recent
    assert settings.method.window.recent_size == recent
    assert settings.data.haystack.source == ("packages" if lengths[1] > 12000 else "embedded")
    assert settings.trainer["max_steps"] == (200 if lengths[1] > 12000 else 400)


def test_what_is_given_stays_and_decides_the_rest() -> None:
    settings = settings_of("data.length_max=20000")
    assert (settings.data.length_min, settings.data.length_max, settings.method.recent_size) == (2500, 20000, 640)
    settings = settings_of("data.length_max=2000")
    assert (settings.data.length_min, settings.data.length_max, settings.method.recent_size) == (1000, 2000, 64)
    settings = settings_of("method.recent_size=100", "data.length_min=900")
    assert (settings.data.length_min, settings.data.length_max, settings.method.recent_size) == (900, 8000, 100)
    assert settings_of("data.length_max=20000", "trainer.max_steps=7").trainer["max_steps"] == 7
    plain = train_settings(compose("train", ["~logger"]))
    assert (plain.data.length_max, plain.method.recent_size, plain.trainer["max_steps"]) == (384, 64, 48), (
        "nothing is automatic by default"
    )


def test_a_length_that_is_given_is_not_shortened() -> None:
    message = "data.length_min=3000 exceeds the 2000 tokens that model and memory take: lower it"
    with pytest.raises(UserError, match=f"^{message}$"):
        settings_of("model.architecture.max_position_embeddings=2048", "data.length_min=3000")


def test_a_model_in_memory_decides_too() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    settings = settings_of(model=model)
    assert (settings.data.length_min, settings.data.length_max, settings.method.recent_size) == (1000, 4000, 128)


def test_a_budget_shortens_the_samples_of_gate_training_alone() -> None:
    ample, narrow = (settings_of(f"step.memory={memory}") for memory in ("80GiB", "1GiB"))
    assert ample.data.length_max == 8000
    assert 1000 <= narrow.data.length_max < 8000
    assert narrow.data.length_max % 1000 == 0
    assert narrow.method.recent_size == max(round(narrow.data.length_max / 2048), 1) * 64
    scores = train_settings(compose("train", ["~logger", "experiment=query-score", "step.memory=1GiB"]))
    assert scores.data.length_max == 8000


def test_several_devices_all_decide_the_same() -> None:
    """Each has its own free memory, so that does not count."""
    assert settings_of("step.memory=1GiB", "trainer.devices=2").data.length_max == 8000


def test_the_method_that_comes_first_has_the_same_window() -> None:
    settings = settings_of("method@method.prior=reconstruction")
    assert isinstance(settings.method, GateSettings)
    assert isinstance(settings.method.prior, AttentionSettings)
    assert settings.method.prior.recent_size == settings.method.recent_size == 256


def test_mistakes_are_answered_before_the_model_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duo_id.models.loading.meta_model", lambda *args: pytest.fail("the model was looked up"))
    with pytest.raises(UserError, match=r"^method\.lr=fast"):
        settings_of("method.lr=fast")
    with pytest.raises(UserError, match=r"^data\.length_max=automatic"):
        settings_of("data.length_max=automatic")


def test_a_gpus_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2.5 * 2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert settings_of().data.length_max < 8000
    assert settings_of("trainer.accelerator=cpu").data.length_max == 8000
