"""Replay gradient: what heads read back while a model repeats its context, weighted by how much depends on it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from duo_id.attention.full import full_attention
from duo_id.attention.functions import AttendFunction
from duo_id.attention.interface import bound
from duo_id.attention.layers import layer_list
from duo_id.attention.softmax import Softmax
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import attention_rows, score_layers
from duo_id.methods.replay import Replay, replayed
from duo_id.methods.run import Run
from duo_id.methods.sample_scores import mean_scores
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES
from duo_id.step.prepare import prepared_step


def find(gated_model: GatedModel, samples: SampleModule, settings: AttentionSettings, run: Run) -> HeadPattern:
    """Average over samples, with activation checkpointing planned for the longest replay."""
    run.on_accepted()
    training_samples = samples.samples("train", settings.samples)
    longest = max(len(replayed(gated_model, sample, settings.name).ids) for sample in training_samples)
    distillation = Distillation(gated_model, OBJECTIVES["next_token"])  # whose memory is planned: it takes more
    with prepared_step(distillation, replace(run.step, compile=False)) as apply_plan:
        apply_plan(longest)
        return gated_model.pattern(mean_scores(replay_gradient, gated_model, training_samples, settings, run.console))


def replay_gradient(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """The most that each token of a text adds to a head's output while the text is repeated, times its gradient's norm.

    The gradient is that of the summed squares of the last layer's states at the repeated tokens, relative to this sum,
    with respect to the head's output at a repeated token; a token adds its value, times the attention that it gets. Of
    each token's highest product beyond the window, the mean over the tokens. Source: KVgrad
    (openreview.net/forum?id=cg1wTCJjjk; NVIDIA/kvpress, pull request 279), there of single cache entries and with
    respect to the states that all heads of a layer write to, here of a head and its own output.

    Args:
        gated_model: the model.
        sample: a training sample; cut so that it fits the model twice.
        settings: of the method.

    Returns:
        (gated layers, KV heads), on an arbitrary scale.

    Raises:
        UserError: the text is too short for anything to lie outside the window.
    """
    replay, window = replayed(gated_model, sample, settings.name), gated_model.window
    gradients = {index: iter(norms) for index, norms in gradient_norms(gated_model, replay).items()}
    queries, keys = (x.to(gated_model.device) for x in (replay.queries, torch.arange(replay.tokens)))

    def score(index: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        sizes = value[0, :, : replay.tokens].float().norm(dim=-1).repeat_interleave(query.shape[1] // len(value[0]), 0)
        norms, done = next(gradients[index]), 0
        highest = torch.zeros_like(sizes)
        for positions, weights in attention_rows(query, key, queries, softmax):
            far = weights[:, :, : replay.tokens] * ~window.sees(positions[:, None], keys)
            dependent = far * norms[:, done : done + len(positions), None]
            highest = torch.maximum(highest, dependent.amax(1) * sizes)
            done += len(positions)
        return highest[:, window.sink_size :].mean(-1)

    return score_layers(gated_model, replay.ids, score, settings.reduction)


def gradient_norms(gated_model: GatedModel, replay: Replay) -> dict[int, list[Tensor]]:
    """Norms of the gradient of the last states' summed squares with respect to what each head writes, relative to them.

    Returns:
        by layer, for each module that attends with its keys: (heads, repeated tokens) float32.
    """
    queries, device = replay.queries.to(gated_model.device), gated_model.device
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in gated_model.layers}
    start = torch.zeros((), device=device, requires_grad=True)  # frozen weights have no gradient to begin with
    recording = True

    def noting(norms: list[Tensor]) -> Callable[[Tensor], None]:
        place = len(norms)
        norms.append(torch.empty(0))

        def note(gradient: Tensor) -> None:
            norms[place] = gradient[0, :, queries].float().norm(dim=-1)

        return note

    def watched(index: int) -> AttendFunction:
        def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            out = full_attention(query, key, value, softmax, gated_model.backends.full)
            out = out if out.requires_grad else out + start.to(out.dtype)
            if recording:  # what is recomputed has no gradient of its own
                out.register_hook(noting(found[index]))
            return out

        return attend

    last: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output if isinstance(output, Tensor) else output[0])

    *_, block = gated_model.model.model.get_submodule(layer_list(gated_model.layers[0].name)).children()
    hook = block.register_forward_hook(keep)
    try:
        with (
            torch.enable_grad(),
            bound(gated_model.layers, {layer.index: watched(layer.index) for layer in gated_model.layers}),
        ):
            gated_model.model.hidden_states({"input_ids": replay.ids.to(device)[None]})
            recording = False
            streams = last[0].flatten(0, -3)  # some models have several residual streams
            size = streams[:, queries].float().square().sum()
            torch.autograd.grad(size, start)
    finally:
        hook.remove()
    return {index: [norm / size.detach() for norm in norms] for index, norms in found.items()}
