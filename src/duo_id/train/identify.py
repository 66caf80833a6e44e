"""Run any method on any model: from settings to a head pattern."""

from dataclasses import replace
from functools import partial
from typing import Any

from duo_id.common.errors import UserError, check
from duo_id.methods import (
    attention_profile,
    query_score,
    random,
    reconstruction,
    replay_gradient,
    retrieval_score,
    saliency,
    search,
    spans,
)
from duo_id.methods.run import Find
from duo_id.methods.settings import METHODS, MethodSettings, SearchSettings, name_nested_override, nested_override
from duo_id.models.gated_model import GatedModel
from duo_id.models.quantised import check_differentiable
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.train import fit_gates
from duo_id.train.fit_gates import TrainRun, sample_module

FIND: dict[str, Find] = {
    "duo": fit_gates.find,
    "nested": fit_gates.find,
    "attention_profile": attention_profile.find,
    "retrieval_score": retrieval_score.find,
    "query_score": query_score.find,
    "reconstruction": reconstruction.find,
    "replay_gradient": replay_gradient.find,
    "saliency": saliency.find,
    "search": search.find,
    "spans": spans.find,
    "random": random.find,
}

GRADIENTS = ("duo", "nested", "replay_gradient", "saliency", "spans")  # methods that need them


def identify(gated_model: GatedModel, method: MethodSettings, run: TrainRun) -> HeadPattern:
    """Run a method; the pattern's provenance holds what only the method knows.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once progress is saved.
    """
    ranks, devices = gated_model.model.ranks, run.settings.trainer.get("devices")
    is_supported = (
        ranks.world == 1 or method.devices == "shared" or (method.devices == "replicas" and ranks.group is None)
    )
    check(
        is_supported,
        f"trainer.devices={devices}: method={method.name} only works on a single device; gate training works on "
        "several, and without step.sequence_parallel all methods but search do",
    )
    if method.name in GRADIENTS:
        check_differentiable(gated_model.model.model, f"method={method.name}")
    samples = sample_module(gated_model.model, run.settings, run.seed, run.tasks)
    samples.task("train")  # refuses bad settings before anything is computed
    key = "start" if hasattr(method, "start") else "prior"
    named_pattern = partial(_named_pattern, key, getattr(method, key, None), gated_model, run)
    return FIND[method.name](gated_model, samples, method, replace(run, named_pattern=named_pattern))


def _named_pattern(key: str, source: Any, gated_model: GatedModel, run: TrainRun) -> HeadPattern | None:
    """The pattern named by `method.KEY`, computed first if another method is named."""
    if source is None:
        return None
    if isinstance(source, MethodSettings):
        resumable = isinstance(source, SearchSettings)  # a resumed run continues its search
        on_accepted = run.on_accepted if resumable else lambda: None
        loggers = run.loggers if key == "start" else ()  # with a prior, they are for the gates' own training
        try:
            return identify(
                gated_model,
                source,
                replace(run, folder=run.folder / key, on_accepted=on_accepted, loggers=loggers, partial=False),
            )
        except UserError as error:
            raise UserError(name_nested_override(key, str(error))) from error
    try:
        pattern = run.patterns.get(str(source)) or load_pattern(str(source))
        pattern.check_fits(*gated_model.pattern_shape, gated_model.model.name)
        pattern.check_scores(layer.index for layer in gated_model.layers)
    except UserError as error:
        advice = f"; the method of that name is {nested_override(key)}={source}" if source in METHODS else ""
        raise UserError(f"method.{key}={source}: {error}{advice}") from error
    return pattern
