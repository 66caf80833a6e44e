"""Checkpoints with sorted heads: the same model, whose first heads retrieve."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from duo_id import HeadPattern, convert, duo_attention, load_pattern, save_pattern
from duo_id.common.errors import UserError
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.permuted_checkpoint import write_permuted_checkpoint
from duo_id.patterns.needs import SpanNeeds
from tests.support.tiny import tiny_model

SIZES = {"num_key_value_heads": 4, "num_attention_heads": 8, "tie_word_embeddings": False}
FAMILIES = {
    "llama": {"head_dim": 16},
    "qwen2": {},  # biases
    "qwen3": {"head_dim": 16},  # a norm that all heads share
    "olmo2": {},  # a norm across heads
    "phi3": {},  # one projection for queries, keys and values
}
TOKENS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))


def pattern_of(scores: Tensor, needs: SpanNeeds | None = None, gated: tuple[int, ...] | None = None) -> HeadPattern:
    return HeadPattern(scores, 2, 5, gated, {"method": "tests"}, needs)


SCORES = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))


def converted(tmp_path: Path, model: PreTrainedModel, pattern: HeadPattern, shards: str = "5GB") -> PreTrainedModel:
    """The model with sorted heads, in float32; its folder is tmp_path / "sorted"."""
    model.save_pretrained(tmp_path / "model", max_shard_size=shards)
    save_pattern(pattern, tmp_path / "run")
    convert.main([str(tmp_path / "run"), str(tmp_path / "sorted"), *ASKED, f"checkpoint={tmp_path / 'model'}"])
    return AutoModelForCausalLM.from_pretrained(tmp_path / "sorted", dtype=torch.float32).eval()


ASKED = ["format=permuted-checkpoint", "sparsity=0.5"]


def logits(model: PreTrainedModel, pattern: HeadPattern | None = None) -> Tensor:
    with torch.no_grad():
        if pattern is None:
            return model(TOKENS, use_cache=False).logits
        with duo_attention(model, pattern, sparsity=0.5):
            return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_same_and_so_is_its_mask(family: str, tmp_path: Path) -> None:
    model, pattern = tiny_model(family, **SIZES, **FAMILIES[family]), pattern_of(SCORES)
    again = converted(tmp_path, model, pattern)
    moved = load_pattern(tmp_path / "sorted")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again, moved), logits(model, pattern), rtol=1e-4, atol=1e-4)
    assert (logits(again, pattern) - logits(model, pattern)).abs().max() > 1e-2, "nothing was moved"
    retrieval = moved.binarize(sparsity=0.5).retrieval
    assert retrieval.equal(retrieval.sort(1, descending=True).values)


def test_shards_and_other_files_stay_what_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    again = converted(tmp_path, model, pattern_of(SCORES), shards="20KB")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "sorted").iterdir()} == {*names, "heads"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_weights_of_other_formats_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would be loaded unsorted; so would be those of an earlier checkpoint in the same folder."""
    (tmp_path / "model").mkdir()
    others = ["consolidated.00.safetensors", "pytorch_model.bin"]
    for name in others:
        (tmp_path / "model" / name).write_bytes(b"")
    converted(tmp_path, tiny_model("llama", **SIZES), pattern_of(SCORES))
    assert not {path.name for path in (tmp_path / "sorted").iterdir()} & set(others)
    assert f"left out, since they are not sorted: {', '.join(others)}" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match=r"sorted.model\.safetensors is there, and other weights .*: give another DST"):
        convert_to(tmp_path / "sorted", tmp_path)


def test_tensors_that_no_mask_covers_stay(tmp_path: Path) -> None:
    """Frequencies that all heads share, and layers beyond those of the model."""
    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    more["model.layers.3.self_attn.q_proj.weight"] = torch.rand(4, 4)
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    save_pattern(pattern_of(SCORES), tmp_path / "run")
    convert_to(tmp_path / "sorted", tmp_path)
    written = load_file(tmp_path / "sorted" / "model.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in more.items())


def convert_to(folder: Path, tmp_path: Path) -> None:
    """Sort tmp_path / "model" by the pattern in tmp_path / "run"; mistakes are raised."""
    options = Options(sparsity=0.5, checkpoint=str(tmp_path / "model"))
    write_permuted_checkpoint(load_pattern(tmp_path / "run"), folder, options)


def test_layers_without_gates_stay(tmp_path: Path) -> None:
    model, pattern = tiny_model("llama", **SIZES), pattern_of(SCORES.sort(1).values, gated=(1,))
    again = converted(tmp_path, model, pattern)
    for layer, same in enumerate((True, False, True)):
        weights = [x.model.layers[layer].self_attn.k_proj.weight for x in (model, again)]
        assert torch.equal(*weights) == same
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_scores_and_needs_move_with_the_heads(tmp_path: Path) -> None:
    needs = SpanNeeds((8, -1), torch.stack([SCORES, torch.zeros(3, 4)], -1))
    converted(tmp_path, tiny_model("llama", **SIZES), pattern_of(SCORES, needs))
    moved = load_pattern(tmp_path / "sorted")
    order = torch.tensor(moved.provenance["head_order"])
    assert moved.scores.equal(SCORES.gather(1, order))
    assert moved.needs is not None
    assert moved.needs.costs[..., 0].equal(moved.scores)


@pytest.mark.filterwarnings("ignore::duo_id.patterns.pattern.TieWarning")
def test_ties_stream_as_before(tmp_path: Path) -> None:
    """Of equal scores the first heads stream, which are not the first any more."""
    model, pattern = tiny_model("llama", **SIZES), pattern_of(torch.zeros(3, 4))
    again = converted(tmp_path, model, pattern)
    torch.testing.assert_close(
        logits(again, load_pattern(tmp_path / "sorted")), logits(model, pattern), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(UserError, match=message) as error:
            convert.main(list(map(str, (tmp_path / "run", tmp_path / "sorted", *arguments))))
        assert "\n" not in str(error.value)

    folder = tmp_path / "model"
    save_pattern(pattern_of(SCORES), tmp_path / "run")
    asked = (*ASKED, f"checkpoint={folder}")
    refused("^format=permuted-checkpoint sorts .*: set checkpoint=FOLDER", ASKED[0])
    refused(r"^format=permuted-checkpoint sorts .*: set sparsity=\.\.\.$", ASKED[0], asked[2])
    refused(f"^checkpoint={folder} holds no .safetensors$", *asked)
    tiny_model("llama", **SIZES, num_hidden_layers=2).save_pretrained(folder)
    refused("for 3 layers x 4 KV heads, but .*model has 2 layers x 4 KV heads$", *asked)
    tiny_model("llama", **SIZES).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    for changed, message in {
        "removed": "model: layer 1 has .*, where q_proj, k_proj, v_proj .* were expected, once each$",
        "quantised": rf"{key}_scale \(3\) is a tensor whose heads are not known: this model is not sorted$",
        "cut": rf"{key} \(5 x 32\) is a tensor whose heads are not known",
    }.items():
        others = {name: tensor for name, tensor in weights.items() if changed != "removed" or name != key}
        others |= {f"{key}_scale": torch.ones(3)} if changed == "quantised" else {}
        others |= {key: torch.ones(5, 32)} if changed == "cut" else {}
        save_file(others, folder / "model.safetensors")
        refused(message, *asked)
    (folder / "model.safetensors").write_bytes(b"nothing")
    refused("model.safetensors cannot be read: ", *asked)
