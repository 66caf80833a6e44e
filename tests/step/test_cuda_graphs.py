"""The graphed loss against the plain one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.data.samples import pad_batch, with_scored
from duo_id.methods.settings import GateSettings
from duo_id.step.cuda_graphs import GraphedLoss
from duo_id.step.settings import StepSettings
from duo_id.train.gate_training import GateTraining

METHOD = {"sink_size": 3, "recent_size": 8}


def batch(tokens: int, seed: int, device: str) -> dict[str, Any]:
    ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[:, -20:] = ids[:, -20:]
    plain = {"input_ids": ids, "labels": labels, "answers": (labels != -100).long(), "attention_mask": None}
    made = with_scored(pad_batch(plain, 64, 512), 32)
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in made.items()}


def test_on_the_cpu_the_function_is_called_as_it_is() -> None:
    alpha = torch.ones(2, 2, requires_grad=True)
    loss = GraphedLoss(lambda alpha, batch: (alpha * batch["x"]).sum())(alpha, {"x": torch.tensor(3.0)})
    assert loss.item() == 12
    assert torch.autograd.grad(loss, alpha)[0].eq(3).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("blend", "objective"), [("student", "hidden_l2"), ("teacher", "hidden_l2"), ("student", "kl")]
)
def test_replay_equals_the_plain_step(
    blend: str, objective: str, device: str, gate_training: Callable[..., Any]
) -> None:
    method = GateSettings(name="duo", **METHOD, blend=blend, objective=objective)
    with gate_training(method, StepSettings(streaming_backend="blocked"), device) as training:
        assert isinstance(training, GateTraining)
        graphed = GraphedLoss(training.distillation.loss)

        def values(function: Callable[..., Tensor], tokens: int, seed: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            alpha = torch.rand(3, 2, generator=generator).to(device).requires_grad_()
            loss = function(alpha, batch(tokens, seed, device))
            return loss.detach(), *torch.autograd.grad(loss, alpha)

        for tokens, seed in [(70, 1), (90, 2), (200, 3), (75, 4), (250, 5)]:  # two shapes, used in turn
            torch.testing.assert_close(
                values(graphed, tokens, seed), values(training.distillation.loss, tokens, seed), atol=1e-5, rtol=1e-3
            )
        assert len(graphed._captured) == (2 if device == "cuda" else 0)
