"""The bytes of caches over the context: those that real caches hold."""

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

from duo_id import HeadMask, dual_cache, duo_attention
from duo_id.common.errors import UserError
from duo_id.deploy.cache_memory import cache_bytes, plot_cache_bytes
from duo_id.patterns.spans import ALL, HeadSpans
from tests.support.tiny import tiny_model

MASK = HeadMask(torch.tensor([[True, False], [False, False], [True, True]]), 3, 5)


def test_bytes_are_those_that_a_cache_holds() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    full = HeadMask(torch.ones(3, 2, dtype=torch.bool), 3, 5)
    table = cache_bytes(model, {"full": full, "mask": MASK}, [6, 40])
    assert table.index.tolist() == [6, 40]
    for tokens in (6, 40):
        ids = torch.randint(3, 96, (1, tokens))
        plain = DynamicCache(config=model.config)
        model(ids, past_key_values=plain)
        assert table.loc[tokens, "full"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
        with duo_attention(model, MASK):
            cache = dual_cache(model)
            model(ids, past_key_values=cache)
            assert table.loc[tokens, "mask"] == cache.retained_bytes
    assert table.loc[40, "mask"] == 2 * 2 * 16 * (3 * 40 + 3 * 8)
    assert table.loc[6, "mask"] == table.loc[6, "full"], "nothing lies outside the window yet"


def test_each_head_stops_growing_at_its_span() -> None:
    model = tiny_model("llama")
    spans = HeadSpans(torch.tensor([[ALL, 1], [5, 60], [5, 500]]), 3)
    table = cache_bytes(model, {"spans": spans}, [2, 8, 63, 100, 1000])
    entries = [6 * 2, 8 * 5 + 4, 3 * 63 + 4 + 2 * 8, 2 * 100 + 4 + 2 * 8 + 63, 1000 + 4 + 2 * 8 + 63 + 503]
    assert table["spans"].tolist() == [2 * 4 * 16 * count for count in entries]


def test_sliding_windows_stop_growing_without_a_mask() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("gemma3_text", head_dim=16, sliding_window=8, layer_types=kinds)
    mask = HeadMask(torch.tensor([[True, True], [True, False], [True, True]]), 3, 5, (1,))
    table = cache_bytes(model, {"mask": mask}, [100, 200])
    assert table["mask"].tolist() == [2 * 4 * 16 * (4 * 8 + tokens + 8) for tokens in (100, 200)]


def test_figure_says_how_much_less() -> None:
    table = pd.DataFrame({"full attention": [2**20, 2**22], "half": [2**20, 2**21]}, index=[1000, 4000])
    figure = plot_cache_bytes(table, title="a model")
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 4], [1, 2]]
    assert list(axes.lines[0].get_xdata()) == [1, 4]
    assert [line.get_label() for line in axes.lines] == ["full attention", "half: 2.00x less"]
    assert axes.get_ylabel() == "KV cache of one sample (MiB)"
    assert plot_cache_bytes(table * 1024).axes[0].get_ylabel() == "KV cache of one sample (GiB)"
    with pytest.raises(UserError, match="nothing to plot"):
        plot_cache_bytes(table.iloc[:0])
