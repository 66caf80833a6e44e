"""Contenders: names, budgets in bytes, windows; and a pattern's window must be shorter than the contexts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from duo_id import HeadMask, HeadSpans, SpanNeeds
from duo_id.common.errors import UserError
from duo_id.data.settings import HaystackSettings
from duo_id.evaluate.contenders import (
    Contender,
    check_shares,
    check_windows,
    contenders,
    kept_tokens,
    warn_of_other_weights,
    warn_of_short_contexts,
)
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.settings import EvaluateSettings, EvaluationDataSettings
from duo_id.models.settings import ModelSettings
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.random_masks import random_mask
from duo_id.report.rows import KINDS

FOUND = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=16)
OTHER = HeadPattern(torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.8, 0.4]]), sink_size=2, recent_size=8)
NEEDY = replace(FOUND, needs=SpanNeeds((8, 40, -1), torch.tensor([[[9.0, 3.0, 0.0], [2.0, 1.5, 0.0]]] * 3)))
TOKENS = 1000


def test_all_contenders_are_named_once() -> None:
    lineup = contenders({"found": FOUND, "other": OTHER}, [0.25, 0.5], 2, ["streaming", "window"], 7)
    assert [contender.key for contender in lineup] == [
        ("full", "full", 0.0, None, None),
        *[("pattern", name, sparsity, None, None) for name in ("found", "other") for sparsity in (0.25, 0.5)],
        *[("baseline", "random", sparsity, seed, None) for sparsity in (0.25, 0.5) for seed in (7, 8)],
        *[
            ("baseline", name, sparsity, None, None)
            for name in ("streaming", "window")
            for sparsity in (0.25, 0.5, 1.0)
        ],
    ]
    masks = {contender.key: contender.mask(TOKENS) for contender in lineup}
    assert bool(masks["full", "full", 0.0, None, None].retrieval.all())
    assert masks["pattern", "other", 0.5, None, None] == OTHER.binarize(sparsity=0.5)
    assert masks["baseline", "random", 0.5, 8, None] == random_mask(3, 2, 0.5, 8, sink_size=4, recent_size=16)
    assert all(contender.describe()["heads"] == contender.heads for contender in lineup)


@pytest.mark.parametrize("tokens", [10, 20, 21, 1000])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 1.0])
def test_baselines_have_the_bytes_of_the_mask(sparsity: float, tokens: int) -> None:
    by_key = {
        contender.key: contender
        for contender in contenders({"found": FOUND}, [0.25, 0.5], 0, ["streaming", "window"], 0)
    }
    mask = FOUND.binarize(sparsity=sparsity)
    streaming = int((~mask.retrieval).sum())
    budget = (6 - streaming) * tokens + streaming * min(tokens, 20)
    for name, sink in (("streaming", 4), ("window", 0)):
        baseline = by_key["baseline", name, sparsity, None, None].mask(tokens)
        assert not baseline.retrieval.any()
        assert baseline.sink_size == sink
        tokens_kept = 6 * min(tokens, baseline.sink_size + baseline.recent_size)
        assert abs(tokens_kept - budget) <= 3, "half a token a head"


def test_layers_without_gates_are_left_alone() -> None:
    hybrid = HeadPattern(torch.rand(3, 2), 4, 16, gated_layers=(0, 2))
    for contender in contenders({"hybrid": hybrid}, [0.5], 3, ["streaming"], 0):
        mask = contender.mask(TOKENS)
        assert mask.gated_layers == (0, 2)
        assert bool(mask.retrieval[1].all())


def test_kept_tokens_by_hand() -> None:
    assert kept_tokens(0.5, 1000, 20) == 510
    assert kept_tokens(0.25, 1000, 20) == 755
    assert kept_tokens(1, 1000, 20) == 20
    assert kept_tokens(0.5, 10, 20) == 20, "a mask has room for its window"


def at_shares(pattern: HeadPattern, caches: list[float], **changes: Any) -> dict[tuple, Contender]:
    arguments = {"sparsities": [], "random_masks": 1, "baselines": ["streaming", "window"], "seed": 7} | changes
    lineup = contenders({"found": pattern}, **arguments, caches=caches)
    return {contender.key: contender for contender in lineup}


def kept_by(heads: HeadMask | HeadSpans, tokens: int) -> int:
    """Tokens of all gated heads together."""
    gated = heads.spans[list(heads.gated_layers)].flatten().tolist()
    return sum(tokens if span == -1 else min(tokens, heads.sink_size + span) for span in gated)


def test_contenders_at_a_share_of_the_cache_are_named_once() -> None:
    by_key = at_shares(NEEDY, [0.5, 0.25])
    assert list(by_key)[1:] == [
        (kind, name, None, seed, cache)
        for cache in (0.5, 0.25)
        for kind, name, seed in (
            ("spans", "found", None),
            ("pattern", "found", None),
            ("baseline", "random", 7),
            ("baseline", "streaming", None),
            ("baseline", "window", None),
        )
    ]
    spans = by_key["spans", "found", None, None, 0.25]
    assert spans.note == "sink 4, and for each head 8, 40 or all tokens, by what it needs"
    assert spans.describe() == {
        "kind": "spans",
        "heads": "found",
        "sparsity": None,
        "seed": None,
        "cache": 0.25,
        "note": spans.note,
    }
    assert not any(key[0] == "spans" for key in at_shares(FOUND, [0.5])), "without needs there is nothing to choose by"
    both = at_shares(FOUND, [0.5], sparsities=[0.5])
    assert ("pattern", "found", 0.5, None, None) in both
    assert ("pattern", "found", None, None, 0.5) in both


@pytest.mark.parametrize("tokens", [100, 777, 1000])
@pytest.mark.parametrize("cache", [0.25, 0.5, 0.8])
def test_a_share_is_kept_by_all_to_a_head(cache: float, tokens: int) -> None:
    for contender in list(at_shares(NEEDY, [cache]).values())[1:]:
        kept = kept_by(contender.mask(tokens), tokens)
        assert kept <= cache * 6 * tokens, contender.key
        one_more = 6 if contender.heads in ("streaming", "window") else tokens - 20
        assert kept + one_more > cache * 6 * tokens, contender.key


def test_what_keeps_a_share() -> None:
    by_key = {key[:2]: contender.mask(TOKENS) for key, contender in at_shares(NEEDY, [0.4]).items()}
    assert by_key["spans", "found"] == NEEDY.allocate(cache=0.4, length=TOKENS)
    mask = by_key["pattern", "found"]
    assert isinstance(mask, HeadMask), "two kinds of heads, in the order of the scores"
    assert mask == FOUND.binarize(sparsity=4 / 6)
    assert by_key["baseline", "random"] == random_mask(3, 2, 4 / 6, 7, sink_size=4, recent_size=16)
    assert (by_key["baseline", "streaming"].sink_size, by_key["baseline", "streaming"].recent_size) == (4, 396)
    assert (by_key["baseline", "window"].sink_size, by_key["baseline", "window"].recent_size) == (0, 400)


@pytest.mark.filterwarnings("error")
def test_a_context_too_short_for_the_share_keeps_the_smallest_window() -> None:
    for tokens, smallest in ((40, {"spans": 12, "pattern": 20, "baseline": 20}), (9, dict.fromkeys(KINDS, 9))):
        for key, contender in list(at_shares(NEEDY, [0.25], baselines=[]).items())[1:]:
            assert kept_by(contender.mask(tokens), tokens) == 6 * smallest[key[0]]


def test_shares_that_no_length_can_keep_are_refused() -> None:
    check_shares({"found": NEEDY}, [0.5, 0.25], [100, 1000])
    with pytest.raises(
        UserError, match=r"heads of found: cache=0.01 at length=1000 .*at least 0.012; or raise lengths"
    ):
        check_shares({"found": NEEDY}, [0.5, 0.01], [2000, 1000])
    with pytest.raises(UserError, match=r"cache=0.015 at length=1000 .*smallest span, 16 tokens.* at least 0.02"):
        check_shares({"found": NEEDY}, [0.015], [1000])


def test_a_window_as_long_as_the_context_is_refused() -> None:
    items = [Item("t", 30, 0, (1,) * size, (Question((1,), (1,)),)) for size in (10, 20)]
    check_windows({"other": OTHER}, items)
    with pytest.raises(
        UserError, match=r"longest context has 20 tokens, which all fit in the window of found .* raise lengths"
    ):
        check_windows({"other": OTHER, "found": FOUND}, items)


def test_contexts_too_short_for_a_share_are_counted(recwarn: pytest.WarningsRecorder) -> None:
    window = NEEDY.sink_size + NEEDY.recent_size
    warn_of_short_contexts({"found": NEEDY}, [0.5, 0.25], [4 * window, 10 * window])
    assert not recwarn.list
    short = 3 * window
    with pytest.warns(UserWarning, match=rf"^cache=0\.25: 2 of 3 contexts .* up to 0\.333, .* of {short} tokens$"):
        warn_of_short_contexts({"found": NEEDY}, [0.5, 0.25], [short, short + 1, 10 * window])


@pytest.mark.parametrize(("kvs", "exact"), [(["exact", "int8", "int4"], True), (["int8", "int4"], False)], ids=str)
def test_each_format_has_the_same_masks_beside_full_attention_as_it_is(kvs: list[str], exact: bool) -> None:
    given = {"found": FOUND, "seeds#0": OTHER}
    plain = contenders(given, [0.5], 1, ["streaming"], 0)
    lineup = contenders(given, [0.5], 1, ["streaming"], 0, kvs=kvs)
    assert len({contender.key for contender in lineup}) == len(lineup)
    assert [x.heads for x in lineup if x.kv == "exact"] == [
        x.heads for x in plain if exact or x.kind in ("full", "baseline")
    ]
    codes = [(x.kind, x.heads, x.kv) for x in lineup if x.kv != "exact"]
    assert codes == [
        (kind, name.replace("*", kv), kv)
        for kv in ("int8", "int4")
        for kind, name in (("baseline", "full *"), ("pattern", "found *"), ("pattern", "seeds *#0"))
    ]
    masks = {x.heads: x.mask(TOKENS) for x in lineup}
    assert masks["seeds int4#0"] == OTHER.binarize(sparsity=0.5)
    assert masks["full int8"].retrieval.all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("full", "reserved name", id="full"),
        pytest.param("mine int4", "rows of kv=int4 are called so", id="a format"),
    ],
)
def test_names_that_rows_have_anyway_are_refused(name: str, reason: str) -> None:
    given = (
        "heads",
        ModelSettings("tiny", "tiny"),
        EvaluationDataSettings(HaystackSettings()),
        ["short"],
        [9],
        1,
        1,
        [0.5],
        1,
    )
    with pytest.raises(UserError, match=rf"patterns\.{name}: .*{reason}"):
        EvaluateSettings(*given, patterns={name: "other"})
    EvaluateSettings(*given, patterns={"int4": "other", "mine int4x": "other"})


def test_heads_of_other_weights_are_said(recwarn: pytest.WarningsRecorder) -> None:
    found = {kind: replace(NEEDY, provenance={"model": {"weights": kind}}) for kind in ("int8", "gptq")}
    found |= {"plain": replace(NEEDY, provenance={"model": {}}), "unknown": NEEDY}
    warn_of_other_weights(found, "int8")
    assert [str(warning.message) for warning in recwarn] == [
        "heads of gptq were found on gptq weights, and are used on int8 ones",
        "heads of plain were found on unquantised weights, and are used on int8 ones",
    ]
    recwarn.clear()
    warn_of_other_weights(found, None)
    assert [str(warning.message) for warning in recwarn] == [
        f"heads of {kind} were found on {kind} weights, and are used on unquantised ones" for kind in ("int8", "gptq")
    ]
