"""Spans hold whole numbers of tokens for the heads of gated layers, and a mask is the case of two values."""

import json
from pathlib import Path

import pytest
import torch

from duo_id import HeadMask, HeadSpans
from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError

SPANS = torch.tensor([[-1, 8], [64, 1], [5, 6]])


def test_layers_without_gates_see_everything() -> None:
    spans = HeadSpans(SPANS, 4, gated_layers=(1, 0))
    assert spans.spans.tolist() == [[-1, 8], [64, 1], [-1, -1]]
    assert spans.spans.dtype == torch.int32
    assert spans.retrieval.tolist() == [[True, False], [False, False], [True, True]]
    assert spans.gated_layers == (0, 1)


def test_spans_are_copied() -> None:
    given = SPANS.clone()
    spans = HeadSpans(given, 4)
    given[0, 1] = 9
    assert spans == HeadSpans(SPANS, 4)
    assert spans != HeadSpans(given, 4)
    assert spans != HeadSpans(SPANS, 3)
    assert spans != HeadSpans(SPANS, 4, (0, 1))


def test_a_mask_is_the_case_of_two_values() -> None:
    mask = HeadMask(torch.tensor([[True, False], [False, True]]), 4, 16)
    assert mask.spans.tolist() == [[-1, 16], [16, -1]]
    assert mask.spans.dtype == torch.int32
    assert HeadSpans(mask.spans, mask.sink_size).retrieval.tolist() == mask.retrieval.tolist()


def test_notebooks_show_the_heatmap_and_the_counts() -> None:
    shown = HeadSpans(SPANS, 4)._repr_html_()
    assert shown.startswith('<img src="data:image/png;base64,')
    assert "1 x all, 1 x 1, 1 x 5" in shown


def test_what_people_see() -> None:
    assert repr(HeadSpans(SPANS, 4, (0, 1))) == (
        "HeadSpans(3 layers x 2 KV heads, sink_size=4, 1 x all, 1 x 1, 1 x 8, 1 x 64)"
    )


@pytest.mark.parametrize(
    ("spans", "sink", "reason"),
    [
        pytest.param([[0]], 4, "the span of layer 0, KV head 0 is 0", id="zero"),
        pytest.param([[8, -2]], 4, "the span of layer 0, KV head 1 is -2", id="negative"),
        pytest.param([[MOST_TOKENS + 1]], 4, "must be from 1 .* to", id="beyond any context"),
        pytest.param([[8.0]], 4, "whole numbers of tokens, not torch.float32", id="float"),
        pytest.param([[True]], 4, "whole numbers of tokens, not torch.bool", id="a mask"),
        pytest.param([8], 4, "must have the shape", id="one dimension"),
        pytest.param([[8], [8, 8]], 4, "spans must be numbers", id="ragged"),
        pytest.param(None, 4, "spans must be numbers", id="none"),
        pytest.param([[2**63]], 4, "spans must be numbers", id="beyond 64 bits"),
        pytest.param([[8]], -1, "sink_size=-1", id="sink"),
    ],
)
def test_what_cannot_be_spans_is_refused(spans: object, sink: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        HeadSpans(spans, sink)  # type: ignore[arg-type]


def test_whole_numbers_of_any_size_are_spans() -> None:
    assert HeadSpans(torch.tensor([[8, -1]], dtype=torch.int16), 4) == HeadSpans(torch.tensor([[8, -1]]), 4)


def test_the_share_of_the_cache_by_hand() -> None:
    spans = HeadSpans(SPANS, 4, gated_layers=(0, 1))
    assert spans.cache_share(100) == (100 + 12 + 68 + 5) / 400
    assert spans.cache_share(10) == (10 + 10 + 10 + 5) / 40
    assert spans.cache_share(1) == 1


@pytest.mark.parametrize("length", [0, -5, 1.5, "8", True, 10**30], ids=str)
def test_a_share_is_that_of_a_length(length: object) -> None:
    with pytest.raises(UserError, match=r"length=.* must be a number of tokens"):
        HeadSpans(SPANS, 4).cache_share(length)  # type: ignore[arg-type]


def test_spans_come_back(tmp_path: Path) -> None:
    spans = HeadSpans(SPANS, 4, gated_layers=(0, 1))
    spans.save(tmp_path / "spans.json")
    assert HeadSpans.from_pretrained(tmp_path / "spans.json") == spans
    contents = json.loads((tmp_path / "spans.json").read_text())
    assert (contents["schema"], contents["version"], contents["sink_size"]) == ("duo_id/spans", 1, 4)
    assert contents["spans"] == spans.spans.tolist()
    assert len((tmp_path / "spans.json").read_text().splitlines()) < 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"schema": "duo_id/heads"}, "holds no attention spans: its schema is 'duo_id/heads'", id="schema"),
        pytest.param({"version": 2}, "has version 2 of its schema, but this duo_id reads version 1", id="version"),
        pytest.param({"spans": [[8, 9]]}, "spans are not those of 3 layers x 2 KV heads", id="shape"),
        pytest.param({"spans": [[8, 9], [8], [8, 9]]}, "spans are not those of 3 layers x 2", id="ragged"),
        pytest.param({"spans": [[8, 0], [8, 9], [8, 9]]}, "the span of layer 0, KV head 1 is 0", id="zero"),
        pytest.param({"spans": [[8, 1.5], [8, 9], [8, 9]]}, "spans.0.1", id="half"),
        pytest.param({"spans": None}, "spans=None is no list", id="null"),
        pytest.param({"sink_size": -1}, "sink_size=-1 must", id="sink"),
        pytest.param({"gated_layers": [3]}, r"gated_layers=\[3\] must name", id="layers"),
        pytest.param({"layers": 0, "spans": []}, "spans.json: ", id="empty"),
    ],
)
def test_malformed_files_are_named(change: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "spans.json"
    HeadSpans(SPANS, 4).save(path)
    contents = json.loads(path.read_text())
    del contents["sha256"]
    path.write_text(json.dumps(contents | change))
    with pytest.raises(UserError, match=reason) as error:
        HeadSpans.from_pretrained(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "spans.json"
    HeadSpans(SPANS, 4).save(path)
    path.write_text(path.read_text().replace("64", "65", 1))
    with pytest.raises(UserError, match="is not what was written"):
        HeadSpans.from_pretrained(path)


def test_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="for 3 layers x 2 KV heads, but tiny has 2 layers x 2 KV heads"):
        HeadSpans(SPANS, 4).check_fits(2, 2, "tiny")
