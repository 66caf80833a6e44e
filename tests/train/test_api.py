"""Heads of a model in memory, found from Python."""

import gc
import io
import json
import logging
import os
import random
import signal
import weakref
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import count, cycle
from pathlib import Path
from typing import Any

import datasets
import hydra
import numpy as np
import pandas
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

import duo_id
from duo_id.common.composing import compose
from duo_id.common.config import conf_dir, plain
from duo_id.common.errors import UserError
from duo_id.data.__main__ import generate
from duo_id.data.in_memory import SampleList, read_data
from duo_id.data.samples import UNSCORED
from duo_id.methods.candidates import MaskLosses
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.patterns.pattern import HeadPattern
from duo_id.train.fitting import train_settings
from duo_id.train.gate_training import GateTraining
from tests.support.tiny import hooks_of, tiny_model

TOKENIZER = byte_tokenizer()
SMALL: dict[str, Any] = {"data.num_passkeys": 1, "data.passkey_words": 2}
BYTES = len(TOKENIZER)


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny model that reads bytes, as its owner has it: in training mode, with gradients."""
    return tiny_model("llama", vocab_size=BYTES).train().requires_grad_(True)


def found(model: Any, **changes: Any) -> HeadPattern:
    arguments = {"data": "passkey", "steps": 2, "lengths": (400, 450), "progress": False} | SMALL | changes
    data = arguments.pop("data")
    return duo_id.identify(model, TOKENIZER, data, **arguments)


def test_long_samples_of_packages(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"training": [f"Line {number} of a long text. " * 20 for number in range(60)]}
    monkeypatch.setattr("duo_id.data.haystack.package_docstrings", texts.__getitem__)
    provenance = found(model, **{"data.haystack.source": "packages"}).provenance
    text = provenance["settings"]["data"]["haystack"]
    assert (text["source"], len(text["sha256"])) == ("packages", 64)
    assert {"accelerate", "torch", "transformers"} < provenance["versions"].keys()


def test_lengths_default_to_those_of_the_command(model: PreTrainedModel) -> None:
    settings = found(model, data="text", lengths=None, steps=1).provenance["settings"]
    assert (settings["data"]["length_min"], settings["data"]["length_max"]) == (256, 384)


def test_spans_are_found_allocated_and_deployed(model: PreTrainedModel) -> None:
    pattern = found(model, method="spans", steps=None, samples=3, curvature_samples=1, sink_size=4, recent_size=32)
    assert pattern.needs is not None
    assert pattern.needs.levels == (16, 32, 64, 128, 256, -1)
    spans = pattern.allocate(cache=0.3, length=450)
    with duo_id.duo_attention(model.eval(), spans):
        cache = duo_id.dual_cache(model)
        duo_id.prefill(model, torch.randint(3, 200, (1, 450)), cache)
    full = 2 * 450 * spans.spans.numel() * model.config.head_dim * 4
    assert 0.25 * full < cache.retained_bytes <= 0.3 * full


@pytest.mark.parametrize(
    ("longest", "limit", "expected"),
    [(300, 512, (256, 300)), (200, 512, (200, 200)), (2400, 4096, (300, 2400)), (None, 300, (256, 300))],
    ids=["a little longer than the default", "shorter", "an eighth", "the model's limit"],
)
def test_the_longest_length_alone_leaves_room_for_the_task(
    longest: int | None, limit: int, expected: tuple[int, int]
) -> None:
    model = tiny_model("llama", vocab_size=BYTES, max_position_embeddings=limit)
    settings = found(model, data="text", lengths=longest, method="random").provenance["settings"]
    assert (settings["data"]["length_min"], settings["data"]["length_max"]) == expected


def test_samples_on_disk(model: PreTrainedModel, tmp_path: Path) -> None:
    sizes = ("n=2", "n_validation=0", "n_test=0", "data.length_min=400", "data.length_max=450")
    passkeys = ("data.num_passkeys=1", "data.passkey_words=2")
    generate(compose("data_gen", ["model=tiny", f"out={tmp_path / 'samples'}", *sizes, *passkeys]))
    given = {"data.path": str(tmp_path / "samples"), "sink_size": 2, "recent_size": 8}
    pattern = duo_id.identify(model, TOKENIZER, "disk", steps=1, progress=False, **given)
    assert pattern.provenance["settings"]["data"]["task"] == "disk"


def test_a_pattern_comes_out_and_the_model_is_as_it_was(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pattern = found(model, sink_size=4, recent_size=32, seed=3, lr=0.5)
    assert pattern.scores.shape == (3, 2)
    assert len(pattern.scores.unique()) > 1
    assert (pattern.sink_size, pattern.recent_size) == (4, 32)
    settings = pattern.provenance["settings"]
    assert (settings["method"]["lr"], settings["trainer"]["max_steps"], pattern.provenance["seed"]) == (0.5, 2, 3)
    assert (settings["data"]["task"], settings["data"]["length_min"], settings["data"]["length_max"]) == (
        "passkey",
        400,
        450,
    )
    assert pattern.provenance["model"]["source"] == "memory"
    assert pattern.provenance["steps"] == 2
    assert plain(train_settings(settings))["method"] == settings["method"], "what is recorded can be read again"
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hooks_of(model)
    assert model.config._attn_implementation != "duo_id"


def test_the_same_seed_finds_the_same_and_random_states_are_left_alone(model: PreTrainedModel) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = found(model, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(found(model, seed=5).scores, first.scores)
    assert not torch.equal(found(model, seed=6).scores, first.scores)


@pytest.mark.parametrize("method", ["saliency", "random", "attention_profile"])
def test_every_method_can_be_asked_for(method: str, model: PreTrainedModel) -> None:
    pattern = found(model, method=method, **({} if method == "random" else {"samples": 1}))
    assert pattern.provenance["settings"]["method"]["name"] == method
    assert len(pattern.scores.unique()) > 1


def test_adapters_and_compiled_models_are_looked_into(model: PreTrainedModel) -> None:
    plain_scores = found(model).scores
    assert torch.equal(found(torch.compile(model)).scores, plain_scores)
    assert "adapters" not in found(model, method="random").provenance["model"]
    config = LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="poems")
    adapted.peft_config["poems"].base_model_name_or_path = "of/mine"
    pattern = found(adapted)
    assert not torch.equal(pattern.scores, plain_scores), "the adapter's part in the keys counts"
    adapter = {"name": "poems", "type": "LORA", "base_model_name_or_path": "of/mine", "r": 4, "lora_alpha": 8}
    recorded = [adapter | {"target_modules": ["k_proj", "q_proj"]}]
    assert pattern.provenance["model"]["adapters"] == recorded
    json.dumps(pattern.provenance)
    compiled = found(torch.compile(adapted), method="random")
    assert compiled.provenance["model"]["adapters"] == recorded
    with adapted.disable_adapter():
        assert "adapters" not in found(adapted, method="random").provenance["model"]


def test_nothing_keeps_the_model_in_memory() -> None:
    model = tiny_model("llama", vocab_size=BYTES)
    found(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40, "Pack my box with five dozen jugs. " * 40]
ROWS = [{"input_ids": list(range(3, 143)), "labels": [UNSCORED] * 130 + list(range(133, 143))} for _ in range(3)]


class EndlessRows(IterableDataset):
    """Rows without end, as of a corpus that streams."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The same row again and again."""
        return iter(cycle(ROWS))


class MoreRows(EndlessRows):
    """Rows that say how many they are, and go on."""

    def __len__(self) -> int:
        """Fewer than there are."""
        return 2


def batch_with_padding() -> dict[str, torch.Tensor]:
    ids, labels = (torch.tensor([row[key] for row in ROWS[:2]]) for key in ("input_ids", "labels"))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (TEXTS, "far"),
        (datasets.Dataset.from_dict({"text": TEXTS}), "far"),
        (datasets.Dataset.from_list(ROWS), "labelled"),
        (DataLoader(datasets.Dataset.from_list(ROWS).with_format("torch"), batch_size=2, shuffle=True), "labelled"),
        ([batch_with_padding()], "labelled"),
    ],
    ids=["texts", "data set of texts", "data set of tokens", "loader", "padded batch"],
)
def test_ones_own_data(data: Any, tokens: str, model: PreTrainedModel) -> None:
    pattern = found(model, data=data, lengths=(120, 140), sink_size=2, recent_size=30)
    assert len(pattern.scores.unique()) > 1
    assert pattern.provenance["settings"]["method"]["tokens"] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2.0}, "^steps=2.0 must be a whole number$"),
        ({"progress": "x"}, "^progress=x must be true or false$"),
        ({"data": ["A text.", None]}, "^data: the first row is a text, and another of type NoneType$"),
        (
            {"data": datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})},
            "holds splits: give one of train$",
        ),
        ({"data": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}, "^data: a data set that streams may have"),
        ({"data": ROWS, "method": "saliency"}, "^8 train samples are requested, but data has 3: lower samples$"),
        ({"data.haystack.path": "book.txt"}, "embedded reads no file, choose data.haystack.source=file$"),
        ({"data": DataLoader(EndlessRows())}, r"^data: a DataLoader without a length may have no end: give a list of"),
        ({"data": ({} for _ in count())}, "^data: a generator without a length may have no end"),
        ({"method": "nestd"}, r"^method='nestd': choose one of .*nested.*, did you mean nested\?$"),
        ({"data": "mixtre"}, r"^data='mixtre': choose one of .*mixture.*, did you mean mixture\?$"),
        ({"lrr": 1}, r"^lrr: .*did you mean lr\?$"),
        ({"method.lrr": 1}, r"^lrr=1: there is no such setting, did you mean lr\?$"),
        ({"objective": {"kl": -1}}, r"^objective\.kl=-1 must be a positive weight"),
        ({"optimizer._target_": "nosuch.Optimizer"}, r"^optimizer\._target_=nosuch\.Optimizer"),
        ({"prior": {"name": "reconstruction", "samples": 0}}, r"^prior\.samples=0 must be at least 1"),
        ({"steps": 0}, "^steps=0 must be at least 1"),
        ({"lengths": (20, 90), "sink_size": 40}, r"must be below lengths\[0\]=20, or nothing lies outside"),
        ({"lengths": 9000}, r"^lengths\[1\]=9000 exceeds the 512 tokens that the model takes: lower it$"),
        ({"nosuch.key": 1}, r"^nosuch\.key: there is no such argument or setting$"),
        ({"data": []}, "^data is empty$"),
        ({"data": 3}, "^data: int is not the name of a task, texts"),
        ({"data": [3]}, "^data: a row is of type int: give the name of a task"),
        (
            {"data": ["A short text."]},
            "^data: the text has about .* tokens, but a sample needs 450: lower lengths or give more texts$",
        ),
        ({"data": pandas.DataFrame({"text": TEXTS})}, "^data: DataFrame is not the name of a task"),
        ({"data": datasets.Dataset.from_dict({"body": TEXTS})}, "^data: the data set has columns body, neither text"),
        (
            {"data": [{"input_ids": [1, 2], "labels": [1]}]},
            r"^data: input_ids have the shape \(1, 2\), labels \(1, 1\)",
        ),
        ({"data": [{"input_ids": [1, 2], "labels": [2, 1]}]}, "they are not shifted$"),
        ({"data": [{"input_ids": [1.5, 2], "labels": [1.5, 2]}]}, "not whole numbers"),
        ({"data": [{"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}]}, "^data: input_ids of a row are not whole"),
        ({"data": [{"input_ids": [7, 999], "labels": [7, 999]}]}, "not all in the model's vocabulary of 258$"),
        ({"data": [{"input_ids": [5] * 20, "labels": [5] * 20}]}, "must be below the 20 tokens of the longest sample"),
        ({"trainer.devices": 2}, "^trainer.devices: identify makes one run"),
        ({"repeats": 3}, "^repeats: identify makes one run"),
        ({"step.shard": True}, "^step.shard: identify makes one run"),
        ({"trainer.max_steps": 3}, "^steps is given twice: as an argument and as an override$"),
        ({"lengths": (1, 2, 3)}, r"^lengths=\(1, 2, 3\) must be a number of tokens, or a pair"),
        ({"seed": None}, "^seed=None must be a whole number"),
        ({"seed": -1}, "^seed=-1 must be a whole number from 0"),
        ({"sink_size": "a"}, "^sink_size='a' must be a whole number$"),
        ({"prior": 3}, "^prior: a int is neither"),
        ({"prior": {"name": "nestd"}}, "^prior.name='nestd': choose one of"),
        ({"data": [{"input_ids": [1, 2], "labels": [UNSCORED] * 2}]}, "nothing in it can be scored$"),
        ({"data": [{"input_ids": [5] * 600, "labels": [5] * 600}]}, "a sample has 600 tokens, and the model takes 512"),
        ({"lengths": (10, 5)}, r"^lengths\[1\]=5 must not be below lengths\[0\]=10$"),
        ({"on_interrupt": "stop"}, "^on_interrupt='stop': choose raise or return$"),
        ({"sink_size": -1}, "^sink_size=-1 must be at least 0"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=message):
        found(model, **changes)
    assert model.training


def test_other_things_are_no_models(model: PreTrainedModel) -> None:
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match=r"^model: a learned prompt stands before every text"):
        found(prompted)
    with pytest.raises(UserError, match=r"^a Linear is not a transformers model"):
        found(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^tokenizer: a function is no tokenizer"):
        duo_id.identify(model, lambda text: text)
    with pytest.raises(UserError, match=r"^tokenizer: it has 258 tokens and the model 96: give the one that the model"):
        duo_id.identify(tiny_model("llama"), TOKENIZER)
    with pytest.raises(UserError, match=r"^model: a LlamaModel predicts no tokens"):
        found(model.model)
    with pytest.raises(UserError, match=r"^model: weights on the meta device hold no numbers"):
        found(tiny_model("llama", vocab_size=BYTES).to("meta"))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match=r"^model: its layers lie on several devices \(0, 1\)"):
        found(model)


def test_quiet_or_with_a_bar(model: PreTrainedModel, capfd: pytest.CaptureFixture[str]) -> None:
    found(model)
    assert capfd.readouterr() == ("", "")
    shown = io.StringIO()
    with redirect_stdout(shown):
        found(model, progress=True)
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("LlamaForCausalLM on cpu: 3 layers x 2 KV heads, method=nested, 2 steps")
    assert "step 2/2" in shown.getvalue()
    assert "Trainer" not in shown.getvalue(), "Lightning says nothing of itself"
    assert logging.getLogger("lightning.pytorch").level != logging.ERROR


def test_inside_another_application_of_hydra(model: PreTrainedModel) -> None:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        found(model)
        assert GlobalHydra.instance().hydra is outer


@pytest.mark.parametrize("method", ["nested", "search"])
def test_an_interrupted_run_raises_or_returns_what_it_has(
    method: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def interrupted(original: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        return step

    owner, name = (GateTraining, "training_step") if method == "nested" else (MaskLosses, "__call__")
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    wanted = {"method": method, "steps": 50} | ({} if method == "nested" else {"samples": 1})
    with pytest.raises(KeyboardInterrupt):
        found(model, **wanted)
    steps.clear()
    pattern = found(model, on_interrupt="return", **wanted)
    assert pattern.provenance["interrupted"] is True
    assert len(steps) < 50
    assert len(pattern.scores.unique()) > 1
    assert model.training
    assert not hooks_of(model)


def test_handlers_environment_and_generators_stay(model: PreTrainedModel) -> None:
    """Also after a failure in the middle; the user's own seed in the environment is theirs."""
    os.environ["PL_GLOBAL_SEED"] = "77"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    states = torch.get_rng_state(), random.getstate()
    try:
        found(model)
        with pytest.raises(UserError):
            found(model, data=[{"input_ids": [1, 2], "labels": [2, 1]}])
        assert os.environ["PL_GLOBAL_SEED"] == "77"
    finally:
        del os.environ["PL_GLOBAL_SEED"]
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ] == handlers
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_no_more_is_read_than_the_length_says() -> None:
    rows = read_data(MoreRows(), "text", BYTES)
    assert isinstance(rows, SampleList)
    assert len(rows) == 2


def test_a_shuffled_loader_is_drawn_by_the_seed(model: PreTrainedModel) -> None:
    rows = [
        {"input_ids": [3 + (7 * index * row) % 200 for index in range(140)], "labels": [UNSCORED] * 140}
        for row in (1, 3, 5, 9)
    ]
    for row in rows:
        row["labels"][100:] = row["input_ids"][100:]
    loader = DataLoader(datasets.Dataset.from_list(rows).with_format("torch"), shuffle=True)
    given = {"data": loader, "sink_size": 2, "recent_size": 30, "lengths": None}
    first, again = found(model, **given, seed=1), found(model, **given, seed=1)
    assert torch.equal(first.scores, again.scores)


def test_another_method_by_name_has_the_settings_of_its_file(model: PreTrainedModel) -> None:
    pattern = found(model, prior="reconstruction", prior_weight=0.5)
    prior = pattern.provenance["settings"]["method"]["prior"]
    assert (prior["name"], prior["samples"]) == ("reconstruction", 4)
    changed = found(model, prior={"name": "reconstruction", "samples": 1}, prior_weight=0.5)
    assert changed.provenance["settings"]["method"]["prior"]["samples"] == 1


def test_a_pattern_in_memory_is_a_prior_as_its_folder_is(model: PreTrainedModel, tmp_path: Path) -> None:
    prior = HeadPattern(torch.rand(3, 2), 4, 8)
    prior.save(tmp_path)
    mixed = found(model, prior=prior, prior_weight=0.5)
    assert torch.equal(mixed.scores, found(model, prior=str(tmp_path), prior_weight=0.5).scores)
    assert not torch.equal(mixed.scores, found(model).scores)
    recorded = mixed.provenance["settings"]["method"]["prior"]
    assert recorded.startswith("HeadPattern in memory, scores sha256 ")
    others = HeadPattern(prior.scores + 1e-3, 4, 8)
    assert found(model, prior=others).provenance["settings"]["method"]["prior"] != recorded
    search = {"method": "search", "samples": 1, "between": [0.5, 1.0]}
    assert torch.equal(found(model, start=prior, **search).scores, found(model, start=str(tmp_path), **search).scores)
    with pytest.raises(UserError, match=r"^prior=HeadPattern in memory, .*: this head pattern is for 5 layers x 2 KV"):
        found(model, prior=HeadPattern(torch.rand(5, 2), 4, 8))
    with pytest.raises(UserError, match=r"^lr=HeadPattern in memory, .* must be a number"):
        found(model, lr=prior)


def test_an_interrupt_in_a_prior_is_not_taken_for_the_end_of_training(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskLosses, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found(model, prior={"name": "search", "samples": 1}, on_interrupt="return")


def test_numbers_of_numpy_are_numbers(model: PreTrainedModel) -> None:
    settings = found(model, seed=np.int64(3), sink_size=np.int64(4), lr=np.float32(0.5), budgets=np.array([0.5, 0.75]))
    method = settings.provenance["settings"]["method"]
    assert (method["sink_size"], method["lr"], method["budgets"]) == (4, 0.5, [0.5, 0.75])
