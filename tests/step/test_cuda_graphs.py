"""The graphed loss against the plain one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.data.samples import pad_batch, with_scored
from duo_id.methods.settings import GateSettings
from duo_id.step import cuda_graphs
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


class StandIns:
    """A device that says how long launches take, and graphs that count; the CPU has neither."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launched: float, waits: bool = False) -> None:
        self.captured: list[Any] = []
        self.cached = 0  # bytes that the allocator keeps of freed tensors
        clock = iter(float(value) for row in ((i, i + launched, i + 1) for i in range(0, 1000, 10)) for value in row)
        monkeypatch.setattr(cuda_graphs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        for name in ("synchronize", "get_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.cached + 10 * len(self.captured))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "cached", 0))
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(cuda_graphs, "_Capture", self.capture)
        monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda alpha, capture, batch: torch.tensor(-1.0))
        self.mode: Any = None
        self.waits = waits

    def capture(self, loss: Any, alpha: Tensor, batch: dict[str, Any], pool: Any) -> Any:
        torch.cuda.empty_cache()
        self.captured.append(batch["x"].shape)
        return SimpleNamespace(graph=SimpleNamespace(pool=lambda: "pool"))

    def loss(self, alpha: Any, batch: dict[str, Any]) -> Tensor:
        self.cached = 1000
        if self.waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.tensor(1.0)

    def steps(self, graphed: GraphedLoss, shapes: list[int], num_bytes: int = 0) -> list[float]:
        alpha: Any = SimpleNamespace(is_cuda=True, device="cuda")
        return [float(graphed(alpha, {"x": torch.zeros(shape)}, num_bytes)) for shape in shapes]


@pytest.mark.parametrize(("launched", "replayed"), [(0.9, True), (0.5, False)])
def test_a_shape_whose_launches_take_the_time_is_captured_from_its_third_step_on(
    launched: float, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = StandIns(monkeypatch, launched)
    graphed = GraphedLoss(device.loss, always=False)
    assert device.steps(graphed, [5, 7, 5, 7, 5, 5]) == [1, 1, 1, 1, -1 if replayed else 1, -1 if replayed else 1]
    assert device.captured == ([torch.Size([5])] if replayed else [])
    assert device.steps(GraphedLoss(device.loss), [5, 5]) == [-1, -1], "true captures at once"


def test_a_step_that_waits_for_the_device_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIns(monkeypatch, 0.9, waits=True)
    assert device.steps(GraphedLoss(device.loss, always=False), [5] * 5) == [1] * 5
    assert not device.captured
    assert device.mode != "error", "the mode is what it was"

    def broken(alpha: Any, batch: Any) -> Tensor:
        raise RuntimeError("something else")

    graphed = GraphedLoss(broken, always=False)
    with pytest.raises(RuntimeError, match="something else"):
        device.steps(graphed, [5])


def test_graphs_take_no_more_than_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIns(monkeypatch, 0.9)
    graphed = GraphedLoss(device.loss)
    graphed.room, device.cached = 100, 1000
    assert device.steps(graphed, [5], 101) == [1], "one that may not fit"
    assert device.steps(graphed, [5, 6], 90) == [-1, -1], "each takes 10, which is counted instead of 90"
    assert device.steps(graphed, [7], 90) == [1]
    graphed.release()
    assert device.steps(graphed, [7], 90) == [-1]


@pytest.mark.gpu
def test_by_themselves_short_steps_are_captured(gate_training: Callable[..., Any]) -> None:
    method = GateSettings(name="duo", **METHOD, objective="kl")
    with gate_training(method, StepSettings(streaming_backend="blocked"), "cuda") as training:
        assert training.graphs is not None
        assert not training.graphs.always
        alpha = torch.rand(3, 2, device="cuda").requires_grad_()
        losses = [training.graphs(alpha, batch(70, 1, "cuda")) for _ in range(4)]
        assert len(training.graphs._captured) == 1, "a tiny model's kernels take no time"
        gradients = [torch.autograd.grad(loss, alpha)[0] for loss in losses]
        torch.testing.assert_close(gradients[3], gradients[0], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(losses[3], losses[0], atol=1e-5, rtol=1e-3)
