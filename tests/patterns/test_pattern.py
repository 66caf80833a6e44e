"""Budgets are exact, order is deterministic, and nothing that cannot be a pattern becomes one."""

import base64
import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.patterns.combining import mix_prior, normalized_ranks
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern, TieWarning
from duo_id.patterns.random_masks import random_mask
from duo_id.patterns.saved import save_pattern


def brute_force(pattern: HeadPattern, sparsity: float) -> list[list[bool]]:
    """The definition in plain Python: the budget streams from the start of the order by (score, layer, head)."""
    layers, kv_heads = pattern.scores.shape
    heads = [(pattern.scores[i, j].item(), i, j) for i in pattern.gated_layers for j in range(kv_heads)]
    streaming = {(i, j) for _, i, j in sorted(heads)[: round(sparsity * len(heads))]}
    return [[(i, j) not in streaming for j in range(kv_heads)] for i in range(layers)]


def random_pattern(rng: random.Random) -> HeadPattern:
    """A pattern of a random shape, with ties, zeros of both signs, saturated gates and layers without gates."""
    layers, kv_heads = rng.randint(1, 9), rng.randint(1, 9)
    values = rng.choice(([0.0, -0.0, 1.0], [0.0, 0.25, 0.5, 1.0, 1.0], [1.0], [rng.random() for _ in range(50)]))
    scores = torch.tensor([[rng.choice(values) for _ in range(kv_heads)] for _ in range(layers)])
    gated = tuple(rng.sample(range(layers), rng.randint(1, layers)))
    return HeadPattern(scores, 4, 8, gated)


@pytest.mark.parametrize("seed", range(40))
def test_budget_matches_brute_force_and_masks_nest(seed: int) -> None:
    rng = random.Random(seed)
    pattern = random_pattern(rng)
    before = pattern.scores.clone()
    smaller = torch.ones_like(before, dtype=torch.bool)
    for sparsity in sorted([0.0, 0.25, 0.5, 0.75, 1.0, rng.random(), rng.random()]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mask = pattern.binarize(sparsity=sparsity)
        assert mask.retrieval.tolist() == brute_force(pattern, sparsity)
        gated, budget = list(pattern.gated_layers), round(sparsity * pattern.gated_heads)
        kept, streaming = (set(before[gated][part[gated]].tolist()) for part in (mask.retrieval, ~mask.retrieval))
        assert [warning.category for warning in caught] == [TieWarning] * bool(kept & streaming)
        assert (~mask.retrieval).sum() == budget
        assert mask.sparsity == pytest.approx(budget / pattern.gated_heads)
        assert not (mask.retrieval & ~smaller).any()
        smaller = mask.retrieval
    assert torch.equal(pattern.scores, before)


@pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")
def test_of_equal_heads_the_earlier_layer_then_the_lower_head_streams_first() -> None:
    pattern = HeadPattern(torch.ones(3, 2), 4, 8)
    assert pattern.binarize(sparsity=0.5).retrieval.tolist() == [[False, False], [False, True], [True, True]]


def test_a_mask_that_parts_equal_heads_says_how_many() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.25, 0.25], [0.25, 0.25], [0.25, 0.5]])
    pattern = HeadPattern(scores, 4, 8, (0, 1, 2))
    warning = "sparsity=0.5 separates heads with the same score: 4 of 6 have 0.25, of which 2 stream only because of"
    with pytest.warns(TieWarning, match=warning) as caught:
        pattern.binarize(sparsity=0.5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        for sparsity in (0, 1 / 6, 5 / 6, 1):  # beside the tie
            pattern.binarize(sparsity=sparsity)
        pattern.binarize(threshold=0.25)


@pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")
def test_large_ties_keep_their_order() -> None:
    """An unstable sort is stable by luck on small inputs; a published pattern has 1024 heads, many of them at 1."""
    mask = HeadPattern(torch.ones(64, 64), 4, 8).binarize(sparsity=0.5)
    assert not mask.retrieval[:32].any()
    assert mask.retrieval[32:].all()


@pytest.mark.parametrize(("heads", "budget"), [(5, 2), (7, 4), (1, 0), (3, 2)])
def test_budget_rounds_as_python_does(heads: int, budget: int) -> None:
    assert (~HeadPattern(torch.rand(1, heads), 4, 8).binarize(sparsity=0.5).retrieval).sum() == budget


def test_threshold_keeps_what_is_equal() -> None:
    pattern = HeadPattern(torch.tensor([[0.1, 0.7, 0.69], [0.71, -0.001, 1.0]]), 4, 8)
    mask = pattern.binarize(threshold=0.7)
    assert mask.retrieval.tolist() == [[False, True, False], [True, False, True]]
    assert mask.sparsity == 0.5
    assert pattern.binarize(threshold=float("inf")).sparsity == 1
    assert pattern.binarize(threshold=-1).sparsity == 0


def test_layers_without_gates_stand_as_ones_and_do_not_count() -> None:
    scores = torch.tensor([[float("nan"), 0.0], [0.2, 0.1], [0.3, 0.4]])
    pattern = HeadPattern(scores, 4, 8, (2, 1))
    assert pattern.gated_layers == (1, 2)
    assert pattern.scores[0].tolist() == [1, 1]
    assert pattern.gated_heads == 4
    for mask in (pattern.binarize(sparsity=0.5), pattern.binarize(threshold=0.25)):
        assert mask.retrieval.tolist() == [[True, True], [False, False], [True, True]]
        assert mask.sparsity == 0.5
        assert (mask.sink_size, mask.recent_size, mask.gated_layers) == (4, 8, (1, 2))
    assert pattern.binarize(threshold=2.0).retrieval.tolist() == [[True, True], [False, False], [False, False]]
    assert pattern.binarize(sparsity=1).sparsity == 1


def test_gated_layers_are_ascending_and_named_once() -> None:
    assert HeadPattern(torch.rand(9, 1), 4, 8, (8, 1, 8)).gated_layers == (1, 8)


def test_a_pattern_owns_its_scores() -> None:
    given = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    pattern = HeadPattern(given, 4, 8)
    assert pattern.scores.dtype == torch.float32
    assert not pattern.scores.requires_grad
    scores = torch.zeros(2, 2)
    pattern = HeadPattern(scores, 4, 8, (1,))
    assert scores.tolist() == [[0, 0], [0, 0]]
    scores += 5
    assert pattern.scores.max() == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.sink_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([[0.0, float("nan")]])}, "layer 0, KV head 1 is nan"),
        ({"scores": torch.tensor([[float("inf")]])}, "KV head 0 is inf"),
        ({"scores": torch.empty(0, 4)}, r"not \(0, 4\)"),
        ({"scores": torch.empty(4, 0)}, r"not \(4, 0\)"),
        ({"scores": torch.ones(4)}, r"not \(4,\)"),
        ({"scores": None}, "^scores must be numbers of shape"),
        ({"scores": [[0.5, 0.2], [0.1]]}, "^scores must be numbers of shape"),
        ({"scores": torch.ones(2, 2, dtype=torch.complex64)}, "^scores must be real numbers, not torch.complex64$"),
        ({"sink_size": -1}, "sink_size=-1"),
        ({"sink_size": 1.5}, "sink_size=1.5"),
        ({"recent_size": 0}, "recent_size=0"),
        ({"recent_size": "8"}, "recent_size='8'"),
        ({"gated_layers": ()}, "at least one"),
        ({"gated_layers": (0, 2)}, "from 0 to 1"),
        ({"gated_layers": (-1,)}, "from 0 to 1"),
        ({"gated_layers": ("0",)}, "from 0 to 1"),
        ({"gated_layers": 1}, "^gated_layers=1 must name the gated layers"),
        ({"provenance": {"seconds": float("nan")}}, "^provenance must be what JSON can hold: "),
        ({"provenance": {"model": object()}}, "^provenance must be what JSON can hold: .* object is not JSON serial"),
        ({"provenance": {(1, 2): 3}}, "^provenance must be what JSON can hold: "),
    ],
)
def test_what_is_no_pattern_is_refused(change: dict, message: str) -> None:
    fields = {"scores": torch.rand(2, 3), "sink_size": 4, "recent_size": 8}
    HeadPattern(**fields)
    with pytest.raises(UserError, match=message) as error:
        HeadPattern(**{**fields, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [None, 5, b"heads", ""])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(UserError, match=f"^{source!r} is not the name, path or repo of a head pattern$"):
        HeadPattern.from_pretrained(source)


def test_a_name_too_long_for_a_file_is_no_pattern() -> None:
    with pytest.raises(UserError, match=r"is no head pattern: File name too long$"):
        HeadPattern.from_pretrained("x" * 5000)


def test_provenance_must_fit_into_json() -> None:
    assert HeadPattern(torch.rand(2, 2), 0, 1, provenance={"lengths": (1, 2)}).provenance == {"lengths": [1, 2]}
    with pytest.raises(UserError, match=r"^provenance must be what JSON can hold: "):
        HeadPattern(torch.rand(2, 2), 0, 1, provenance={"seed": torch.tensor(1)})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "neither"),
        ({"sparsity": 0.5, "threshold": 0.5}, "both"),
        ({"sparsity": 1.01}, "sparsity=1.01"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": "low"}, "threshold='low' is not a number"),
        ({"threshold": True}, "threshold=True is not a number"),
        ({"sparsity": True}, "sparsity=True is not a number"),
        ({"sparsity": torch.tensor(0.5)}, r"sparsity=tensor\(0.5000\) is not a number"),
    ],
)
def test_binarize_wants_one_choice_in_range(choice: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadPattern(torch.rand(2, 3), 4, 8).binarize(**choice)


def test_check_fits_names_both_shapes() -> None:
    pattern = HeadPattern(torch.rand(30, 3), 4, 8)
    pattern.check_fits(30, 3, "tiny")
    pattern.binarize(0.5).check_fits(30, 3, "tiny")
    for heads in (pattern, pattern.binarize(0.5)):
        with pytest.raises(UserError, match="30 layers x 3 KV heads, but tiny has 32 layers x 8 KV heads"):
            heads.check_fits(32, 8, "tiny")


def test_equality_and_repr() -> None:
    scores = torch.rand(2, 3)
    pattern = HeadPattern(scores, 4, 8, provenance={"seed": 1})
    assert pattern == HeadPattern(scores.clone(), 4, 8, (0, 1), {"seed": 1})
    others = [
        HeadPattern(scores + 1e-6, 4, 8, provenance={"seed": 1}),
        HeadPattern(scores, 5, 8, provenance={"seed": 1}),
        HeadPattern(scores, 4, 9, provenance={"seed": 1}),
        HeadPattern(scores, 4, 8, provenance={"seed": 2}),
        HeadPattern(scores, 4, 8, (0,), {"seed": 1}),
        HeadPattern(scores.T, 4, 8, provenance={"seed": 1}),
    ]
    assert all(pattern != other for other in others)
    mask = pattern.binarize(sparsity=0.5)
    assert mask == HeadMask(mask.retrieval.clone(), 4, 8)
    assert mask != pattern.binarize(sparsity=0)
    assert repr(pattern).startswith("HeadPattern(2 layers x 3 KV heads, sink_size=4, recent_size=8, scores in [")
    assert repr(mask) == "HeadMask(2 layers x 3 KV heads, sink_size=4, recent_size=8, sparsity=0.5)"
    assert "(1 layer gated)" in repr(others[4])
    assert "(2 layers gated)" in repr(HeadPattern(torch.rand(3, 2), 4, 8, (0, 2)))


def test_a_mask_of_scores_is_refused() -> None:
    with pytest.raises(UserError, match="bools"):
        HeadMask(torch.rand(2, 3), 4, 8)


def test_random_masks_are_seeded_keep_the_budget_and_nest() -> None:
    first = random_mask(30, 3, 0.5, seed=0, sink_size=4, recent_size=8)
    assert first == random_mask(30, 3, 0.5, seed=0, sink_size=4, recent_size=8)
    assert first != random_mask(30, 3, 0.5, seed=1, sink_size=4, recent_size=8)
    assert first.sparsity == 0.5
    more = random_mask(30, 3, 0.75, seed=0, sink_size=4, recent_size=8)
    assert not (more.retrieval & ~first.retrieval).any()
    hybrid = random_mask(30, 3, 0.5, seed=0, sink_size=4, recent_size=8, gated_layers=range(10))
    assert hybrid.retrieval[10:].all()
    assert (~hybrid.retrieval).sum() == 15


def test_random_masks_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    random_mask(4, 4, 0.5, seed=0, sink_size=4, recent_size=8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(20))
def test_places_count_the_scores_below_and_half_of_the_others_that_are_equal(seed: int) -> None:
    scores = random_pattern(random.Random(seed)).scores
    values = scores.flatten().tolist()
    rest = max(len(values) - 1, 1)
    expected = [(sum(v < value for v in values) + (values.count(value) - 1) / 2) / rest for value in values]
    torch.testing.assert_close(normalized_ranks(scores), torch.tensor(expected).view_as(scores))


def test_a_prior_is_weighed_in_over_the_gated_layers() -> None:
    pattern = HeadPattern(torch.tensor([[0.2, 0.6], [7.0, 7.0], [0.4, 0.4]]), 4, 8, (0, 2), {"seed": 3})
    prior = HeadPattern(torch.tensor([[5.0, -1.0], [99.0, -99.0], [0.0, 8.0]]), 64, 256)
    found = mix_prior(pattern, prior, 0.5)
    ones, places_of = [1.0, 1.0], torch.tensor([[2 / 3, 0.0], [1 / 3, 1.0]])
    expected = (torch.tensor([[0.2, 0.6], [0.4, 0.4]]) + 0.5 * places_of) / 1.5
    torch.testing.assert_close(found.scores, torch.stack([expected[0], torch.tensor(ones), expected[1]]))
    assert (found.sink_size, found.recent_size, found.gated_layers, found.provenance) == (4, 8, (0, 2), {"seed": 3})
    assert pattern.scores[0, 0] == pytest.approx(0.2)


def test_any_weight_of_a_prior_gives_scores_between_both() -> None:
    pattern = HeadPattern(torch.tensor([[0.2, 0.6]]), 4, 8)
    prior = HeadPattern(torch.tensor([[5.0, -1.0]]), 4, 8)
    torch.testing.assert_close(mix_prior(pattern, prior, 1e300).scores, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (HeadPattern(torch.ones(2, 2), 4, 8), "2 layers x 2 KV heads, but the pattern has 3"),
        (HeadPattern(torch.ones(4, 2), 4, 8), "4 layers x 2 KV heads, but the pattern has 3"),
        (HeadPattern(torch.ones(3, 4), 4, 8), "3 layers x 4 KV heads, but the pattern has 3"),
        (HeadPattern(torch.ones(3, 2), 4, 8, (0, 1)), r"scores for layers \[0, 1\], but not for \[2\]"),
    ],
)
def test_a_prior_that_orders_other_heads_is_refused(prior: HeadPattern, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix_prior(HeadPattern(torch.ones(3, 2), 4, 8, (0, 2)), prior, 0.1)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"model": "x"}, "a pattern: provenance.model='x' is no object"),
        ({"model": {"id": 3}}, "a pattern: provenance.model.id=3 is no text"),
        ({"model": {"layers": 10**9}}, "provenance.model.layers=1000000000, but the scores have 2"),
        ({"model": {"kv_heads": 4}}, "provenance.model.kv_heads=4, but the scores have 3"),
        ({"settings": "none"}, "a pattern: provenance.settings='none' is no object"),
        ({"settings": {"method": "duo"}}, "a pattern: provenance.settings.method='duo' is no object"),
        ({"budget": "half"}, "a pattern: provenance.budget='half' is no number"),
        ({"seconds": -1}, "a pattern: provenance.seconds=-1 must be greater than or equal to 0"),
    ],
)
def test_provenance_that_misleads_is_refused(provenance: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        HeadPattern(torch.rand(2, 3), 4, 8, provenance=provenance)
    assert str(error.value) == message


@pytest.mark.parametrize("change", [{"sink_size": 10**18}, {"recent_size": 2**24 + 1}, {"scores": torch.rand(5000, 1)}])
def test_sizes_that_no_model_has_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="at most"):
        HeadPattern(**{"scores": torch.rand(2, 3), "sink_size": 4, "recent_size": 8} | change)


def nested(scores: torch.Tensor) -> HeadPattern:
    provenance = {
        "settings": {"method": {"name": "nested", "gate": "nested"}},
        "model": {"name": "model<b>", "id": "a/model<b>"},
    }
    return HeadPattern(scores, 4, 8, provenance=provenance)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "duo", "gate": "nested"},
        {"name": "nested", "gate": "nested"},
        {"name": "saliency"},
        {"name": "duo", "gate": "clamp", "prior": "DIR"},
    ],
)
def test_a_threshold_on_scores_that_are_no_gates_is_refused(method: dict[str, str]) -> None:
    pattern = HeadPattern(torch.rand(3, 2), 4, 8, provenance={"settings": {"method": method}})
    with pytest.raises(UserError, match=r"^threshold=0\.05: scores of method=.* pass sparsity$"):
        pattern.binarize(threshold=0.05)


def test_a_pattern_plots_itself() -> None:
    pattern = nested(torch.rand(3, 2))
    alone, beside = pattern.plot(), pattern.plot(sparsity=0.5, title="mine")
    assert [len(figure.axes) for figure in (alone, beside)] == [2, 3], "panels and their scale"
    assert alone.get_suptitle() == "model<b>"
    assert beside.get_suptitle() == "mine"
    cells = beside.axes[1].collections[0].get_array()
    assert cells.astype(bool).tolist() == pattern.binarize(sparsity=0.5).retrieval.tolist()
    with pytest.raises(UserError, match="not both"):
        pattern.plot(sparsity=0.5, mask=pattern.binarize(sparsity=0.25))
    with pytest.raises(UserError, match=r"^mask: a int is not a HeadMask"):
        pattern.plot(mask=5)  # type: ignore[arg-type]
    for figure_of in (pattern, pattern.allocate(cache=0.9, length=100)):
        with pytest.raises(UserError, match=r"^title=5 must be a text$"):
            figure_of.plot(title=5)  # type: ignore[arg-type]


def test_notebooks_show_the_heatmap_and_what_it_is() -> None:
    shown = nested(torch.rand(3, 2))._repr_html_()
    picture = base64.b64decode(shown.partition("base64,")[2].partition('"')[0])
    assert picture.startswith(b"\x89PNG")
    assert "3 layers x 2 KV heads, sink_size=4, recent_size=8" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsities": [True]}, r"^sparsities=\[True\] must be a list of numbers"),
        ({"sparsities": 0.5}, r"^sparsities=0\.5 must be a list of numbers, such as sparsities=\[0\.5\]$"),
        ({"sparsities": "0.5"}, r"^sparsities='0\.5' must be a list"),
        ({"sparsities": [0.5, "a"]}, r"^sparsities=\[0\.5, 'a'\] must be a list"),
        ({"sparsities": [0.5, 2]}, r"^sparsity=2 must lie in \[0, 1\]"),
        ({"folder": 5}, "^folder: a int is no path$"),
    ],
    ids=["truth", "number", "text", "mixed", "out of range", "no path"],
)
def test_what_cannot_be_saved_writes_nothing(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    pattern = nested(torch.rand(3, 2))
    with pytest.raises(UserError, match=message):
        pattern.save(**({"folder": tmp_path / "heads"} | given))
    with pytest.raises(UserError, match=r"^pattern: a HeadMask is not a HeadPattern$"):
        save_pattern(pattern.binarize(0.5), tmp_path / "heads")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_pattern_saves_itself_and_comes_back(tmp_path: Path) -> None:
    pattern = nested(torch.rand(3, 2))
    pattern.save(tmp_path, sparsities=[0.5])
    assert HeadPattern.from_pretrained(tmp_path) == pattern
    assert [path.name for path in tmp_path.glob("mask_*")] == ["mask_sparsity_50.tsv"]
    assert HeadPattern.from_pretrained("SmolLM2-135M-Instruct").scores.shape == (30, 3)
