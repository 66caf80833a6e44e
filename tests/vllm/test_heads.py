"""What DUO_ID_HEADS and `register` take, without vLLM."""

from pathlib import Path

import pytest
import torch

from duo_id import HeadMask, HeadPattern, HeadSpans, load_pattern, save_pattern
from duo_id.common.errors import UserError
from duo_id.vllm.heads import as_spans, read_spans, split_sparsity

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), sink_size=4, recent_size=8)
HALF = [[8, -1], [-1, 8]]
SHIPPED = "SmolLM2-135M-Instruct"


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(UserError, match=message) as error:
        as_spans(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SHIPPED, (SHIPPED, None)),
        (f"{SHIPPED}@0.5", (SHIPPED, 0.5)),
        ("user/repo@main", ("user/repo@main", None)),
        ("user/repo@main@.25", ("user/repo@main", 0.25)),
        ("runs/a@b/heads@1", ("runs/a@b/heads", 1.0)),
        ("@0.5", ("@0.5", None)),
    ],
    ids=["name", "sparsity", "revision", "both", "path", "nothing"],
)
def test_the_sparsity_is_what_follows_the_last_at(text: str, expected: tuple[str, float | None]) -> None:
    assert split_sparsity(text) == expected


def test_a_shipped_pattern_is_read_by_name() -> None:
    mask = load_pattern(SHIPPED).binarize(sparsity=0.5)
    assert read_spans(f"{SHIPPED}@0.5") == HeadSpans(mask.spans, mask.sink_size, mask.gated_layers)


@pytest.mark.parametrize("place", ["", "heads", "heads/heads.json"], ids=["run", "folder", "file"])
def test_a_run_is_read_by_path(place: str, tmp_path: Path) -> None:
    save_pattern(PATTERN, tmp_path / "heads")
    assert read_spans(f"{tmp_path / place}@0.5").spans.tolist() == HALF


def test_spans_are_read_from_their_file_and_from_its_text(tmp_path: Path) -> None:
    spans = HeadSpans(torch.tensor([[3, -1], [-1, 5]]), sink_size=2)
    spans.save(tmp_path / "spans.json")
    assert read_spans(str(tmp_path / "spans.json")) == spans
    assert read_spans(spans.as_json()) == spans
    assert (tmp_path / "spans.json").read_text() == spans.as_json()


def test_objects_are_taken_as_they_are() -> None:
    mask = PATTERN.binarize(sparsity=0.5)
    assert as_spans(mask).spans.tolist() == as_spans(PATTERN, 0.5).spans.tolist() == HALF
    assert as_spans(PATTERN, None, 0.5).spans.tolist() == HALF
    assert as_spans(mask).sink_size == 4
    layers = HeadMask(mask.retrieval, 4, 8, gated_layers=(1,))
    assert (as_spans(layers).gated_layers, as_spans(layers).spans.tolist()) == ((1,), [[-1, -1], [-1, 8]])
    assert as_spans(as_spans(mask)) == as_spans(mask)
    assert as_spans(SHIPPED, 0.5) == read_spans(f"{SHIPPED}@0.5")


def test_mistakes_are_named(tmp_path: Path) -> None:
    save_pattern(PATTERN, tmp_path)
    refused(f"^DUO_ID_HEADS={tmp_path}: say how many heads stream, such as DUO_ID_HEADS={tmp_path}@0.5$", str(tmp_path))
    refused(r"^sparsity=1.5 must lie in \[0, 1\]", f"{tmp_path}@1.5")
    refused("^no head pattern 'nowhere'", "nowhere@0.5")
    refused("^DUO_ID_HEADS, line 1, column 1: not JSON", "{")
    refused("^DUO_ID_HEADS holds no attention spans", "{}")
    refused("^pass either sparsity or threshold, not neither$", PATTERN)
    refused("^a list is neither a HeadMask, nor a HeadSpans, nor a HeadPattern$", [[1, 0]])
    refused("^a HeadMask has decided how far heads see", PATTERN.binarize(sparsity=0.5), 0.5)
