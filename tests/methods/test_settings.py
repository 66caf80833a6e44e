"""Settings of the methods: every mistake is one line that names the override."""

import math
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from duo_id.common.config import plain
from duo_id.common.errors import UserError
from duo_id.methods.settings import (
    METHODS,
    AttentionSettings,
    GateSettings,
    MethodSettings,
    SaliencySettings,
    ScoreSettings,
    SearchSettings,
    method_settings,
    name_nested_override,
)

WINDOW = {"sink_size": 3, "recent_size": 8}
NESTED = {"gate": "nested", "reg_weight": 0}


def settings(name: Any, **changes: Any) -> Any:
    return method_settings(OmegaConf.create({"name": name, **WINDOW, **changes}))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_name_and_window(name: str) -> None:
    changes = {"at": [0.5]} if name == "saliency" else {}
    typed = settings(name, **changes)
    assert type(typed) is METHODS[name]
    assert (typed.name, typed.sink_size, typed.recent_size) == (name, 3, 8)
    assert method_settings(OmegaConf.create(plain(typed))) == typed, "as provenance keeps it"


SCORED = [name for name, schema in METHODS.items() if issubclass(schema, ScoreSettings)]
PROFILED = [name for name, schema in METHODS.items() if issubclass(schema, AttentionSettings)]
OBJECTIVES = [name for name, schema in METHODS.items() if hasattr(schema, "objective")]

REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"sink_size": -1}, "method.sink_size=-1 must be at least 0") for name in METHODS),
    *((name, {"recent_size": 0}, "method.recent_size=0 must be at least 1") for name in METHODS),
    *((name, {"samples": 0}, "method.samples=0 must be at least 1") for name in SCORED if name != "spans"),
    *((name, {"reduction": "min"}, "method.reduction=min: choose one of max, mean") for name in PROFILED),
    *((name, {"tokens": "all"}, "method.tokens=all: choose one of labelled, far") for name in OBJECTIVES),
    *((name, {"objective": "l3"}, "method.objective=l3: choose one of hidden_l2, ") for name in OBJECTIVES),
    *((name, {"objective": {"kl": 0}}, "method.objective.kl=0 must be a positive weight") for name in OBJECTIVES),
    *((name, {"objective": {}}, "method.objective={}: choose one of") for name in OBJECTIVES),
    ("saliency", {"kind": "hessian"}, "method.kind=hessian: choose one of gradient, fisher"),
    ("saliency", {"at": [0.5, 1.5]}, "method.at=1.5 must be at most 1"),
    ("saliency", {"at": [-0.1]}, "method.at=-0.1 must be at least 0"),
    ("saliency", {"at": []}, "method.at=[] must be a list of at least one value"),
    ("saliency", {"at": [1.0]}, "method.at=[1.0]: at 1 the student equals the teacher"),
    ("saliency", {"at": [1.0, 1.0], "objective": {"kl": 1, "next_token": 1}}, "method.at=[1.0, 1.0]: at 1 the"),
    ("search", {"strategy": "random"}, "method.strategy=random: choose one of elimination, selection"),
    ("search", {"heads_per_round": 0}, "method.heads_per_round=0 must be at least 1"),
    ("search", {"swap_width": 0}, "method.swap_width=0 must be at least 1"),
    ("search", {"max_swaps": -1}, "method.max_swaps=-1 must be at least 0"),
    ("search", {"batch_tokens": 0}, "method.batch_tokens=0 must be at least 1"),
    (
        "search",
        {"start": "DIR", "between": [0.5]},
        "method.between=[0.5] must be two fractions from 0 to 1, in ascending order",
    ),
    ("search", {"start": "DIR", "between": [0.6, 0.5]}, "method.between=[0.6, 0.5] must be two fractions"),
    ("search", {"start": "DIR", "between": [-0.1, 0.5]}, "method.between=-0.1 must be at least 0"),
    ("search", {"start": "DIR", "between": [0.5, 1.1]}, "method.between=1.1 must be at most 1"),
    ("search", {"between": [0.2, 0.5]}, "method.between=[0.2, 0.5] needs method.start"),
    ("search", {"max_swaps": 3}, "method.max_swaps=3 needs method.swap_at=SPARSITY"),
    ("search", {"swap_at": 0.5}, "method.swap_at=0.5 needs method.max_swaps=NUMBER"),
    ("search", {"swap_at": 0.0}, "method.swap_at=0.0 must be above 0"),
    ("search", {"swap_at": 1.0, "max_swaps": 3}, "method.swap_at=1.0 must be below 1"),
    ("duo", {"blend": "both"}, "method.blend=both: choose one of student, detached, teacher"),
    ("duo", {"gate": "relu"}, "method.gate=relu: choose one of clamp, sigmoid, hard_concrete, straight_through"),
    (
        "duo",
        {"gate": "nested", "reg_weight": 0.1},
        "method.penalty=l1 with method.reg_weight=0.1: method.gate=nested has no penalty",
    ),
    (
        "duo",
        NESTED | {"penalty": "target", "target_sparsity": 0.5},
        "method.penalty=target with method.reg_weight=0",
    ),
    ("duo", NESTED | {"penalty": "binary"}, "method.penalty=binary with method.reg_weight=0"),
    ("duo", NESTED | {"budgets": [0.5]}, "method.budgets=[0.5] must be two fractions from 0 to 1, in ascending order"),
    ("duo", NESTED | {"budgets": [0.9, 0.4]}, "method.budgets=[0.9, 0.4] must be two fractions"),
    ("duo", NESTED | {"budgets": [-0.1, 0.4]}, "method.budgets=-0.1 must be at least 0"),
    ("duo", NESTED | {"budgets": [0.4, 1.1]}, "method.budgets=1.1 must be at most 1"),
    ("duo", NESTED | {"budgets": [[0.1], 0.5]}, "method.budgets=[0.1] must be a number"),
    ("duo", NESTED | {"budgets": [0, 0]}, "method.budgets=[0.0, 0.0] opens all heads or none"),
    ("duo", NESTED | {"budgets": [1, 1]}, "method.budgets=[1.0, 1.0] opens all heads or none"),
    ("duo", {"penalty": "l2"}, "method.penalty=l2: choose one of l1, binary, target"),
    ("duo", {"penalty": {"l1": 1, "l2": 1}}, "method.penalty=l2: choose one of l1, binary, target"),
    ("duo", {"penalty": ["l1"]}, "method.penalty=['l1']: choose one of l1, binary, target, or weights"),
    ("duo", {"objective": ["kl", "next_token"]}, "method.objective=['kl', 'next_token'] must be a name, or weights"),
    ("saliency", {"objective": ["kl"]}, "method.objective=['kl'] must be a name, or weights"),
    ("duo", {"penalty": {"l1": 0}}, "method.penalty.l1=0 must be a positive weight"),
    ("duo", {"penalty": {"l1": "much"}}, "method.penalty.l1=much must be a positive weight"),
    ("duo", {"penalty": {"l1": None}}, "method.penalty.l1=None must be a positive weight"),
    ("duo", {"penalty": {}}, "method.penalty={}: choose one of l1, binary, target, or weights"),
    ("duo", {"penalty": None}, "method.penalty=null: choose one of"),
    ("duo", {"penalty": 3}, "method.penalty=3: choose one of"),
    ("duo", {"initial": 1.1}, "method.initial=1.1 must be at most 1"),
    ("duo", {"initial": -0.1}, "method.initial=-0.1 must be at least 0"),
    ("duo", {"target_rise": 1.1}, "method.target_rise=1.1 must be at most 1"),
    ("duo", {"target_rise": -0.1}, "method.target_rise=-0.1 must be at least 0"),
    ("duo", {"reg_weight": -1}, "method.reg_weight=-1 must be at least 0"),
    ("duo", {"lr": 0}, "method.lr=0 must be above 0"),
    ("duo", {"lr": "nan"}, "method.lr=nan must be a finite number"),
    ("duo", {"temperature": 0}, "method.temperature=0 must be at least 0.001; below, no gate would move"),
    ("duo", {"temperature": "inf"}, "method.temperature=inf must be a finite number"),
    ("duo", {"temperature": "nan"}, "method.temperature=nan must be a finite number"),
    ("duo", {"multiplier_lr": 0}, "method.multiplier_lr=0 must be above 0"),
    ("duo", {"warmup": 0.6}, "method.warmup=0.6 must be at most 0.5"),
    ("duo", {"warmup": -0.1}, "method.warmup=-0.1 must be at least 0"),
    ("duo", {"floor": 1.1}, "method.floor=1.1 must be at most 1"),
    ("duo", {"floor": -0.1}, "method.floor=-0.1 must be at least 0"),
    ("duo", {"blend": "teacher", "objective": "next_token"}, "method.blend=teacher needs a teacher pass"),
    ("duo", {"penalty": "target"}, "method.penalty=target needs method.target_sparsity, a fraction"),
    ("duo", {"penalty": "target", "target_sparsity": 1.5}, "method.target_sparsity=1.5 must be at most 1"),
    ("duo", {"penalty": {"l1": 1, "target": 1}}, "method.penalty=target needs method.target_sparsity"),
    (
        "duo",
        {"penalty": "target", "target_sparsity": 0.5, "reg_weight": 0},
        "method.penalty=target cannot reach its target with method.reg_weight=0",
    ),
    ("duo", {"target_sparsity": 0.5}, "method.target_sparsity=0.5 needs method.penalty=target"),
    ("lora", {}, "method.name=lora: choose one of duo, "),
    ("duo", {"samples": 8}, "method.samples=8: there is no such setting"),
    ("random", {"lr": 8}, "method.lr=8: there is no such setting"),
    ("duo", {"lr": "fast"}, "method.lr=fast must be a number"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS, ids=[f"{n}-{c}" for n, c, _ in REFUSALS])
def test_refusals(name: str, changes: dict[str, Any], message: str) -> None:
    if name == "saliency" and "at" not in changes:
        changes = {"at": [0.5]} | changes
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        settings(name, **changes)
    assert "\n" not in str(error.value)


def test_a_method_without_a_name() -> None:
    for config in ({}, {"name": None, **WINDOW}):
        with pytest.raises(UserError, match=r"^method\.name=null: choose one of duo, nested, attention_profile"):
            method_settings(OmegaConf.create(config))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("saliency", {"at": [1.0], "kind": "fisher"}),
        ("saliency", {"at": [1.0], "objective": "next_token"}),
        ("saliency", {"at": [1.0, 0.9]}),
        ("saliency", {"at": 0.5}),
        ("saliency", {"at": [0.0]}),
        ("search", {"start": "DIR", "between": [0.5, 0.5]}),
        ("search", {"swap_at": 0.5, "max_swaps": 3}),
        ("duo", {"blend": "detached", "objective": "next_token"}),
        ("duo", {"blend": "teacher", "objective": {"next_token": 1, "kl": 1}}),
        ("duo", {"penalty": "target", "target_sparsity": 0.0}),
        ("duo", {"penalty": {"l1": 1, "target": 1}, "target_sparsity": 1.0}),
        ("duo", {"reg_weight": 0}),
    ],
    ids=str,
)
def test_valid_combinations(name: str, changes: dict[str, Any]) -> None:
    typed = settings(name, **changes)
    assert (typed.sink_size, typed.recent_size) == (3, 8)


def test_penalties_are_weights() -> None:
    assert settings("duo").penalties == {"l1": 1.0}
    assert settings("duo", penalty={"l1": 1, "binary": 0.5}).penalties == {"l1": 1, "binary": 0.5}


def test_a_start_or_prior_is_a_method_over_the_same_window() -> None:
    order_config = {"name": "duo", "sink_size": 99, "recent_size": 98, "lr": 0.5}
    typed = settings("search", start=order_config, between=[0.2, 0.5])
    assert isinstance(typed, SearchSettings)
    assert isinstance(typed.start, GateSettings)
    assert (typed.start.sink_size, typed.start.recent_size, typed.start.lr) == (3, 8, 0.5)
    order_config = {"name": "reconstruction", "sink_size": 99, "recent_size": 98, "samples": 2}
    gates = settings("duo", prior=order_config)
    assert isinstance(gates, GateSettings)
    assert isinstance(gates.prior, AttentionSettings)
    assert (gates.prior.sink_size, gates.prior.recent_size, gates.prior.samples) == (3, 8, 2)
    assert settings("duo", prior="outputs/run").prior == "outputs/run"
    assert settings("search").start is settings("duo").prior is None
    assert settings("search", start="outputs/run").start == "outputs/run"


def test_starts_may_be_nested() -> None:
    inner = {"name": "search", "start": {"name": "saliency", "at": [0.5]}, "between": [0.1, 0.9]}
    typed = settings("search", start=inner, between=[0.2, 0.5])
    assert isinstance(typed.start, SearchSettings)
    assert isinstance(typed.start.start, SaliencySettings)
    assert (typed.start.between, typed.start.start.at) == ([0.1, 0.9], [0.5])
    assert (typed.start.start.sink_size, typed.start.start.recent_size) == (3, 8)
    assert type(settings("search", start={"name": "random"}).start) is MethodSettings


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"name": "duo", "lr": -1}, "method.start.lr=-1 must be above 0"),
        ({"name": "duo", "lr": "fast"}, "method.start.lr=fast must be a number"),
        ({"name": "duo", "samples": 3}, "method.start.samples=3: there is no such setting"),
        ({"name": "lora"}, "method.start.name=lora: choose one of duo"),
        ({}, "method.start.name=null: choose one of duo"),
        ({"name": "saliency", "at": [1.0]}, "method.start.at=[1.0]: at 1 the student"),
        ({"name": "search", "between": [0.1, 0.5]}, "method.start.between=[0.1, 0.5] needs method.start.start"),
        ({"name": "search", "start": {"name": "duo", "lr": 0}}, "method.start.start.lr=0 must be above 0"),
    ],
    ids=str,
)
def test_mistakes_in_a_start_or_prior_name_its_override(start: dict[str, Any], message: str) -> None:
    for name, key in ("search", "start"), ("duo", "prior"):
        named = re.escape(message.replace("method.start", f"method.{key}"))
        with pytest.raises(UserError, match=f"^{named}") as error:
            settings(name, **{key: start})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": {"name": "duo"}}, "method@method.prior=NAME: nested and duo cannot be named"),
        ({"prior": "DIR", "prior_weight": 0}, "method.prior_weight=0 must be above 0; method.prior=null"),
        ({"prior_weight": math.inf}, "method.prior_weight=inf must be a finite number"),
        ({"prior_weight": math.nan}, "method.prior_weight=nan must be a finite number"),
        ({"prior": ""}, "method.prior='': give the folder of a run, or another method, method@method.prior=NAME"),
        ({"prior": 5}, "method.prior=5: give the folder of a run, or another method, method@method.prior=NAME"),
    ],
    ids=str,
)
def test_mistakes_in_a_prior_name_what_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        settings("duo", **changes)


def test_errors_of_a_nested_method_name_its_overrides_except_for_the_window() -> None:
    message = "method=saliency: raise data.length_min, or lower method.recent_size, or method.samples=8"
    named = (
        "method@method.start=saliency: raise data.length_min, or lower method.recent_size, or method.start.samples=8"
    )
    assert name_nested_override("start", message) == named
    assert name_nested_override("prior", message) == named.replace("start", "prior")
