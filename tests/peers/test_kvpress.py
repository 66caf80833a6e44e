"""The command with kvpress itself, in the environment that it installs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.peers import read_answers
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.saved import load_pattern
from duo_id.peers.choices import PRESSES
from tests.peers.cases import (
    RECENT,
    SINK,
    TOKENS,
    answer_logits,
    cache_bytes,
    greedy,
    kept_tokens,
    make_items,
    measures,
    model_folder,
    write_run,
)
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-peers"
COMMAND = [sys.executable, "-m", "duo_id.peers"]
ITEMS = make_items()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVIRONMENT.exists(), reason="duo-id peers RUN install=true creates it"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def answered(folder: Path) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A model of one layer, in which what a head evicts is one mask, and the rows of all presses."""
    model = model_folder(folder / "model", num_hidden_layers=1)
    write_run(folder, folder / "model", ITEMS)
    command = [*COMMAND, folder, "presses=all", "device=cpu", f"environment={ENVIRONMENT}"]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return model, read_answers(folder, ITEMS)


def rows_of(answered: tuple[PreTrainedModel, list[dict[str, Any]]], press: str) -> list[tuple[dict, Item, Question]]:
    rows = [row for row in answered[1] if row["heads"] == press]
    assert len(rows) == 2 * 2 * 3
    return [(row, ITEMS[row["index"]], ITEMS[row["index"]].questions[row["question"]]) for row in rows]


def read_tokens(question: Question) -> int:
    return TOKENS if question.place is None else question.place - 1


@pytest.mark.parametrize("press", PRESSES)
def test_bytes_are_those_of_the_mask(answered: tuple[PreTrainedModel, list[dict[str, Any]]], press: str) -> None:
    model = answered[0]
    for row, _, question in rows_of(answered, press):
        tokens = read_tokens(question)
        kept: float = kept_tokens(row["sparsity"], tokens)
        if press in ("kvzip", "kvzip-plus", "kvgrad") and row["sparsity"]:
            kept += 0.5  # they count what goes, and round that down: one entry more, in two heads
        if press == "chunkkv":
            assert kept - 20 < row["bytes"] / cache_bytes(model, 1) <= kept
            continue
        if press == "duo-on-the-fly" and row["sparsity"]:
            kept = (tokens + SINK + RECENT) / 2  # whole heads, so nothing is rounded
        assert row["bytes"] == cache_bytes(model, kept)
        assert row["full_bytes"] == cache_bytes(model, tokens)


@pytest.mark.parametrize("press", PRESSES)
def test_nothing_evicted_is_full_attention(answered: tuple[PreTrainedModel, list[dict[str, Any]]], press: str) -> None:
    model = answered[0]
    for row, item, question in rows_of(answered, press):
        full = answer_logits(model, item, question)
        if row["sparsity"] == 0:
            loss, _, correct = measures(full, full, question.answer)
            assert row["loss"] == pytest.approx(loss, abs=1e-4)
            assert row["kl"] == pytest.approx(0, abs=1e-5)
            assert row["correct"] == correct
            if question.place is None:
                assert row["generated"] == greedy(model, [*item.context, *question.prompt], item.max_new_tokens)
        else:
            assert row["kl"] > 1e-4


def latest(model: PreTrainedModel, context: list[int], kept: int) -> Tensor:
    places = torch.arange(len(context))
    return ((places < 4) | (places >= len(context) - kept + 4))[None]


def small_keys(model: PreTrainedModel, context: list[int], kept: int) -> Tensor:
    layer, config = model.model.layers[0], model.config
    keys = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(torch.tensor(context))))
    norms = keys.view(len(context), config.num_key_value_heads, config.head_dim).norm(dim=-1)
    smallest = norms.T.argsort(-1)[:, :kept]
    mask = torch.zeros(norms.T.shape, dtype=torch.bool).scatter_(1, smallest, True)
    return mask.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0)


def attentive(model: PreTrainedModel, context: list[int], kept: int) -> Tensor:
    """What any token attends to when the context is read again, averaged over the heads of a group and over groups."""
    tokens, config = len(context), model.config
    implementation = config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([[*context, *context]]), output_attentions=True).attentions[0][0]
    model.set_attn_implementation(implementation)
    groups = config.num_attention_heads // config.num_key_value_heads
    scores = weights[:, tokens:, :tokens].amax(1).unflatten(0, (-1, groups)).mean(1)
    most = (scores + scores.mean(0)).argsort(-1, descending=True)[:, :kept]
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, most, True)
    return mask.repeat_interleave(groups, 0)


def unlike_the_mean(model: PreTrainedModel, context: list[int], kept: int) -> Tensor:
    keys = F.normalize(model(torch.tensor([context])).past_key_values.layers[0].keys[0], dim=-1)
    least = (keys * keys.mean(1, keepdim=True)).sum(-1).argsort(-1)[:, :kept]
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool).scatter_(1, least, True)
    return mask.repeat_interleave(model.config.num_attention_heads // len(mask), 0)


@pytest.mark.parametrize(
    ("press", "keep"),
    [
        ("streaming-llm", latest),
        ("knorm", small_keys),
        ("keydiff", unlike_the_mean),
        ("kvcompose", attentive),
    ],
)
def test_what_is_kept_is_what_the_press_says(
    answered: tuple[PreTrainedModel, list[dict[str, Any]]], press: str, keep: Callable[..., Tensor]
) -> None:
    model = answered[0]
    for row, item, question in rows_of(answered, press):
        tokens = read_tokens(question)
        mask = keep(model, list(item.context[:tokens]), kept_tokens(row["sparsity"], tokens))
        full, logits = answer_logits(model, item, question), answer_logits(model, item, question, mask)
        loss, kl, _ = measures(logits, full, question.answer)
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)


def test_static_heads_are_masked_over_the_windows_of_the_mask(
    folder: Path, answered: tuple[PreTrainedModel, list[dict[str, Any]]]
) -> None:
    """One of the two heads streams: the one that the head pattern of these scores has streaming."""
    finished = subprocess.run(
        [*COMMAND, folder, "heads=true", f"environment={ENVIRONMENT}"], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    pattern = load_pattern(folder / "heads-duo-on-the-fly")
    assert (pattern.sink_size, pattern.recent_size) == (SINK, RECENT)
    retrieval = pattern.binarize(sparsity=0.5).retrieval[0]
    assert sorted(retrieval.tolist()) == [False, True]
    model = answered[0]
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for row, item, question in rows_of(answered, "duo-on-the-fly"):
        if row["sparsity"] == 0.5:
            tokens = read_tokens(question)
            places = torch.arange(tokens)
            window = (places < SINK) | (places >= tokens - RECENT)
            mask = (retrieval[:, None] | window).repeat_interleave(groups, 0)
            full, logits = answer_logits(model, item, question), answer_logits(model, item, question, mask)
            assert row["loss"] == pytest.approx(measures(logits, full, question.answer)[0], abs=1e-4)


def test_several_layers_share_one_budget(tmp_path: Path) -> None:
    """In a model whose configuration does not tell the size of a head."""
    model = tiny_model("qwen2", vocab_size=258, hidden_size=256)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_run(tmp_path, tmp_path / "model", ITEMS)
    presses = ("kvcompose", "critical-snapkv", "critical-ada-snapkv", "kvgrad")
    command = [*COMMAND, tmp_path, f"presses={','.join(presses)}", "device=cpu", f"environment={ENVIRONMENT}"]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    entry = cache_bytes(model, 1)
    for row in read_answers(tmp_path, ITEMS):
        kept = kept_tokens(row["sparsity"], read_tokens(ITEMS[row["index"]].questions[row["question"]]))
        assert kept <= row["bytes"] / entry <= kept + 1
        assert (row["kl"] > 1e-4) == (row["sparsity"] > 0)


def test_settings_are_told(answered: tuple[PreTrainedModel, list[dict[str, Any]]], tmp_path: Path) -> None:
    notes = {row["heads"]: row["note"] for row in answered[1]}
    assert notes.keys() == set(PRESSES)
    assert all("prefill attends in full" in note for note in notes.values())
    masking = {"kvzip", "kvzip-plus", "kvgrad", "duo-on-the-fly"} | {press for press in PRESSES if "ada-" in press}
    assert {press for press, note in notes.items() if "without freeing" in note} == masking
    write_run(tmp_path, tmp_path / "nothing", ITEMS)
    subprocess.run([*COMMAND, tmp_path, "presses=ada-snapkv", f"environment={ENVIRONMENT}"], capture_output=True)
    header = json.loads((tmp_path / "answers-ada-snapkv.jsonl").read_text().splitlines()[0])
    assert header["settings"] == {"press": {"window_size": 64, "kernel_size": 5}, "alpha_safeguard": 0.2}
    assert header["versions"]["kvpress"] == "0.5.5"
