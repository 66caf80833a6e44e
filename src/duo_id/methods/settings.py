"""Settings of all methods: see conf/method/. `method=NAME` chooses one.

What imports torch is imported where it is used, so that mistakes in settings are answered at once.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig
from pydantic import Field

from duo_id.attention.choices import BLEND_NAMES
from duo_id.common.config import (
    Count,
    Fraction,
    Named,
    Number,
    Positive,
    PositiveWeight,
    Several,
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
from duo_id.methods.base_settings import MethodSettings, ScoreSettings, Tokens, WithObjective, check_pair
from duo_id.methods.choices import GATE_NAMES, PENALTY_NAMES
from duo_id.step.choices import check_weight, objective_weights

if TYPE_CHECKING:
    import torch


LEAST_TEMPERATURE = 1e-3  # of gates
InnerFraction = Annotated[Number, Field(gt=0, lt=1)]


@settings("method")
class AttentionSettings(ScoreSettings):
    """Scores read off the attention weights of full attention."""

    reduction: Literal["max", "mean"] = "max"  # of the query heads that share a KV head


@settings("method")
class SaliencySettings(WithObjective, ScoreSettings):
    """How much an objective changes with each gate, by backward passes."""

    kind: Literal["gradient", "fisher"] = "gradient"
    objective: Named = "kl"  # a name, or weights of several
    tokens: Tokens = "labelled"
    at: Some[Fraction] = field(default_factory=lambda: [1.0])  # values of all gates

    def __post_init__(self) -> None:
        """Check what goes together."""
        needs_teacher = self.needs_teacher()
        check(
            self.kind == "fisher" or not needs_teacher or any(value < 1 for value in self.at),
            f"method.at={self.at}: at 1 the student equals the teacher, so the gradient of method.objective="
            f"{self.objective} is 0; add smaller values, or choose method.objective=next_token or method.kind=fisher",
        )


@settings("method")
class SearchSettings(WithObjective, ScoreSettings):
    """Search over masks: heads are closed or opened one after the other by the loss that results."""

    devices = "one"

    strategy: Literal["elimination", "selection"] = "elimination"
    objective: Named = "kl"
    tokens: Tokens = "labelled"
    start: Named = None  # another method's settings, or a saved pattern: only the heads around the budget are searched
    between: Some[Fraction] = field(default_factory=lambda: [0.0, 1.0])  # sparsities between which heads are searched
    heads_per_round: Positive = 1
    swap_at: InnerFraction | None = None  # a sparsity whose mask is refined by exchanging heads
    max_swaps: Count = 0
    swap_width: Positive = 8  # heads on either side that are paired in a round of exchanges
    batch_tokens: Positive | None = None  # tokens of all candidates in one forward; null: what fits the device

    def __post_init__(self) -> None:
        """Check what goes together."""
        objective_weights(self.objective)
        check_pair("between", self.between)
        check(
            self.start is not None or self.between == [0.0, 1.0],
            f"method.between={self.between} needs method.start: without one all heads are searched",
        )
        if self.max_swaps:
            check(self.swap_at is not None, f"method.max_swaps={self.max_swaps} needs method.swap_at=SPARSITY")
        if self.swap_at is not None:
            check(self.max_swaps > 0, f"method.swap_at={self.swap_at} needs method.max_swaps=NUMBER, of exchanges")
        self.start = _typed_order("start", self.start, self)
        self.needs_teacher()  # imports an objective of the user's own, after what costs nothing


@settings("method")
class SpanSettings(WithObjective, ScoreSettings):
    """How far each head must see: spans within budgets, priced by backward passes."""

    devices = "one"

    samples: Count = 48  # 0: curvature alone
    objective: Named = "kl"  # a name, or weights of several
    tokens: Tokens = "labelled"
    levels: Several[Positive] = field(default_factory=list)  # spans in tokens; none: half the recent size, doubled
    budgets: Some[Fraction] = field(default_factory=lambda: [0.08, 0.6])  # shares of the cache, drawn log-uniformly
    curvature_samples: Positive = 16  # the longest; their curvature at full attention prices spans at first
    start: Named = None  # another method's settings, or a saved pattern: its order of the heads is the first one

    def __post_init__(self) -> None:
        """Check what goes together."""
        objective_weights(self.objective)
        check_pair("budgets", self.budgets)
        check(self.budgets[0] > 0, f"method.budgets={self.budgets}: no cache is that small, give shares above 0")
        self.levels = sorted(set(self.levels))
        check(
            self.needs_teacher(),
            f"method.objective={self.objective} compares with nothing: spans are priced by the distance from full "
            "attention, so choose method.objective=kl or another with a teacher",
        )
        self.start = _typed_order("start", self.start, self)

    def levels_up_to(self, longest: int) -> tuple[int, ...]:
        """The spans to choose among on samples of up to `longest` tokens, ascending, -1 (all tokens) last.

        Raises:
            UserError: all samples fit the smallest.
        """
        doubled = [self.recent_size * 2**power // 2 for power in range(64)]
        levels = [span for span in self.levels or doubled if 0 < span < longest - self.sink_size]
        check(
            bool(levels),
            f"data.length_max: samples of {longest} tokens fit the sink and the smallest span; lower "
            f"{'method.levels' if self.levels else 'method.recent_size'}",
        )
        return (*levels, -1)


@settings("method")
class GateSettings(WithObjective, MethodSettings):
    """Gate training. Each of blend, gate, penalty and objective names one small function or class."""

    devices = "shared"

    blend: Annotated[Text, one_of(BLEND_NAMES)] = "student"
    gate: Annotated[Text, one_of(GATE_NAMES)] = "clamp"
    penalty: Named = "l1"  # a name, or weights of several
    objective: Named = "hidden_l2"  # a name, or weights of several
    tokens: Tokens = "labelled"
    initial: Fraction = 1.0  # openness of all gates at first
    prior: Named = None  # another method's settings, or a saved pattern: its order is mixed into the scores
    prior_weight: Annotated[PositiveWeight, Field(description="method.prior=null does without")] = (
        0.05  # of a head's rank in that order, from 0 to 1, relative to its own score
    )
    temperature: Annotated[Number, Field(ge=LEAST_TEMPERATURE, le=1e9, description="below, no gate would move")] = (
        1.0  # of sigmoid and nested gates
    )
    budgets: Some[Fraction] = field(default_factory=lambda: [0.4, 0.97])  # of nested gates: the sparsities drawn
    reg_weight: Weight = 0.05  # of the penalty
    target_sparsity: Fraction | None = None  # of penalty=target
    target_rise: Fraction = 0.5  # fraction of the steps over which the target rises from 0
    multiplier_lr: PositiveWeight = 0.05  # of the target's multipliers
    lr: PositiveWeight = 0.02
    warmup: Annotated[Number, Field(ge=0, le=0.5)] = 0.2  # fraction of the steps over which the learning rate rises at
    # the start, and falls at the end
    floor: Fraction = 0.1  # lowest learning rate, as a fraction of lr
    optimizer: dict[str, Any] = field(default_factory=dict)  # `_target_` and its arguments, without the parameters

    def __post_init__(self) -> None:
        """Check that the settings go together."""
        objective_weights(self.objective)
        check(
            bool(self.penalty) and isinstance(self.penalty, str | Mapping),
            f"method.penalty={shown(self.penalty)}: choose one of {', '.join(PENALTY_NAMES)}, or weights of several "
            "such as {l1: 1, binary: 0.1}",
        )
        for name, weight in self.penalties.items():
            check(name in PENALTY_NAMES, f"method.penalty={shown(name)}: choose one of {', '.join(PENALTY_NAMES)}")
            check_weight(weight, f"method.penalty.{name}")
        if self.gate == "nested":
            self._check_nested()
        self.prior = _typed_order("prior", self.prior, self)
        check(
            not isinstance(self.prior, GateSettings),
            "method@method.prior=NAME: nested and duo cannot be named, a prior comes from a method without gates; to "
            "use other gates give the folder of their run, method.prior=DIR",
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
        needs_teacher = self.needs_teacher()  # imports an objective of the user's own, after what costs nothing
        check(
            self.blend != "teacher" or needs_teacher,
            f"method.blend=teacher needs a teacher pass, and method.objective={self.objective} has none: choose "
            "method.blend=student",
        )

    def _check_nested(self) -> None:
        check_pair("budgets", self.budgets)
        check(
            self.budgets[0] < 1 and self.budgets[1] > 0,
            f"method.budgets={self.budgets} opens all heads or none: give sparsities such as method.budgets=[0.4,0.97]",
        )
        check(
            self.penalty == "l1" and self.reg_weight == 0,
            f"method.penalty={self.penalty} with method.reg_weight={self.reg_weight}: method.gate=nested has no "
            "penalty, since method.budgets sets how many heads are open; choose method=nested without these, or "
            "another method.gate",
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
    "replay_gradient": AttentionSettings,
    "saliency": SaliencySettings,
    "search": SearchSettings,
    "spans": SpanSettings,
    "random": MethodSettings,
}


def method_settings(config: DictConfig | Mapping[str, Any]) -> MethodSettings:
    """The typed settings of the method that a config names.

    Raises:
        UserError: there is no such method, or a setting is unknown, of the wrong type or out of range.
    """
    values = resolve(config)
    check(isinstance(values, Mapping), f"method={shown(values)}: choose one of conf/method/")
    name = values.get("name")
    exists = isinstance(name, str) and name in METHODS
    check(exists, f"method.name={shown(name)}: choose one of {', '.join(METHODS)}")
    return parse(METHODS[str(name)], values)


def make_optimizer(method: GateSettings, parameters: "Iterable[torch.nn.Parameter]") -> "torch.optim.Optimizer":
    """The configured optimizer over these parameters.

    Raises:
        UserError: it cannot be created, or is not an optimizer.
    """
    import torch

    optimizer = instantiate("method.optimizer", method.optimizer, parameters)
    check(
        isinstance(optimizer, torch.optim.Optimizer),
        f"method.optimizer={shown(method.optimizer)} is not an optimizer: give method.optimizer._target_, such as "
        "torch.optim.AdamW",
    )
    return optimizer


def nested_override(key: str) -> str:
    """The override that sets `method.KEY` to another method; only `prior` is in the defaults, so others need a +."""
    return f"{'' if key == 'prior' else '+'}method@method.{key}"


def name_nested_override(key: str, message: str) -> str:
    """Rewrite a nested method's error to name the overrides of `method.KEY`.

    The window is that of the outer method, so its overrides stay.
    """
    nested = re.sub(r"method\.(?!sink_size|recent_size)", f"method.{key}.", message)
    return nested.replace("method=", f"method@method.{key}=")


def _typed_order(key: str, order: Any, method: MethodSettings) -> Any:
    """Type a `method.start` or `method.prior`; another method's settings get the outer method's window."""
    if not isinstance(order, Mapping):
        check(
            order is None or isinstance(order, MethodSettings) or (isinstance(order, str) and bool(order.strip())),
            f"method.{key}={order!r}: give the folder of a run, or another method, {nested_override(key)}=NAME",
        )
        return order
    window = {"sink_size": method.sink_size, "recent_size": method.recent_size}
    try:
        return method_settings({**order, **window})
    except UserError as error:
        message = name_nested_override(key, str(error))
        raise UserError(message if message != str(error) else f"method.{key}.{error}") from error
