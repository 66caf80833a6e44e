"""First-order saliency: the cost of closing each gate a little, for all heads from one backward pass."""

from dataclasses import replace

import torch
from torch import Tensor

from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample, batch_of_one
from duo_id.methods.run import Run
from duo_id.methods.sample_scores import mean_scores
from duo_id.methods.settings import SaliencySettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs
from duo_id.step.prepare import prepared_step

DRAWS = 4  # of labels, from one forward


def find(gated_model: GatedModel, samples: SampleModule, settings: SaliencySettings, run: Run) -> HeadPattern:
    """Average over samples, with activation checkpointing planned for the longest one."""
    run.on_accepted()
    training_samples = samples.samples("train", settings.samples)
    distillation = _distillation(gated_model, settings)
    step = replace(run.step, compile=False)  # not worth it for a few passes
    with prepared_step(distillation, step) as apply_plan:
        apply_plan(max(len(sample["input_ids"]) for sample in training_samples))
        return gated_model.pattern(mean_scores(saliency, gated_model, training_samples, settings, run.console))


def saliency(gated_model: GatedModel, sample: Sample, settings: SaliencySettings) -> Tensor:
    """How much the objective rises as each gate closes, by its slope where all gates have the same value.

    `kind=gradient`: minus the gradient, mean over `at` (along a path from 1 to 0 this is the integrated gradient,
    Sundararajan et al. 2017, arXiv 1703.01365). `kind=fisher`: the diagonal of the Fisher information, which is the
    curvature of the KL divergence at its minimum, where its gradient is 0; labels are sampled from the model.

    Args:
        gated_model: the model.
        sample: a training sample.
        settings: of the method.

    Returns:
        (gated layers, KV heads), on an arbitrary scale.
    """
    batch = batch_of_one(sample, gated_model.device)
    distillation = _distillation(gated_model, settings)
    teacher = distillation.teacher(batch)
    scores = []
    for value in settings.at:
        alpha = torch.full(gated_model.shape, value, device=gated_model.device, requires_grad=True)
        if settings.kind == "gradient":
            loss = distillation.loss(alpha, batch, teacher)
            scores.append(-torch.autograd.grad(loss, alpha)[0])
        else:
            outputs = distillation.student(alpha, batch, teacher)
            scores.append(fisher(distillation, outputs, alpha))
    return torch.stack(scores).mean(0).float().cpu()


def _distillation(gated_model: GatedModel, settings: SaliencySettings) -> Distillation:
    """Fisher information is that of the likelihood, which needs logits and no teacher, whatever the objective."""
    objective = OBJECTIVES["next_token"] if settings.kind == "fisher" else settings.resolved_objective
    return Distillation(gated_model, objective, settings.tokens)


def fisher(distillation: Distillation, outputs: Outputs, variables: Tensor) -> Tensor:
    """Diagonal of the Fisher information per token, of variables that the outputs depend on.

    Labels of different tokens are sampled independently, so the products of their gradients vanish in expectation and
    one gradient of their sum serves all tokens.

    Args:
        distillation: of the likelihood, `next_token`.
        outputs: of the student, at the scored tokens.
        variables: of any shape, which the result has too.
    """
    generator = torch.Generator(variables.device).manual_seed(0)

    def draw(student: Outputs, teacher: Outputs) -> Tensor:
        assert student.logits is not None
        probabilities = student.logits.float().softmax(-1)
        return torch.multinomial(probabilities, DRAWS, replacement=True, generator=generator).T

    assert outputs.targets is not None
    ones = torch.ones(len(outputs.targets), device=variables.device)
    squares = torch.zeros_like(variables)
    for labels in distillation.in_chunks(Objective(draw, logits=True, teacher=False)).values(outputs, outputs):
        drawn = replace(outputs, targets=labels)
        loss = distillation.chunked.loss(drawn, drawn, ones)
        squares += torch.autograd.grad(loss, variables, retain_graph=True)[0].square()
    return squares / DRAWS / len(ones)
