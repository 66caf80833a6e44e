"""Any method on any model: from settings to a head pattern."""

from dataclasses import replace
from functools import partial
from typing import Any

from duo_id.common.errors import UserError, check
from duo_id.methods import (
    attention_profile,
    query_score,
    random,
    reconstruction,
    retrieval_score,
    saliency,
    search,
)
from duo_id.methods.run import Find
from duo_id.methods.settings import METHODS, MethodSettings, SearchSettings, name_nested_override, nested_override
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.files import load_pattern
from duo_id.patterns.pattern import HeadPattern
from duo_id.train import fit_gates
from duo_id.train.fit_gates import TrainRun, sample_module

FIND: dict[str, Find] = {
    "duo": fit_gates.find,
    "attention_profile": attention_profile.find,
    "retrieval_score": retrieval_score.find,
    "query_score": query_score.find,
    "reconstruction": reconstruction.find,
    "saliency": saliency.find,
    "search": search.find,
    "random": random.find,
}


def identify(gated_model: GatedModel, method: MethodSettings, run: TrainRun) -> HeadPattern:
    """Carry a method out; the pattern's provenance says what the method alone knows.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once progress is saved.
    """
    ranks, devices = gated_model.model.ranks, run.settings.trainer.get("devices")
    runs = ranks.world == 1 or method.devices == "shared" or (method.devices == "replicas" and ranks.group is None)
    check(
        runs,
        f"trainer.devices={devices}: method={method.name} works on 1 device; on several do trained gates, and without "
        "step.sequence_parallel all but searches",
    )
    samples = sample_module(gated_model.model, run.settings, run.seed)
    samples.task("train")  # what cannot work is refused before anything is computed
    key = "start" if isinstance(method, SearchSettings) else "prior"
    named_pattern = partial(_named_pattern, key, getattr(method, key, None), gated_model, run)
    return FIND[method.name](gated_model, samples, method, replace(run, named_pattern=named_pattern))


def _named_pattern(key: str, named: Any, gated_model: GatedModel, run: TrainRun) -> HeadPattern | None:
    """The pattern that `method.KEY` names, which a method of its own may have to find first."""
    if named is None:
        return None
    if isinstance(named, MethodSettings):
        resumable = isinstance(named, SearchSettings)  # a resumed run takes up what it has found so far
        on_accepted = run.on_accepted if resumable else lambda: None
        loggers = run.loggers if key == "start" else ()  # beside a prior they show the gates' own training
        try:
            return identify(
                gated_model, named, replace(run, folder=run.folder / key, on_accepted=on_accepted, loggers=loggers)
            )
        except UserError as error:
            raise UserError(name_nested_override(key, str(error))) from error
    try:
        pattern = load_pattern(str(named))
        pattern.check_fits(*gated_model.pattern_shape, gated_model.model.name)
        pattern.check_scores(layer.index for layer in gated_model.layers)
    except UserError as error:
        advice = f"; the method of that name is {nested_override(key)}={named}" if named in METHODS else ""
        raise UserError(f"method.{key}={named}: {error}{advice}") from error
    return pattern
