"""Scores of query heads, pooled and repeated; the files are read as their own tools read them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from duo_id.common.errors import UserError
from duo_id.patterns.formats.options import Options, pool, repeat_scores
from duo_id.patterns.formats.query_heads import (
    read_head_list,
    read_scores,
    write_headkv,
    write_qrhead,
    write_retrieval_head,
)
from duo_id.patterns.pattern import HeadPattern
from tests.patterns.formats.cases import CASES, HEADS, KV_HEADS, LAYERS, pattern

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # their order is what is tested

OPTIONS = Options(layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, sink_size=16, recent_size=64)
TWO = Options(layers=2, heads=4, kv_heads=2, sink_size=1, recent_size=2)


def test_a_kv_head_is_as_important_as_the_best_of_its_query_heads() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0, 0, -1, -2]])
    assert pool(scores, 2).equal(torch.tensor([[0.9, 0.3], [0, -1]]))
    assert pool(scores, 4).equal(scores)
    assert repeat_scores(pool(scores, 2), 4).equal(torch.tensor([[0.9, 0.9, 0.3, 0.3], [0, 0, -1, -1]]))
    assert pool(repeat_scores(scores, 12), 4).equal(scores)
    with pytest.raises(UserError, match="4 query heads do not share 3 KV heads evenly"):
        pool(scores, 3)


def test_published_scores_are_means_of_lists_in_any_order(tmp_path: Path) -> None:
    cells = {f"{layer}-{head}": [0, layer, head] for layer in range(2) for head in reversed(range(4))}
    (tmp_path / "scores.json").write_text(json.dumps(cells))
    found = read_scores(tmp_path / "scores.json", TWO)
    torch.testing.assert_close(found.scores, torch.tensor([[1 / 3, 1], [2 / 3, 4 / 3]]))
    assert found.provenance["model"] == {"layers": 2, "kv_heads": 2, "heads": 4}
    pairs = sorted(([name, sum(values) / 3] for name, values in cells.items()), key=lambda pair: -pair[1])
    (tmp_path / "detected.json").write_text(json.dumps(pairs, indent=4))
    assert read_scores(tmp_path / "detected.json", TWO).scores.equal(found.scores)


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_scores_come_back_bit_for_bit(given: HeadPattern, tmp_path: Path) -> None:
    write_retrieval_head(given, tmp_path / "scores.json", Options())
    assert read_scores(tmp_path / "scores.json", OPTIONS).scores.equal(given.scores)
    ranked = json.loads((tmp_path / "scores.json").open().readline())  # its own reader takes the first line
    best = max(ranked, key=lambda name: np.mean(ranked[name]))
    layer, head = (int(number) for number in best.split("-"))
    assert given.scores[layer, head // 2] == given.scores.max()


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_the_heads_that_retrieval_head_ranks_first_are_those_of_our_masks(given: HeadPattern, tmp_path: Path) -> None:
    """Whatever is equal: its reader sorts by the means and leaves equal heads as they stand in the file."""
    whole = HeadPattern(given.scores, 1, 1, provenance=given.provenance)  # it knows of no layers without gates
    write_retrieval_head(whole, tmp_path / "scores.json", Options())
    contents = json.loads((tmp_path / "scores.json").open().readline())
    ranked = sorted(contents, key=lambda name: np.mean(contents[name]), reverse=True)
    for streaming in range(whole.gated_heads):
        mask = whole.binarize(sparsity=streaming / whole.gated_heads).retrieval
        kept = set(ranked[: 2 * int(mask.sum())])
        assert kept == {f"{layer}-{2 * head + one}" for layer, head in mask.nonzero().tolist() for one in (0, 1)}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_headkv_shares_its_budget_by_the_scores(given: HeadPattern, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    if not given.scores.any():
        with pytest.raises(UserError, match="none of them is positive"):
            write_headkv(given, path, Options())
        assert not path.exists()
        return
    write_headkv(given, path, Options())
    means = np.array([np.mean(values) for values in json.loads(path.read_text()).values()])  # by order, not by name
    shares = np.power(means / means.sum(), 1.5).reshape(LAYERS, HEADS)
    assert np.isfinite(shares).all()
    expected = given.scores.clamp(min=0).repeat_interleave(2, 1).numpy()
    assert shares == pytest.approx((expected / expected.sum()) ** 1.5)
    assert read_scores(path, OPTIONS).scores.equal(given.scores.clamp(min=0))


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
@pytest.mark.parametrize("sparsity", [0, 0.4])
def test_qrhead_names_the_query_heads_of_retrieval_heads(given: HeadPattern, sparsity: float, tmp_path: Path) -> None:
    path = tmp_path / "heads.yaml"
    write_qrhead(given, path, Options(sparsity=sparsity))
    contents = yaml.safe_load(path.read_text())
    assert contents["model_name_or_path"] == "someone/a-model"
    assert contents["model_base_class"] == "a-model"
    places = [tuple(map(int, head.split("-"))) for head in contents["attn_head_set"].split(",")]  # as it reads them
    retrieval = given.binarize(sparsity=sparsity).retrieval
    assert {(layer, head // 2) for layer, head in places} == {tuple(place) for place in retrieval.nonzero().tolist()}
    assert len(places) == 2 * retrieval.sum()
    scores = [given.scores[layer, head // 2].item() for layer, head in places]
    assert scores == sorted(scores, reverse=True)
    order = [(given.scores[layer, head // 2].item(), layer, head) for layer, head in places]
    assert order == sorted(order, reverse=True), "so that reading gives the order of the pattern, equal heads or not"
    found = read_head_list(path, OPTIONS)
    assert (found.scores > 0).equal(retrieval)
    assert found.provenance["model"]["id"] == "someone/a-model"


def test_qrhead_as_published(tmp_path: Path) -> None:
    path = tmp_path / "heads.yaml"
    path.write_text('# Default configuration\n\nattn_head_set: "1-2,0-1, 1-3,0-0" # top4\nmodel_name_or_path: "a/b"\n')
    found = read_head_list(path, TWO)
    assert found.scores.tolist() == [[0.75, 0], [0, 1]]
    assert found.provenance["model"]["id"] == "a/b"
    path.write_text('attn_head_set: "full_heads"\n')
    assert read_head_list(path, TWO).scores.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", TWO, "line 1, column 1: not JSON"),
        ("3", TWO, r'expected scores of query heads, \{"layer-head".*found int'),
        ('{"a": 1}', TWO, "expected a head as layer-head, such as 14-21, found 'a'"),
        ("[1, 2]", TWO, "expected scores of query heads, .* found list"),
        ("{}", TWO, "it has no scores"),
        ("[]", TWO, "it has no scores"),
        ('{"0-0": [], "0-1": [1]}', TWO, "head 0-0 has no score"),
        ('{"0-0": ["x"], "0-1": [1]}', TWO, "head 0-0 has no score"),
        ('{"0-0": [1], "1-1": [1]}', TWO, "of 2 layers x 2 query heads, head 0-1 has no score"),
        ('{"0-0": [1], "0-1": [1]}', TWO, "2 query heads per layer, not heads=4"),
        ('{"0-0": [1], "0-1": [1]}', Options(sink_size=1, recent_size=1), "no number of KV heads: set kv_heads="),
        ('{"0-0": [1], "0-1": [1]}', Options(kv_heads=2), "set sink_size="),
        ('{"0-0": [1], "0-1": [1]}', Options(kv_heads=2, sink_size=1, recent_size=0), "recent_size=0"),
        ('{"0-0": [1], "0-1": [1]}', Options(kv_heads=3), "do not share 3 KV heads"),
    ],
)
def test_broken_scores_are_named(text: str, options: Options, message: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_scores(tmp_path / "scores.json", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a: [", TWO, "is not YAML"),
        ("- 1", TWO, "expected QRHead's attn_head_set: .* found list"),
        ("heads: 3", TWO, "found an object with heads"),
        ("attn_head_set: ''", TWO, "expected a head as layer-head"),
        ("attn_head_set: 0-4", TWO, "head 0-4 is beyond 2 layers x 4 query heads"),
        ("attn_head_set: 2-0", TWO, "head 2-0 is beyond"),
        ("attn_head_set: 0-0", Options(heads=4), "set layers="),
        ("attn_head_set: 0-0", Options(layers=4), "set heads="),
        ("a: !!python/object/apply:os.system [exit]", TWO, "is not YAML"),
    ],
)
def test_broken_yaml_is_named(text: str, options: Options, message: str, tmp_path: Path) -> None:
    (tmp_path / "heads.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_head_list(tmp_path / "heads.yaml", options)
    assert "\n" not in str(error.value)


def test_what_writing_needs_is_asked_for(tmp_path: Path) -> None:
    bare = HeadPattern(torch.rand(2, 3), 1, 1)
    with pytest.raises(UserError, match=r"set heads=\.\.\."):
        write_retrieval_head(bare, tmp_path / "a.json", Options())
    with pytest.raises(UserError, match="4 query heads do not share 3 KV heads"):
        write_retrieval_head(bare, tmp_path / "a.json", Options(heads=4))
    with pytest.raises(UserError, match="set sparsity="):
        write_qrhead(bare, tmp_path / "a.yaml", Options(heads=6))
    with pytest.raises(UserError, match="leaves no retrieval head"):
        write_qrhead(pattern(torch.rand(2, 3)), tmp_path / "a.yaml", Options(sparsity=1))
    assert not list(tmp_path.iterdir())
