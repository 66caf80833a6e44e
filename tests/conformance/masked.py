"""A pytest plug-in for transformers' own tests: every causal language model in them goes under a head mask.

Models get their mask where tests finish building them, in `eval()`. A test that ends in one of our UserErrors counts as
refused; all else that fails is a failure. Where a test looks into a cache, it is asked for what a dual cache has:
layers, length and kind, not the shapes of the tensors within. Attention weights, which are refused under a mask, are
not asked for when a test generates, so that the rest of it is seen. The test of left padding, which in some trees reads
the logits of hidden tokens, gets a mask that hides none: those logits mean nothing. This module is read from its folder
(`-p masked`), since both projects have a package `tests`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from duo_id import DualCache, HeadMask, install
from duo_id.attention.interface import attached
from duo_id.common.errors import UserError
from duo_id.deploy.install import INSTALLED

CAUSAL = frozenset(
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in (names if isinstance(names, tuple) else (names,))
)
WINDOWS = {"full": (1, 1), "wide": (4, 4096), "narrow": (1, 3)}  # sink and recent tokens of streaming heads
MASKS = ("none", *WINDOWS)


def head_mask(model: PreTrainedModel, name: str) -> HeadMask:
    """All heads retrieve (`full`); or every other one streams, over windows that hide nothing (`wide`) or much."""
    with attached(model) as layers:
        pass
    sink, recent = WINDOWS[name]
    retrieval = torch.ones(model.config.get_text_config().num_hidden_layers, layers[0].kv_heads, dtype=torch.bool)
    if name != "full":
        for layer in layers:
            retrieval[layer.index, layer.index % 2 :: 2] = False
    return HeadMask(retrieval, sink, recent, [layer.index for layer in layers])


def either(kind: type[Cache], static: bool) -> type[Cache]:
    """What tests name StaticCache or DynamicCache: dual caches of a length, or that grow, are one too."""

    class Kind(type(kind)):
        def __instancecheck__(cls, instance: object) -> bool:
            dual = isinstance(instance, DualCache) and (instance.max_length is not None) == static
            return dual or isinstance(instance, kind)

    return Kind(kind.__name__, (kind,), {})


def check_cache(check: Callable[..., None]) -> Callable[..., None]:
    """The tests' check of a cache's layers and shapes, for dual caches another one."""
    signature = inspect.signature(check)

    def checked(*given: Any, **named: Any) -> None:
        _, batch_size, cache, seq_length, config = signature.bind(*given, **named).arguments.values()
        if not isinstance(cache, DualCache):
            check(*given, **named)
            return
        text = config.get_text_config(decoder=True)
        assert len(cache) == text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
        assert cache.tokens.lengths.shape == (batch_size,)
        assert (int(cache.get_seq_length()) if cache.max_length is None else cache.max_length) == seq_length

    return checked


@pytest.fixture(autouse=True)
def under_a_mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test builds and sets to eval mode is masked from then on."""
    chosen = os.environ["DUO_ID_CONFORMANCE"]
    if chosen == "none":
        return
    plain = PreTrainedModel.eval

    def masked_eval(model: PreTrainedModel) -> PreTrainedModel:
        plain(model)
        if type(model).__name__ in CAUSAL and not hasattr(model, INSTALLED):
            install(model, head_mask(model, chosen))
        return model

    monkeypatch.setattr(PreTrainedModel, "eval", masked_eval, raising=False)
    name = "_check_past_key_values_for_generate"
    if request.cls is not None and hasattr(request.cls, name):
        monkeypatch.setattr(request.cls, name, check_cache(getattr(request.cls, name)))
        tests = sys.modules["tests.generation.test_utils"]
        monkeypatch.setattr(tests, "StaticCache", either(StaticCache, static=True))
        monkeypatch.setattr(tests, "DynamicCache", either(DynamicCache, static=False))
        monkeypatch.setattr(request.cls, "_check_attentions_for_generate", lambda *given, **named: None)
        monkeypatch.setattr(GenerationMixin, "generate", without_weights(GenerationMixin.generate))
        if "left_padding" in request.node.name:
            inputs = request.cls.prepare_config_and_inputs_for_generate
            monkeypatch.setattr(request.cls, "prepare_config_and_inputs_for_generate", all_real(inputs))


def without_weights(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` that does not ask for attention weights."""

    @functools.wraps(generate)
    def generating(*given: Any, output_attentions: bool | None = None, **named: Any) -> Any:
        return generate(*given, **named)

    return generating


def all_real(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """The tests' inputs, with a mask that hides nothing."""

    def prepared(*given: Any, **named: Any) -> Any:
        config, inputs = prepare(*given, **named)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return config, inputs

    return prepared


def refusal(error: BaseException | None) -> str | None:
    """The UserError that an error is, or that it was made from: compilers wrap what they meet."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """A refusal is an expected failure with our message as its reason."""
    report = yield
    if call.excinfo is not None and report.failed and (message := refusal(call.excinfo.value)) is not None:
        report.outcome, report.wasxfail = "skipped", message
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts, and in which tests each refusal and each failure was met."""
    stats = terminalreporter.stats
    found = {
        "passed": stats.get("passed", []),
        "refused": stats.get("xfailed", []),
        "failed": [*stats.get("failed", []), *stats.get("error", [])],
        "skipped": stats.get("skipped", []),
    }
    terminalreporter.section(f"conformance, mask {os.environ['DUO_ID_CONFORMANCE']}")
    for kind in ("refused", "failed"):
        met: dict[str, list[str]] = defaultdict(list)
        for report in found[kind]:
            met[report.wasxfail if kind == "refused" else _last_line(report)].append(report.nodeid.rpartition("::")[2])
        for message, tests in sorted(met.items(), key=lambda item: -len(item[1])):
            terminalreporter.write_line(f"{len(tests):4d} {kind}: {message}")
            terminalreporter.write_line(f"     in {', '.join(sorted(set(tests)))}")
    terminalreporter.write_line(", ".join(f"{len(reports)} {kind}" for kind, reports in found.items()))


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext.strip().splitlines()[-1]).partition("\n")[0][:200]
