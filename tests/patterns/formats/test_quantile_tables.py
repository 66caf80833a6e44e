"""Whatever noise a loader draws, it finds the mask that was meant: every budget of 90, 256 and 1024 heads."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.quantile_tables import (
    evenly_spaced_ranks,
    read_folder,
    read_table,
    sparsity_to_pass,
    write_duo_attention,
    write_lserve,
    write_prulong,
    write_rlkv,
)
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from tests.patterns.formats.cases import CASES, pattern, random, trained

pytestmark = pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")  # their order is what is tested

NOISE = 1e-6  # the most that is added to a score
SHAPES = [(30, 3), (32, 8), (32, 32)]
WINDOWS = Options(sink_size=16, recent_size=64)


def cut(scores: np.ndarray, noise: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    """The rule of the quantile loaders, restated for many draws at once: True where a head is a retrieval head.

    Scores (heads,) or (draws, heads) are clipped and get their noise; of the sorted ones, the value at the place
    `sparsity (heads - 1)` is the threshold, between two places a straight line, and what reaches it stays. At a
    sparsity of 0 all stay, at 1 none.
    """
    noisy = np.clip(scores, 0, 1) + noise
    ordered, places = np.sort(noisy), sparsity * (noisy.shape[1] - 1)
    below = np.floor(places).astype(int)
    low, high = (np.take_along_axis(ordered, at[:, None], 1)[:, 0] for at in (below, np.ceil(places).astype(int)))
    threshold = low + (places - below) * (high - low)
    threshold = np.where(sparsity >= 1, 2, np.where(sparsity <= 0, -1, threshold))
    return noisy >= threshold[:, None]


def noises(retrieval: np.ndarray) -> list[np.ndarray]:
    """Draws at the corners of what can be drawn, the two worst for these masks among them, and one at random."""
    most = np.nextafter(NOISE, 0)
    drawn = np.random.default_rng(0).uniform(0, NOISE, retrieval.shape)
    return [0 * drawn, 0 * drawn + most, np.where(retrieval, 0, most), np.where(retrieval, most, 0), drawn]


def every_mask(given: HeadPattern) -> np.ndarray:
    """The masks (budgets, heads) at all budgets from none to all that stream."""
    budgets = np.arange(given.gated_heads + 1) / given.gated_heads
    return np.stack([given.binarize(sparsity=budget).retrieval.numpy().ravel() for budget in budgets])


def as_printed(total: int, counted: bool = False) -> np.ndarray:
    return np.array([float(f"{sparsity_to_pass(count, total, counted):.10g}") for count in range(total + 1)])


def test_the_rule_as_restated_is_that_of_numpys_quantile() -> None:
    drawn, sparsity = np.random.default_rng(0).uniform(size=(50, 90)), np.linspace(0.01, 0.99, 50)
    expected = [row >= np.quantile(row, share) for row, share in zip(drawn, sparsity, strict=True)]
    assert np.array_equal(cut(drawn, 0 * drawn, sparsity), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "scores", [random, trained, lambda *shape: torch.ones(shape)], ids=["random", "trained", "ones"]
)
def test_every_budget_comes_out_whatever_the_noise(
    shape: tuple[int, int], scores: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    given = pattern(scores(*shape))
    write_duo_attention(given, tmp_path, Options())
    table = np.loadtxt(tmp_path / "full_attention_heads.tsv", delimiter="\t").ravel()
    meant, total = every_mask(given), given.scores.numel()
    assert (~meant).sum(1).tolist() == list(range(total + 1))
    for sparsity in (as_printed(total), np.arange(total + 1) / total):
        for noise in noises(meant):
            assert np.array_equal(cut(table, noise, sparsity), meant)


@pytest.mark.parametrize("total", [90, 256, 1024])
def test_masks_come_out_of_both_loaders_of_prulong(total: int) -> None:
    meant = np.random.default_rng(0).permutation(total) >= np.arange(total + 1)[:, None]
    sparsity = as_printed(total, counted=True)
    assert [int(total * (1 - share)) for share in sparsity] == meant.sum(1).tolist()  # the highest that stay
    for noise in noises(meant):
        assert np.array_equal(cut(meant.astype(float), noise, sparsity), meant)


def test_raw_gates_do_not_survive_the_noise() -> None:
    """What all of this is for: with gates as they were trained, chance decides."""
    given = pattern(trained(32, 8))
    meant = given.binarize(sparsity=0.9).retrieval.numpy().reshape(1, -1)
    raw = given.scores.numpy().astype(float).reshape(1, -1)
    assert not np.array_equal(cut(raw, noises(meant)[4], np.array([0.9])), meant)


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_places_keep_the_order_of_heads_and_leave_room_for_the_noise(given: HeadPattern) -> None:
    table = evenly_spaced_ranks(given)
    gated = table[list(given.gated_layers)].flatten().sort().values
    assert (gated.diff() > 2 * NOISE).all()
    assert gated[0] == 0
    assert gated[-1] < 1
    again = HeadPattern(table, 1, 1, given.gated_layers)
    for sparsity in (0, 0.3, 0.5, 0.9, 1):
        assert again.binarize(sparsity=sparsity).retrieval.equal(given.binarize(sparsity=sparsity).retrieval)


def test_layers_without_gates_are_counted_by_the_loader_and_never_stream(tmp_path: Path) -> None:
    given = CASES["hybrid"]
    for budget in (0, 0.4, 1):
        note = write_duo_attention(given, tmp_path, Options(sparsity=budget))
        sparsity = float(re.search(r"sparsity=([\d.e-]+)\)", note)[1])
        meant = given.binarize(sparsity=budget).retrieval.numpy().reshape(1, -1)
        table = np.loadtxt(tmp_path / "full_attention_heads.tsv", delimiter="\t").ravel()
        for noise in noises(meant):
            assert np.array_equal(cut(table, noise, np.array([sparsity])), meant)
        assert f"exactly {(~meant).sum()} of 18 heads stream" in note


def test_the_sparsity_to_pass_has_few_digits() -> None:
    assert sparsity_to_pass(0, 90) == 0
    assert sparsity_to_pass(90, 90) == 1
    assert sparsity_to_pass(45, 90) == 0.5
    assert sparsity_to_pass(27, 90) == 0.3
    assert sparsity_to_pass(768, 1024) == 0.75
    assert sparsity_to_pass(1, 1) == 1
    assert sparsity_to_pass(1, 2) == 0.5


@pytest.mark.parametrize("write", [write_duo_attention, write_lserve, write_rlkv])
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_folders_lose_nothing(write: object, given: HeadPattern, tmp_path: Path) -> None:
    write(given, tmp_path, Options())
    assert read_folder(tmp_path, Options()) == given
    assert load_pattern(tmp_path) == given


def test_notes_hold_the_arguments_of_each_tool(tmp_path: Path) -> None:
    given, half = CASES["random"], Options(sparsity=0.5)
    note = write_duo_attention(given, tmp_path / "duo", half)
    assert note.endswith("sparsify_attention_heads(heads, sparsity=0.5): exactly 9 of 18 heads stream")
    note = write_lserve(given, tmp_path / "lserve", half)
    assert f"--static-sparse-attn-load-dir {tmp_path / 'lserve'} --static-sparsity 0.5 --ctx-sink-token 16" in note
    assert "--dec-sink-token 16 --dec-local-token 64: exactly 9" in note
    note = write_rlkv(given, tmp_path / "rlkv", Options())
    assert "--sparsity k/18 --sink_size 16 --recent_size 64: exactly k of 18" in note
    assert (tmp_path / "rlkv" / "adapter_weights.tsv").is_file()
    note = write_prulong(given, tmp_path / "masks.tsv", half)
    passed = re.findall(r"sparsity (0\.\d+)", note)
    assert len(set(passed)) == 1
    assert 8 / 17 < float(passed[0]) < 0.5


def test_rlkv_as_published_needs_the_windows(tmp_path: Path) -> None:
    (tmp_path / "adapter_weights.tsv").write_text("3.59e-01\t-2.3e-04\n1.0078125e+00\t1\n")
    with pytest.raises(UserError, match=r"adapter_weights\.tsv does not contain .* set sink_size="):
        read_folder(tmp_path, Options(recent_size=1))
    found = read_folder(tmp_path, Options(sink_size=16, recent_size=64, model="a/b"))
    assert found.scores.equal(torch.tensor([[0.359, -2.3e-4], [1.0078125, 1]]))
    assert (found.sink_size, found.recent_size) == (16, 64)
    assert found.provenance == {"format": "rlkv", "model": {"id": "a/b", "layers": 2, "kv_heads": 2}}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_prulongs_table_is_a_mask_or_keeps_the_order(given: HeadPattern, tmp_path: Path) -> None:
    for budget in (0, 0.4, 1):
        write_prulong(given, tmp_path / "masks.tsv", Options(sparsity=budget))
        assert set((tmp_path / "masks.tsv").read_text().split()) <= {"0", "1"}
        found = read_table(tmp_path / "masks.tsv", WINDOWS)
        assert found.binarize(threshold=0.5).retrieval.equal(given.binarize(sparsity=budget).retrieval)
    write_prulong(given, tmp_path / "masks.tsv", Options())
    assert read_table(tmp_path / "masks.tsv", WINDOWS).scores.equal(evenly_spaced_ranks(given))
