"""Where single heads look: weights against the dense matrix, shares by hand, figures that show both."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from transformers import PreTrainedModel

from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.samples import Sample
from duo_id.methods.anatomy import answer_attention, attention_shares, plot_attention, plot_shares
from duo_id.patterns.pattern import HeadPattern
from tests.methods.conftest import haystack
from tests.support.dense import dense_attention


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("heads", [None, [(2, 1), (0, 0)]])
def test_weights_of_the_answers_queries(
    family: str, heads: list[tuple[int, int]] | None, make_model: Callable[..., PreTrainedModel]
) -> None:
    model, sample = make_model(family), haystack(90, (30, 60, 4), (10, 85, 3))
    queries = [59, 60, 61, 62, 84, 85, 86]
    with dense_attention(model) as seen:
        model(sample["input_ids"][None], use_cache=False)
    attention = answer_attention(model, sample, heads)
    kv_heads = model.config.get_text_config().num_key_value_heads if family == "llama" else 4
    assert list(attention) == (heads or [(layer, head) for layer in range(3) for head in range(kv_heads)])
    for (layer, head), weight in attention.items():
        expected = seen.weights[layer][:, queries].unflatten(0, (kv_heads, -1))[head].mean(0)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_a_head_that_does_not_exist_is_named(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match=r"^layer 3 has no KV head 0 "):
        answer_attention(make_model("llama"), haystack(60, (20, 40, 3)), [(0, 0), (3, 0)])


def by_hand() -> tuple[dict[tuple[int, int], torch.Tensor], Sample]:
    """30 tokens with a needle at 12 to 13 whose answer begins at 28: the queries are 27 and 28."""
    sample = haystack(30, (12, 28, 2))
    weight = torch.zeros(2, 30)
    weight[0, [1, 12, 20, 26]] = torch.tensor([0.1, 0.4, 0.2, 0.3])  # sink, needle, elsewhere, recent
    weight[1, [0, 13, 28]] = torch.tensor([0.3, 0.2, 0.5])
    return {(0, 1): weight, (2, 0): torch.full((2, 30), 0.0).index_fill_(1, torch.tensor([2]), 1.0)}, sample


def test_shares_divide_the_attention() -> None:
    shares = attention_shares(*by_hand(), Window(3, 5))
    assert shares.loc[(0, 1)].to_dict() == pytest.approx({"needle": 0.3, "elsewhere": 0.1, "recent": 0.4, "sink": 0.2})
    assert shares.loc[(2, 0)].to_dict() == {"needle": 0, "elsewhere": 0, "recent": 0, "sink": 1}


def test_a_needle_within_the_window_counts_as_recent() -> None:
    shares = attention_shares(*by_hand(), Window(3, 20))
    assert shares.loc[(0, 1)].to_dict() == pytest.approx({"needle": 0, "elsewhere": 0, "recent": 0.8, "sink": 0.2})


def test_figures_show_the_weights_and_the_shares() -> None:
    (maps, sample), window, pattern = by_hand(), Window(3, 5), HeadPattern(torch.rand(3, 2), 3, 5)
    figure = plot_attention(maps, sample, window, pattern)
    for axes, (head, weight) in zip(figure.axes[:2], maps.items(), strict=True):
        mesh = next(item for item in axes.collections if isinstance(item, QuadMesh))
        np.testing.assert_array_equal(mesh.get_array(), weight[:, :29].numpy())
        needle, sink, recent = (line.get_xdata() for line in axes.lines)
        assert list(needle) == [11.5, 13.5]
        assert sink[0] == 2.5
        assert list(recent) == [22.5, 23.5, 23.5]  # the first token of the window of 27 is 23, of 28 it is 24
        assert axes.get_title(loc="left").startswith(f"layer {head[0]}, KV head {head[1]}, score ")
    assert "30% needle, 20% sink, 40% recent" in figure.axes[0].get_title(loc="left")
    shares = attention_shares(maps, sample, window)
    left, right = plot_shares(shares, pattern).axes
    points = np.asarray(left.collections[0].get_offsets())
    np.testing.assert_allclose(points, [[pattern.scores[0, 1], 30], [pattern.scores[2, 0], 0]], rtol=1e-5)
    best = max(maps, key=lambda head: float(pattern.scores[head]))
    assert right.get_yticklabels()[0].get_text() == f"{best[0]}.{best[1]}"
