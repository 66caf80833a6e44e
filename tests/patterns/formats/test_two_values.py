"""Spans become the nearest mask: the same retrieval heads, the same bytes, in every format that holds two values."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duo_id import HeadMask, HeadSpans, SpanNeeds, convert
from duo_id.common.errors import UserError
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.registry import FORMATS
from duo_id.patterns.formats.two_values import as_two_values, nearest_mask
from duo_id.patterns.saved import load_pattern, save_pattern
from tests.patterns.formats.cases import CASES
from tests.test_convert import SUFFIXES

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # of zeros among the gates

LENGTH = 1000
COSTS = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(3)).sort(-1, descending=True)[0]
NEEDY = replace(CASES["hybrid"], needs=SpanNeeds((16, 64, 256, -1), COSTS - COSTS[..., -1:]))
ASKED = Options(cache=0.4, length=LENGTH)


def kept_tokens(heads: HeadMask | HeadSpans, length: int = LENGTH) -> int:
    spans = heads.spans[list(heads.gated_layers)].flatten().tolist()
    return sum(length if span == -1 else min(length, heads.sink_size + span) for span in spans)


@pytest.mark.parametrize("length", [200, 1000, 100_000])
def test_the_nearest_mask_keeps_the_heads_and_the_bytes(length: int) -> None:
    spans = HeadSpans(torch.tensor([[-1, 8], [64, 500], [-1, 9000]]), 4)
    mask = nearest_mask(spans, length, 77)
    assert mask.retrieval.equal(spans.retrieval)
    assert mask.sink_size == 4
    assert abs(kept_tokens(mask, length) - kept_tokens(spans, length)) <= 2, "half a token a head"


def test_the_nearest_mask_of_full_attention_and_of_a_mask() -> None:
    full = HeadSpans(torch.full((2, 2), -1), 4)
    assert nearest_mask(full, 100, 77) == HeadMask(full.retrieval, 4, 77)
    mask = HeadMask(torch.tensor([[True, False], [False, False]]), 4, 16)
    assert nearest_mask(HeadSpans(mask.spans, 4), 100, 77) == mask


def test_the_pattern_of_the_nearest_mask() -> None:
    spans = NEEDY.allocate(0.4, LENGTH)
    mask = nearest_mask(spans, LENGTH, 64)
    written, options, lost = as_two_values(NEEDY, ASKED)
    assert written.binarize(sparsity=options.sparsity) == mask
    assert written.needs is None
    assert written.provenance == NEEDY.provenance | {"spans": {"cache": 0.4, "length": LENGTH}}
    assert lost == ["scores (ranks remain)", f"spans (64 to 256 tokens become recent_size={mask.recent_size})", "needs"]
    order, given = written.scores[[1, 3, 4]].flatten(), NEEDY.scores[[1, 3, 4]].flatten()
    for kind in (mask.retrieval, ~mask.retrieval):
        heads = kind[[1, 3, 4]].flatten()
        assert order[heads].argsort(stable=True).equal(given[heads].argsort(stable=True)), "one kind keeps its order"


def test_without_needs_nothing_is_lost() -> None:
    given = CASES["trained"]
    written, options, lost = as_two_values(given, ASKED)
    assert lost == []
    assert written.scores.equal(given.scores)
    assert written.binarize(sparsity=options.sparsity).spans.equal(given.allocate(0.4, LENGTH).spans)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("heads", "headkv", "permuted-checkpoint")])
def test_every_format_holds_the_nearest_mask(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = replace(NEEDY, gated_layers=tuple(range(6)), needs=SpanNeeds((16, 64, 256, -1), NEEDY.needs.costs))
    mask = nearest_mask(given.allocate(0.4, LENGTH), LENGTH, 64)
    save_pattern(given, tmp_path / "heads")
    target = str(tmp_path / f"theirs{SUFFIXES.get(name, '')}")
    asked = [str(tmp_path / "heads"), target, f"format={name}", "cache=0.4", f"length={LENGTH}"]
    with pytest.raises(UserError, match=rf"format={name} cannot hold .*spans \(.*needs.*: give lossy=true"):
        convert.main(asked)
    assert not Path(target).exists()
    convert.main([*asked, "lossy=true"])
    told = capsys.readouterr().out
    assert f"tokens become recent_size={mask.recent_size})" in told
    sizes = [] if name in ("duo-attention", "lserve") else [f"recent_size={mask.recent_size}"]
    sizes += ["sink_size=16", "kv_heads=3", "layers=6", *["heads=6"] * (name == "qrhead")]
    back = load_pattern(convert.main([target, str(tmp_path / "back"), *sizes]))
    assert back.binarize(sparsity=mask.sparsity) == mask


def test_our_own_folder_keeps_needs_and_spans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pattern(NEEDY, tmp_path / "heads")
    folder = convert.main([str(tmp_path / "heads"), str(tmp_path / "there"), "cache=0.4", f"length={LENGTH}"])
    assert load_pattern(folder) == NEEDY
    assert HeadSpans.from_pretrained(folder / "spans.json") == NEEDY.allocate(0.4, LENGTH)
    assert f"duo_id.HeadSpans.from_pretrained('{folder / 'spans.json'}')" in capsys.readouterr().out
    NEEDY.save(folder)
    assert not (folder / "spans.json").exists()  # nobody asked for any this time


def test_a_refused_budget_writes_nothing(tmp_path: Path) -> None:
    save_pattern(NEEDY, tmp_path / "heads")
    with pytest.raises(UserError, match="cache must be at least"):
        convert.main([str(tmp_path / "heads"), str(tmp_path / "there"), "cache=0.0001", f"length={LENGTH}"])
    assert not (tmp_path / "there" / "heads.json").exists()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        pytest.param("cache=0.4", r"cache is a share of the cache at a length: set length=\.\.\.", id="no length"),
        pytest.param("length=99", r"length is that of a share of the cache: set cache=\.\.\.", id="no cache"),
        pytest.param("cache=0.4 length=99 sparsity=0.5", "sparsity and cache: give one of the two", id="both"),
        pytest.param("cache=0.01 length=1000", "cache=0.01 at length=1000 is less than sink_size=16", id="too small"),
        pytest.param("cache=0 length=1000", r"cache=0.0 must lie in \(0, 1\]", id="none"),
        pytest.param("cache=2 length=1000", "^cache=2 must be at most 1$", id="more than all"),
        pytest.param("cache=0.4 length=1000 format=headkv", "format=headkv shares its budget out by", id="headkv"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: str, reason: str, tmp_path: Path) -> None:
    save_pattern(NEEDY, tmp_path / "heads")
    asked = ["format=kvzip"] * ("format" not in given) + given.split()
    with pytest.raises(UserError, match=reason):
        convert.main([str(tmp_path / "heads"), str(tmp_path / "there"), *asked, "lossy=true"])
    assert not (tmp_path / "there").exists()


def test_needs_are_named_among_what_is_lost(tmp_path: Path) -> None:
    save_pattern(NEEDY, tmp_path / "heads")
    with pytest.raises(UserError, match="format=retrieval-head cannot hold needs, provenance, windows"):
        convert.main([str(tmp_path / "heads"), str(tmp_path / "a.json"), "format=retrieval-head"])
