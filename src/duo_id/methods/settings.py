"""The settings of every way to identify heads: see conf/method/. `method=NAME` chooses one."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field

from duo_id.attention.blends import BLENDS
from duo_id.attention.window import Window
from duo_id.common.config import (
    Count,
    Fraction,
    Named,
    Number,
    Positive,
    PositiveWeight,
    Some,
    Text,
    Weight,
    one_of,
    parse,
    resolve,
    settings,
    shown,
)
from duo_id.common.errors import UserError, check
from duo_id.common.mistakes import instantiate
from duo_id.methods.gates import GATES
from duo_id.methods.penalties import PENALTIES
from duo_id.step.objectives import Objective, check_weight, make_objective


@settings("method")
class MethodSettings:
    """What all methods have; each has its own settings too, in `duo_id.methods.settings`: see conf/method/."""

    name: Text
    sink_size: Count  # tokens
    recent_size: Positive  # tokens, the query's own among them

    devices: ClassVar[Literal["one", "replicas", "shared"]] = "replicas"  # which each find the same, or share the work

    @property
    def window(self) -> Window:
        """What streaming heads see."""
        return Window(self.sink_size, self.recent_size)


class _Distilled:
    """Methods that measure how far a model with gates or masks is from its full attention."""

    objective: Any

    @property
    def resolved_objective(self) -> Objective:
        """What `objective` names."""
        return make_objective(self.objective)


COLDEST = 1e-3  # the least temperature of gates
Tokens = Literal["labelled", "far"]  # which tokens an objective looks at, see `duo_id.step.distillation`
Part = Annotated[Number, Field(gt=0, lt=1)]


@settings("method")
class ScoreSettings(MethodSettings):
    """Methods that look at some training samples without training."""

    samples: Positive = 8


@settings("method")
class AttentionSettings(ScoreSettings):
    """Scores that are read off the attention weights of the full model."""

    reduction: Literal["max", "mean"] = "max"  # of the query heads that share a KV head


@settings("method")
class SaliencySettings(_Distilled, ScoreSettings):
    """How much an objective changes with each gate, from backward passes."""

    kind: Literal["gradient", "fisher"] = "gradient"
    objective: Named = "kl"  # a name, or weights of several
    tokens: Tokens = "labelled"
    at: Some[Fraction] = field(default_factory=lambda: [1.0])  # where all gates stand

    def __post_init__(self) -> None:
        """Check what goes together."""
        objective = self.resolved_objective
        check(
            self.kind == "fisher" or not objective.teacher or any(value < 1 for value in self.at),
            f"method.at={self.at}: at 1 the student is the teacher, so the gradient of method.objective="
            f"{self.objective} is 0 there; add smaller values, or choose method.objective=next_token or "
            "method.kind=fisher",
        )


@settings("method")
class SearchSettings(_Distilled, ScoreSettings):
    """Trying masks: heads are closed or opened one after the other by what that costs."""

    devices = "one"

    strategy: Literal["elimination", "selection"] = "elimination"
    objective: Named = "kl"
    tokens: Tokens = "labelled"
    start: Named = None  # another method's settings, or a saved pattern: only the heads around the budget are searched
    between: Some[Fraction] = field(default_factory=lambda: [0.0, 1.0])  # sparsities of the start that are searched
    heads_per_round: Positive = 1
    swap_at: Part | None = None  # a sparsity whose mask is refined by exchanging heads
    max_swaps: Count = 0
    swap_width: Positive = 8  # heads on either side of an exchange that are tried with each other
    batch_tokens: Positive | None = None  # tokens of all candidates in one forward; null: what fits the device

    def __post_init__(self) -> None:
        """Check what goes together."""
        _ = self.resolved_objective
        _check_pair("between", self.between)
        check(
            self.start is not None or self.between == [0.0, 1.0],
            f"method.between={self.between} needs method.start: without one all heads are searched",
        )
        if self.max_swaps:
            check(self.swap_at is not None, f"method.max_swaps={self.max_swaps} needs method.swap_at=SPARSITY")
        if self.swap_at is not None:
            check(self.max_swaps > 0, f"method.swap_at={self.swap_at} needs method.max_swaps=NUMBER, of exchanges")
        self.start = _typed_order("start", self.start, self)


@settings("method")
class GateSettings(_Distilled, MethodSettings):
    """How gates are trained. Each of blend, gate, penalty and objective names one small function or class."""

    devices = "shared"

    blend: Annotated[Text, one_of(BLENDS)] = "student"
    gate: Annotated[Text, one_of(GATES)] = "clamp"
    penalty: Named = "l1"  # a name, or weights of several
    objective: Named = "hidden_l2"  # a name, or weights of several
    tokens: Tokens = "labelled"
    initial: Fraction = 1.0  # how open gates begin
    prior: Named = None  # another method's settings, or a saved pattern: its order has a part in the scores
    prior_weight: Annotated[PositiveWeight, Field(description="method.prior=null does without")] = (
        0.05  # of a head's place in that order, from 0 to 1, beside its own score
    )
    temperature: Annotated[Number, Field(ge=COLDEST, le=1e9, description="below, no gate would move")] = (
        1.0  # of sigmoid and nested gates
    )
    budgets: Some[Fraction] = field(default_factory=lambda: [0.4, 0.97])  # of nested gates: the sparsities drawn
    reg_weight: Weight = 0.05  # of the penalty
    target_sparsity: Fraction | None = None  # of penalty=target
    target_rise: Fraction = 0.5  # fraction of the steps over which the target rises from 0
    multiplier_lr: PositiveWeight = 0.05  # of the target's multipliers
    lr: PositiveWeight = 0.02
    warmup: Annotated[Number, Field(ge=0, le=0.5)] = 0.2  # fraction of the steps over which the learning rate rises,
    # and falls at the end
    floor: Fraction = 0.1  # the learning rate's least fraction
    optimizer: dict[str, Any] = field(default_factory=dict)  # `_target_` and its arguments but the parameters

    def __post_init__(self) -> None:
        """Check that what is chosen makes sense together."""
        objective = self.resolved_objective
        check(
            bool(self.penalty) and isinstance(self.penalty, str | Mapping),
            f"method.penalty={shown(self.penalty)}: choose one of {', '.join(PENALTIES)}, or weights of several such "
            "as {l1: 1, binary: 0.1}",
        )
        for name, weight in self.penalties.items():
            check(name in PENALTIES, f"method.penalty={shown(name)}: choose one of {', '.join(PENALTIES)}")
            check_weight(weight, f"method.penalty.{name}")
        check(
            self.blend != "teacher" or objective.teacher,
            f"method.blend=teacher needs a teacher pass, which method.objective={self.objective} does without: "
            "choose method.blend=student",
        )
        if self.gate == "nested":
            self._check_nested()
        self.prior = _typed_order("prior", self.prior, self)
        check(
            not isinstance(self.prior, GateSettings),
            "method@method.prior=NAME: nested and duo cannot be named, what has a part in the scores of gates is found "
            "without gates; for the order of others give the folder of their run, method.prior=DIR",
        )
        if "target" in self.penalties:
            check(self.target_sparsity is not None, "method.penalty=target needs method.target_sparsity, a fraction")
            check(self.reg_weight > 0, "method.penalty=target cannot reach its target with method.reg_weight=0")
        else:
            check(
                self.target_sparsity is None,
                f"method.target_sparsity={self.target_sparsity} needs method.penalty=target: {self.penalty} cannot "
                "reach a target",
            )

    def _check_nested(self) -> None:
        _check_pair("budgets", self.budgets)
        check(
            self.budgets[0] < 1 and self.budgets[1] > 0,
            f"method.budgets={self.budgets} never decides between heads: give sparsities such as "
            "method.budgets=[0.4,0.97]",
        )
        check(
            self.penalty == "l1" and self.reg_weight == 0,
            f"method.penalty={self.penalty} with method.reg_weight={self.reg_weight}: method.gate=nested has no "
            "penalty, since method.budgets say how many heads are open; choose method=nested without these, or another "
            "method.gate",
        )

    @property
    def penalties(self) -> dict[str, float]:
        """The weight of each penalty."""
        return dict(self.penalty) if isinstance(self.penalty, Mapping) else {self.penalty: 1.0}


METHODS: dict[str, type[MethodSettings]] = {
    "duo": GateSettings,
    "nested": GateSettings,
    "attention_profile": AttentionSettings,
    "retrieval_score": AttentionSettings,
    "query_score": AttentionSettings,
    "reconstruction": AttentionSettings,
    "saliency": SaliencySettings,
    "search": SearchSettings,
    "random": MethodSettings,
}


def method_settings(config: DictConfig | Mapping[str, Any]) -> MethodSettings:
    """The typed settings of the method that a config names.

    Raises:
        UserError: there is no such method, or a setting is unknown, of the wrong type or out of range.
    """
    given = resolve(config)
    check(isinstance(given, Mapping), f"method={shown(given)}: choose one of conf/method/")
    name = given.get("name")
    known = isinstance(name, str) and name in METHODS
    check(known, f"method.name={shown(name)}: choose one of {', '.join(METHODS)}")
    return parse(METHODS[str(name)], given)


def _check_pair(key: str, values: list[float]) -> None:
    """Refuse what are not two fractions in ascending order."""
    check(
        len(values) == 2 and values[0] <= values[1],
        f"method.{key}={values} must be two fractions from 0 to 1, in this order",
    )


def make_optimizer(method: GateSettings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that is chosen, over these parameters.

    Raises:
        UserError: it cannot be made, or is none.
    """
    optimizer = instantiate("method.optimizer", method.optimizer, parameters)
    check(
        isinstance(optimizer, torch.optim.Optimizer),
        f"method.optimizer={shown(method.optimizer)} is no optimizer: give method.optimizer._target_, such as "
        "torch.optim.AdamW",
    )
    return optimizer


def nested_override(key: str) -> str:
    """The override that puts another method at `method.KEY`; gates always have a place for their prior."""
    return f"{'' if key == 'prior' else '+'}method@method.{key}"


def name_nested_override(key: str, message: str) -> str:
    """What is wrong with the order in `method.KEY`, with the overrides that lead there.

    Its windows are those of the method.
    """
    named = re.sub(r"method\.(?!sink_size|recent_size)", f"method.{key}.", message)
    return named.replace("method=", f"method@method.{key}=")


def _typed_order(key: str, given: Any, method: MethodSettings) -> Any:
    """An order that a method is given, typed and with the same windows where it is another method's settings."""
    if not isinstance(given, Mapping):
        check(
            given is None or isinstance(given, MethodSettings) or (isinstance(given, str) and bool(given.strip())),
            f"method.{key}={given!r}: give the folder of a run, or another method, {nested_override(key)}=NAME",
        )
        return given
    shared = {"sink_size": method.sink_size, "recent_size": method.recent_size}
    try:
        return method_settings({**given, **shared})
    except UserError as error:
        named = name_nested_override(key, str(error))
        raise UserError(named if named != str(error) else f"method.{key}.{error}") from error
