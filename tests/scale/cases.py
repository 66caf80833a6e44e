"""Steps that any number of processes must take alike, and how one process of them does its part."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention import last_layer
from duo_id.attention.functions import Backends
from duo_id.attention.interface import attached
from duo_id.attention.layers import AttentionLayer
from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.train_step import StepBench
from duo_id.common.files import atomic_path
from duo_id.data.samples import collate
from duo_id.distributed.ranks import Ranks
from duo_id.methods.settings import GateSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import load_model
from duo_id.models.settings import ModelSettings
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.compiled import compiled_parts
from duo_id.step.recompute import Keep, activation_checkpointing
from duo_id.step.settings import StepSettings
from duo_id.train.comparison import compare
from duo_id.train.gate_training import GateTraining
from tests.support.planted import random_sample
from tests.support.tiny import FAMILIES, SHARED

LENGTHS = (61, 40, 83, 57)  # odd and even; none divides by 2 and 4
PATTERN = HeadPattern(torch.tensor([[0.1, 0.9, 0.7], [0.3, 0.2, 0.6], [0.8, 0.4, 0.5]]), sink_size=2, recent_size=8)


@dataclass(frozen=True)
class Case:
    """A model of three layers and a step of it."""

    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    scored: int = 5  # last tokens of the first sample; one more of each further one
    also: tuple[int, ...] = ()  # other scored tokens of every sample
    side: str = "right"
    recompute: Keep | None = None
    compile: bool = False

    def settings(self) -> ModelSettings:
        """Its model, with weights that are large enough for attention to be far from uniform."""
        architecture = SHARED | FAMILIES.get(self.family, {}) | self.model
        shape = {"model_type": self.family, "initializer_range": 0.3, "vocab_size": 258}
        return ModelSettings(id="tiny", init="random", dtype="float32", architecture=architecture | shape)


BACKENDS = Backends(streaming="blocked")  # on any device, where others would be compiled for every length
HEADS = ("num_attention_heads", "num_key_value_heads")
CASES = {
    "GQA": Case(),
    "GQA, recomputed": Case(recompute=Keep.INPUT),
    "GQA, recomputed but for full attention": Case(recompute=Keep.OUTPUT),
    "GQA, compiled": Case(compile=True),
    "MHA": Case("qwen3", dict.fromkeys(HEADS, 4)),
    "3 KV heads": Case("llama", {"hidden_size": 48} | dict(zip(HEADS, (6, 3), strict=True))),
    "1 KV head, padding left": Case("llama", {"hidden_size": 48} | dict(zip(HEADS, (6, 1), strict=True)), side="left"),
    "few scored, a sample each": Case(lengths=(170, 121), scored=2),  # the last layer computes these alone
    "few scored of one sample": Case(lengths=(171,), scored=3, also=(85, 86)),  # two processes have 86 tokens each
    "few scored, logits": Case(
        "qwen3", method={"objective": "kl", "tokens": "far"}, lengths=(171,), scored=3, also=(1, 86)
    ),
    "few scored, compiled": Case(lengths=(171,), scored=3, compile=True, recompute=Keep.OUTPUT),
    "few scored, teacher blend": Case(method={"blend": "teacher"}, lengths=(171,), scored=3),
    "teacher blend": Case(method={"blend": "teacher"}),
    "logits": Case(method={"objective": "kl"}, scored=35),
    "each layer, far tokens": Case(
        method={"objective": {"layer_l2": 1.0, "next_token": 0.5}, "tokens": "far"}, scored=35
    ),
    "sliding window": Case(
        "gemma3_text", {"sliding_window": 16, "layer_types": ["sliding_attention", *["full_attention"] * 2]}
    ),
}


EVERY = (*CASES, "measured", "scores")
SHAPES = ("MHA", "3 KV heads", "1 KV head, padding left")
FEWER = {  # of two processes on a CPU: both sharded and unsharded, data and sequence are divided, if not in every case
    "2x1x1": tuple(name for name in EVERY if name not in ("GQA, compiled", *SHAPES)),
    "1x2x0": ("GQA", "1 KV head, padding left", "logits", "measured", "scores"),
}


def divided(rank: int, data: int, sequence: int, sharded: bool) -> Ranks:
    """The place of a rank whose processes have been started already; all must ask."""
    group = dist.new_subgroups(sequence)[0] if sequence > 1 else None
    return Ranks(data, sequence, rank, sharded, group)


def compiled(
    model: PreTrainedModel, layers: Sequence[AttentionLayer], ranks: Ranks, device: str
) -> AbstractContextManager[None]:
    """Compiled layers; graphs of any length take up to half a minute, so two processes on a CPU fix it."""
    dynamic = ranks.world > 2 or device != "cpu"
    return compiled_parts(model, layers, attention=True, dynamic=dynamic, backend="eager")


@contextmanager
def loaded(case: Case, ranks: Ranks, device: str) -> Iterator[tuple[LanguageModel, GateTraining]]:
    """The case's model and gates, attached."""
    method = {"sink_size": 2, "recent_size": 8, "reg_weight": 0.05} | case.method
    model = load_model(case.settings(), device, 0, ranks)
    with (
        attached(model.model, BACKENDS, ranks.group) as layers,
        compiled(model.model, layers, ranks, device) if case.compile else nullcontext(),
        activation_checkpointing(model.model, layers, case.recompute) if case.recompute else nullcontext(),
    ):
        settings = StepSettings(streaming_backend=BACKENDS.streaming)
        settings_of_method = GateSettings(name="duo", **method)
        gated_model = GatedModel(model, layers, settings_of_method.window, BACKENDS)
        training = GateTraining(gated_model, settings_of_method, settings, 10, [0.5]).to(device)
        gates = training.gates.weight
        gates.data.copy_(torch.linspace(0.1, 0.9, gates.numel()).view_as(gates))
        yield model, training


def step(case: Case, ranks: Ranks, device: str = "cpu") -> dict[str, Tensor]:
    """Loss and gradient of the whole step, of which this process computes its part, and what its last MLP computes."""
    tokens: list[int] = []
    plain = last_layer.scatter_rows

    def noting(values: Tensor, rows: Tensor, count: int, dim: int) -> Tensor:
        if dim == 1:
            tokens.append(len(rows))
        return plain(values, rows, count, dim)

    with loaded(case, ranks, device) as (_, training), patch.object(last_layer, "scatter_rows", noting):
        count = max(len(case.lengths) // ranks.data, 1)  # two samples come twice on four processes
        mine = [index % len(case.lengths) for index in range(ranks.data_rank * count, (ranks.data_rank + 1) * count)]
        samples = [random_sample(case.lengths[index], index, case.scored + index) for index in mine]
        for sample in samples:
            for token in case.also:
                sample["labels"][token] = sample["input_ids"][token]
        batch = training.on_before_batch_transfer(collate(samples, 0, case.side), 0)
        batch = training.on_after_batch_transfer(training.transfer_batch_to_device(batch, torch.device(device), 0), 0)
        loss = training.distillation.loss(training.gates.alpha(), batch) + 0.05 * training.penalty(
            training.gates.openness()
        )
        loss.backward()
        gradient = training.gates.weight.grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        found = {"loss": ranks.mean(loss.detach()).cpu(), "gradient": ranks.mean(gradient).cpu()}
        return found | {"tokens": torch.tensor(tokens)}


def measured(ranks: Ranks, device: str = "cpu") -> dict[str, Tensor]:
    """Loss and gradient of a step that the benchmark measures."""
    with loaded(CASES["GQA"], ranks, device) as (model, training):
        sizes = {"context": [501], "chunk_size": [8], "sparsity": [0.5], "sink_size": 2, "recent_size": 8}
        settings = BenchmarkSettings(CASES["GQA"].settings(), "train_step", batch_size=4, repeats=1, warmup=0, **sizes)
        batch = StepBench(settings, model, Ceilings(1.0, 1.0), Path(), lambda phase: None)._batch(501)
        alpha = training.gates.alpha()
        loss = training.distillation.loss(alpha, batch)
        (gradient,) = torch.autograd.grad(loss, alpha)
        return {"loss": ranks.mean(loss.detach()).cpu(), "gradient": ranks.mean(gradient).cpu()}


def scores(ranks: Ranks, device: str = "cpu") -> Tensor:
    """What masks of the model with three KV heads, and a head of its own, score."""
    settings = CASES["3 KV heads"].settings()
    settings.architecture["tie_word_embeddings"] = False
    model = load_model(settings, device, 0, ranks)
    samples = []
    for seed in range(2):
        sample = random_sample(50 + seed, seed, 40)
        answers = sample["answers"].clone()
        answers[-20:] *= 2
        samples.append({"input_ids": sample["input_ids"], "answers": answers})
    samples.append(random_sample(60, 2, 5))  # the first of several processes has no answers
    rows = [score for row in compare(model, PATTERN, samples, [0.5], 1, 0, BACKENDS) for score in row.samples]
    return torch.tensor([[row.loss, row.correct, row.tokens, row.exact, row.answers] for row in rows])


def everything(rank: int, divisions: dict[str, tuple[str, ...]], device: str, folder: Path) -> None:
    """The cases of each division of the processes, such as 2x1x1: data x sequence x sharded; the first leaves the
    results.

    Raises:
        RuntimeError: something failed; its one line says what and how. What was found before is left all the same.
    """
    found: dict[str, Any] = {}
    parts = {key: partial(step, case) for key, case in CASES.items()} | {"measured": measured, "scores": scores}
    for division, chosen in divisions.items():
        data, sequence, sharded = map(int, division.split("x"))
        ranks = divided(rank, data, sequence, bool(sharded))
        for key in chosen:
            name = f"{division}: {key}"
            try:
                found[name] = parts[key](ranks, device)
            except Exception as error:
                told = next(iter(str(error).splitlines()), "")
                raise RuntimeError(f"{name}: {type(error).__name__}: {told}") from error
            if rank == 0:
                with atomic_path(folder / "found.pt") as beside:
                    torch.save(found, beside)
