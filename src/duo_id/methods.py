"""The settings of every way to identify heads: see conf/method/. `method=NAME` chooses one."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from duo_id.attention.blends import BLENDS
from duo_id.config import MethodSettings, TrainSettings, parse, require
from duo_id.errors import UserError
from duo_id.foreign import literal
from duo_id.gates import GATES
from duo_id.objectives import make_objective
from duo_id.penalties import PENALTIES

TOKENS = ("labelled", "far")  # which tokens an objective looks at, see `duo_id.distillation`
REDUCTIONS = ("max", "mean")  # of the query heads that share a KV head
COLDEST = 1e-3  # the least temperature of gates
STRATEGIES = ("elimination", "selection")
KINDS = ("gradient", "fisher")


@dataclass
class ScoreSettings(MethodSettings):
    """Methods that look at some training samples without training."""

    samples: int = 8

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require(self.samples >= 1, f"method.samples={self.samples} must be at least 1")


@dataclass
class AttentionSettings(ScoreSettings):
    """Scores that are read off the attention weights of the full model."""

    reduction: str = "max"

    def __post_init__(self) -> None:
        """Check names."""
        super().__post_init__()
        _choose("reduction", self.reduction, REDUCTIONS)


@dataclass
class SaliencySettings(ScoreSettings):
    """How much an objective changes with each gate, from backward passes."""

    kind: str = "gradient"
    objective: Any = "kl"  # a name, or weights of several
    tokens: str = "labelled"
    at: list[float] = field(default_factory=lambda: [1.0])  # where all gates stand

    def __post_init__(self) -> None:
        """Check names and ranges."""
        super().__post_init__()
        _choose("kind", self.kind, KINDS)
        _choose("tokens", self.tokens, TOKENS)
        objective = make_objective(self.objective)
        for value in self.at:
            require(0 <= value <= 1, f"method.at={value} must lie in [0, 1]")
        require(bool(self.at), "method.at=[] must name at least one value, such as method.at=[1.0]")
        require(
            self.kind == "fisher" or not objective.teacher or any(value < 1 for value in self.at),
            f"method.at={self.at}: at 1 the student is the teacher, so the gradient of method.objective="
            f"{self.objective} is 0 there; add smaller values, or choose method.objective=next_token or "
            "method.kind=fisher",
        )


@dataclass
class SearchSettings(ScoreSettings):
    """Trying masks: heads are closed or opened one after the other by what that costs."""

    strategy: str = "elimination"
    objective: Any = "kl"
    tokens: str = "labelled"
    start: Any = None  # another method's settings, or a saved pattern: only the heads around the budget are searched
    between: list[float] = field(default_factory=lambda: [0.0, 1.0])  # sparsities of the start that are searched
    heads_per_round: int = 1
    swap_at: float | None = None  # a sparsity whose mask is refined by exchanging heads
    max_swaps: int = 0
    swap_width: int = 8  # heads on either side of an exchange that are tried with each other
    batch_tokens: int | None = None  # tokens of all candidates in one forward; null: what fits the device

    def __post_init__(self) -> None:
        """Check names and ranges."""
        super().__post_init__()
        _choose("strategy", self.strategy, STRATEGIES)
        _choose("tokens", self.tokens, TOKENS)
        make_objective(self.objective)
        for key in ("heads_per_round", "swap_width"):
            require(getattr(self, key) >= 1, f"method.{key}={getattr(self, key)} must be at least 1")
        require(self.max_swaps >= 0, f"method.max_swaps={self.max_swaps} must not be negative")
        require(
            self.batch_tokens is None or self.batch_tokens >= 1,
            f"method.batch_tokens={self.batch_tokens} must be at least 1",
        )
        between = list(self.between)
        require(
            len(between) == 2 and 0 <= between[0] <= between[1] <= 1,
            f"method.between={between} must be two fractions, in this order",
        )
        require(
            self.start is not None or between == [0.0, 1.0],
            f"method.between={between} needs method.start: without one all heads are searched",
        )
        if self.max_swaps:
            require(self.swap_at is not None, f"method.max_swaps={self.max_swaps} needs method.swap_at=SPARSITY")
        if self.swap_at is not None:
            require(0 < self.swap_at < 1, f"method.swap_at={self.swap_at} must lie between 0 and 1")
            require(self.max_swaps > 0, f"method.swap_at={self.swap_at} needs method.max_swaps=NUMBER, of exchanges")
        self.start = _typed_order("start", self.start, self)


@dataclass
class GateSettings(MethodSettings):
    """How gates are trained. Each of blend, gate, penalty and objective names one small function or class."""

    blend: str = "student"
    gate: str = "clamp"
    penalty: Any = "l1"  # a name, or weights of several
    objective: Any = "hidden_l2"  # a name, or weights of several
    tokens: str = "labelled"
    initial: float = 1.0  # how open gates begin
    prior: Any = None  # another method's settings, or a saved pattern: its order has a part in the scores
    prior_weight: float = 0.05  # of a head's place in that order, from 0 to 1, beside its own score
    temperature: float = 1.0  # of sigmoid and nested gates
    budgets: list[float] = field(default_factory=lambda: [0.4, 0.97])  # of nested gates: the sparsities that are drawn
    reg_weight: float = 0.05  # of the penalty
    target_sparsity: float | None = None  # of penalty=target
    target_rise: float = 0.5  # fraction of the steps over which the target rises from 0
    multiplier_lr: float = 0.05  # of the target's multipliers
    lr: float = 0.02
    warmup: float = 0.2  # fraction of the steps over which the learning rate rises, and falls at the end
    floor: float = 0.1  # the learning rate's least fraction
    optimizer: dict[str, Any] = field(default_factory=dict)  # `_target_` and its arguments but the parameters

    def __post_init__(self) -> None:
        """Check names, ranges, and that what is chosen makes sense together."""
        super().__post_init__()
        _choose("blend", self.blend, tuple(BLENDS))
        _choose("gate", self.gate, tuple(GATES))
        _choose("tokens", self.tokens, TOKENS)
        objective = make_objective(self.objective)
        require(
            not isinstance(self.penalty, list),
            f"method.penalty={self.penalty} must be a name, or weights of several such as {{l1: 1, binary: 0.1}}",
        )
        require(
            bool(self.penalties), f"method.penalty={{}}: choose one of {', '.join(PENALTIES)}, or weights of several"
        )
        for name, weight in self.penalties.items():
            _choose("penalty", name, tuple(PENALTIES))
            positive = isinstance(weight, int | float) and weight > 0
            require(positive, f"method.penalty.{name}={weight} must be a positive weight")
        require(0 <= self.initial <= 1, f"method.initial={self.initial} must lie in [0, 1]")
        require(
            0 < self.prior_weight < math.inf,
            f"method.prior_weight={self.prior_weight} must be a positive number; method.prior=null does without",
        )
        require(0 <= self.target_rise <= 1, f"method.target_rise={self.target_rise} must lie in [0, 1]")
        require(self.reg_weight >= 0, f"method.reg_weight={self.reg_weight} must not be negative")
        for key in ("lr", "multiplier_lr"):
            require(getattr(self, key) > 0, f"method.{key}={getattr(self, key)} must be positive")
        require(
            COLDEST <= self.temperature < math.inf,
            f"method.temperature={self.temperature} must be a number from {COLDEST} on: below, no gate would move",
        )
        require(0 <= self.warmup <= 0.5, f"method.warmup={self.warmup} must lie in [0, 0.5]")
        require(0 <= self.floor <= 1, f"method.floor={self.floor} must lie in [0, 1]")
        require(
            self.blend != "teacher" or objective.teacher,
            f"method.blend=teacher needs a teacher pass, which method.objective={self.objective} does without: "
            "choose method.blend=student",
        )
        if self.gate == "nested":
            self._check_nested()
        self.prior = _typed_order("prior", self.prior, self)
        require(
            not isinstance(self.prior, GateSettings),
            "method@method.prior=NAME: nested and duo cannot be named, what has a part in the scores of gates is found "
            "without gates; for the order of others give the folder of their run, method.prior=DIR",
        )
        if "target" in self.penalties:
            require(
                self.target_sparsity is not None and 0 <= self.target_sparsity <= 1,
                f"method.penalty=target needs method.target_sparsity, a fraction, not {self.target_sparsity}",
            )
            require(self.reg_weight > 0, "method.penalty=target cannot reach its target with method.reg_weight=0")
        else:
            require(
                self.target_sparsity is None,
                f"method.target_sparsity={self.target_sparsity} needs method.penalty=target: {self.penalty} cannot "
                "reach a target",
            )

    def _check_nested(self) -> None:
        budgets = list(self.budgets)
        numbers = len(budgets) == 2 and all(isinstance(budget, int | float) for budget in budgets)
        require(
            numbers and 0 <= budgets[0] <= budgets[1] <= 1,
            f"method.budgets={budgets} must be two sparsities between 0 and 1, in this order",
        )
        require(
            budgets[0] < 1 and budgets[1] > 0,
            f"method.budgets={budgets} never decides between heads: give sparsities such as method.budgets=[0.4,0.97]",
        )
        require(
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
    "attention_profile": AttentionSettings,
    "retrieval_score": AttentionSettings,
    "query_score": AttentionSettings,
    "reconstruction": AttentionSettings,
    "saliency": SaliencySettings,
    "search": SearchSettings,
    "random": MethodSettings,
}


OURS = {  # arguments of Lightning's Trainer that a run gives itself, and what to give instead
    "logger": "choose logger=csv, tensorboard or wandb, or ~logger for none",
    "default_root_dir": "a run writes to hydra.run.dir",
    "plugins": "the run has its own, which write checkpoints whole; how devices share the work is step.shard's",
    "use_distributed_sampler": "leave it out, for samples are shared out where they are made",
}


def train_settings(config: DictConfig) -> TrainSettings:
    """The typed settings of a training run, its method's among them.

    Raises:
        UserError: as `parse`.
    """
    settings = parse(TrainSettings, config, method=method_schema(config.method))
    for key, instead in OURS.items():
        require(key not in settings.trainer, f"trainer.{key}={settings.trainer.get(key)}: {instead}")
    require(
        isinstance(settings.method, GateSettings) or not settings.trainer.get("callbacks"),
        f"trainer.callbacks: method={settings.method.name} trains nothing that they could be called at",
    )
    require(
        settings.repeats == 1 or getattr(settings.method, "swap_at", None) is None,
        f"repeats={settings.repeats}: heads are exchanged (method.swap_at) in the mask of one run; the mean of several "
        "has another",
    )
    return settings


def method_settings(config: DictConfig) -> MethodSettings:
    """The typed settings of the method that a config names.

    Raises:
        UserError: there is no such method, or a setting is unknown, of the wrong type or out of range.
    """
    return parse(method_schema(config), config)


def method_schema(config: DictConfig) -> type[Any]:
    """The settings' class of the method that a config names."""
    name = config.get("name")
    require(name in METHODS, f"method.name={name}: choose one of {', '.join(METHODS)}")
    return METHODS[str(name)]


def _choose(key: str, chosen: str, choices: tuple[str, ...]) -> None:
    require(chosen in choices, f"method.{key}={chosen}: choose one of {', '.join(choices)}")


def by_name(key: str) -> str:
    """The override that puts another method at `method.KEY`; gates always have a place for their prior."""
    return f"{'' if key == 'prior' else '+'}method@method.{key}"


def of_order(key: str, message: str) -> str:
    """What is wrong with the order in `method.KEY`, with the overrides that lead there.

    Its windows are those of the method.
    """
    named = re.sub(r"method\.(?!sink_size|recent_size)", f"method.{key}.", message)
    return named.replace("method=", f"method@method.{key}=")


def _typed_order(key: str, given: Any, method: MethodSettings) -> Any:
    """An order that a method is given, typed and with the same windows where it is another method's settings."""
    if not isinstance(given, Mapping):
        require(
            given is None or (isinstance(given, str) and bool(given.strip())),
            f"method.{key}={given!r}: give the folder of a run, or another method, {by_name(key)}=NAME",
        )
        return given
    shared = {"sink_size": method.sink_size, "recent_size": method.recent_size}
    try:
        return method_settings(OmegaConf.create(literal({**given, **shared})))
    except UserError as error:
        named = of_order(key, str(error))
        raise UserError(named if named != str(error) else f"method.{key}.{error}") from error
