"""Head patterns scored on a model in memory, from Python."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

import duo_id
from duo_id.common.errors import UserError
from duo_id.evaluate.journal import write_results
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.report.summary import load_results
from tests.support.tiny import hooks_of, tiny_model

TOKENIZER = byte_tokenizer()
TASKS = ["json-lookup", "language"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Reads bytes, and long enough contexts."""
    return tiny_model("llama", vocab_size=len(TOKENIZER), max_position_embeddings=2048).requires_grad_(True)


PATTERN = duo_id.HeadPattern(torch.rand(3, 2, generator=torch.Generator().manual_seed(0)), 4, 16)


def scored(model: PreTrainedModel, **changes: Any) -> pd.DataFrame:
    arguments = {"tasks": TASKS, "lengths": 700, "samples": 2, "random_masks": 1, "baselines": [], "progress": False}
    return duo_id.evaluate_pattern(model, TOKENIZER, PATTERN, **arguments | changes)


def test_a_table_of_contenders_with_intervals(model: PreTrainedModel, tmp_path: Path) -> None:
    table = scored(model, sparsity=[0.25, 0.5])
    assert table[["kind", "sparsity"]].to_records(index=False).tolist() == [
        ("full", 0.0),
        ("pattern", 0.25),
        ("baseline", 0.25),
        ("pattern", 0.5),
        ("baseline", 0.5),
    ]
    assert (table["samples"] == 4).all()
    assert (table["loss_low"] <= table["loss"]).all()
    assert (table["loss"] <= table["loss_high"]).all()
    assert table.groupby("sparsity")["kept"].max().is_monotonic_decreasing
    assert table["rise"][0] == 0
    results = table.attrs["results"]
    assert {row["task"] for row in results["rows"]} == set(TASKS)
    write_results(tmp_path, results)
    read = load_results(tmp_path)
    assert {key: read[key] for key in ("schema", "version")} == {"schema": "duo_id/results", "version": 1}
    assert read["rows"] == results["rows"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hooks_of(model)


def test_shares_of_the_cache_at_each_length(model: PreTrainedModel) -> None:
    table = scored(model, tasks="language", cache=[0.6, 0.3], lengths=[700, 1400], baselines=["streaming"])
    assert table[["kind", "heads"]].to_records(index=False).tolist() == [
        ("full", "full"),
        *[("pattern", "pattern"), ("baseline", "random"), ("baseline", "streaming")] * 2,
    ]
    assert table["cache"].tolist()[1:] == [0.6] * 3 + [0.3] * 3
    assert table["sparsity"].isna().tolist() == [False] + [True] * 6
    kept = table.set_index(["heads", "cache"])["kept"]
    for cache in (0.6, 0.3):
        assert kept["pattern", cache] == kept["random", cache] == pytest.approx(cache, abs=1 / 6)
        assert kept["streaming", cache] == pytest.approx(cache, abs=0.002)
    rows = table.attrs["results"]["rows"]
    assert {(row["sparsity"], row["cache"]) for row in rows} == {(0.0, None), (None, 0.6), (None, 0.3)}
    for length in (700, 1400):
        assert len({row["bytes"] for row in rows if (row["length"], row["heads"]) == (length, "streaming")}) == 2
    both = scored(model, tasks="language", cache=0.5, sparsity=0.5, samples=1)
    assert both["budget"].map(str).tolist() == ["0% stream"] + ["50% stream"] * 2 + ["50% of cache"] * 2


def test_spans_of_a_pattern_that_has_needs(model: PreTrainedModel) -> None:
    """Each length has its own, which keep exactly the bytes that were allocated."""
    costs = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1)).sort(-1, descending=True)[0]
    needs = duo_id.SpanNeeds((16, 64, 256, -1), costs - costs[..., -1:])
    needy = duo_id.HeadPattern(PATTERN.scores, 4, 16, needs=needs)
    arguments = {"tasks": "language", "cache": [0.5, 0.25], "lengths": [700, 1400], "samples": 2, "progress": False}
    table = duo_id.evaluate_pattern(model, TOKENIZER, needy, **arguments, random_masks=1, baselines=["streaming"])
    assert table.loc[table["cache"] == 0.25, "kind"].tolist() == ["pattern", "spans", "baseline", "baseline"]
    rows = pd.DataFrame(table.attrs["results"]["rows"])
    full = rows[rows["kind"] == "full"].groupby("length")["bytes"].first()
    for (cache, length), spans in rows[rows["kind"] == "spans"].groupby(["cache", "length"]):
        share = needy.allocate(cache, length).cache_share(length)
        assert (spans["bytes"] == round(share * full[length])).all(), "every token of the text is in the cache"
        assert (spans["kl"] > 0).any()


def test_conversations_have_a_table_by_turn(model: PreTrainedModel) -> None:
    longer = tiny_model("llama", vocab_size=258, max_position_embeddings=4096)
    table = scored(longer, tasks="turns-json", lengths=3000, samples=1, generate=False, random_masks=0)
    turns = table.attrs["turns"]
    assert turns["turn"].tolist() == [1, 2, 3, 4, 5, 6] * len(table)
    by_turn = {row["turn"]: row for row in table.attrs["results"]["rows"] if row["kind"] == "full"}
    full = turns[turns["kind"] == "full"]
    assert full["loss"].tolist() == [row["loss"] / row["tokens"] for _, row in sorted(by_turn.items())]
    assert all(row["text"] is not None for row in by_turn.values()), "answers stay, whatever else is generated"
    assert "turns" not in scored(model, tasks="json-lookup", lengths=1500, samples=1, generate=False).attrs


def test_the_text_is_a_choice_and_recorded(model: PreTrainedModel, tmp_path: Path) -> None:
    words = [f"Word {number} is followed by word {number + 1}. " for number in range(2000)]
    (tmp_path / "mine.txt").write_text("".join(words))
    text = {"data.haystack.source": "file", "data.haystack.path": tmp_path / "mine.txt"}
    results = scored(model, tasks="language", **text).attrs["results"]
    recorded = results["settings"]["data"]["haystack"]
    assert (recorded["source"], len(recorded["sha256"])) == ("file", 64)
    part = 0.15 * sum(map(len, words))  # that of a file's test split
    assert results["text_reads"] == pytest.approx(2 * (700 + 1600) / part, rel=0.1), "with what is read beyond the hay"
    with pytest.raises(UserError, match=r"test part has .* needs 3\d\d\d: .*data.haystack.source=packages"):
        scored(model, tasks="language", lengths=1500, **text | {"data.haystack.path": _short(tmp_path / "short.txt")})


def _short(path: Path) -> Path:
    path.write_text("A short text. " * 300)
    return path


def test_presets_and_a_bar(model: PreTrainedModel) -> None:
    shown = io.StringIO()
    with redirect_stdout(shown):
        table = scored(model, tasks="quick", lengths=1500, samples=None, sparsity=0.5, progress=True, generate=False)
    assert len(table) == 3
    assert "Traceback" not in shown.getvalue()


def test_eviction_keeps_what_is_asked(model: PreTrainedModel) -> None:
    """In one table with the mask at the same share, also where answers lie inside the context."""
    scores = ["snapkv", "keydiff", "kvzip"]
    table = scored(model, cache=0.5, evict=scores, samples=1, random_masks=0, generate=False)
    kept = dict(zip(table["heads"], table["kept"], strict=True))
    assert kept.keys() == {"full", "pattern", *(f"pattern + {score}" for score in scores)}
    for score in scores:
        assert (0.49 if score == "keydiff" else 0.4999) < kept[f"pattern + {score}"] <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "quik"}, "^tasks: there is no quik"),
        ({"sparsity": 2}, r"^sparsity=2 must be at most 1"),
        ({"cache": 0}, "^cache=0 keeps nothing"),
        ({"cache": 1.5}, "^cache=1.5 must be at most 1"),
        ({"cache": 0.02}, r"heads of pattern: cache=0.02 at length=700 .*cache must be at least 0.0286; or raise"),
        ({"cache": [], "sparsity": []}, r"^sparsity=\[\] leaves nothing to compare"),
        ({"lengths": 5}, r"^lengths=5 is too short for json-lookup"),
        ({"nosuch": 1}, "^nosuch: there is no such argument or setting$"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=message):
        scored(model, **changes)


def test_a_pattern_of_another_model(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"is for 30 layers x 3 KV heads, but LlamaForCausalLM has 3 layers x 2"):
        duo_id.evaluate_pattern(model, TOKENIZER, duo_id.load_pattern("SmolLM2-135M-Instruct"))
