"""Models from a wheel, a folder, the hub or nothing: frozen, in eval mode, and read as transformers reads them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError
from duo_id.models.loading import byte_tokenizer, load_model, load_tokenizer
from duo_id.models.settings import ModelSettings
from duo_id.train.settings import TrainSettings
from tests.support.commands import settings_of

# How many parameters each shape has, so that a changed number in a YAML is noticed.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama2-7b-32k": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "qwen3-4b": 4_022_468_096,
    "gemma3-270m": 268_098_176,
    "tiny": 44_384,
}
NAMED = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml") if path.stem != "hub")


def check_frozen(model: PreTrainedModel) -> None:
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_the_wheel_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    config = AutoConfig.for_model("llama", hidden_size=8, num_attention_heads=2)

    def answer(kind: str, result: Any) -> Callable[..., Any]:
        return lambda source, **kwargs: (asked.update({kind: (source, kwargs)}), result)[1]

    model = torch.nn.Linear(1, 1)
    model.config, model.get_output_embeddings = config, lambda: None
    monkeypatch.setattr(AutoConfig, "from_pretrained", answer("config", config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", answer("model", model))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", answer("tokenizer", byte_tokenizer()))
    settings = ModelSettings(
        name="any", id="any/model", revision="v1", wheel="no-such-distribution", config={"sliding_window": None}
    )
    load_model(settings)
    assert {source for source, _ in asked.values()} == {"any/model"}
    for _, kwargs in asked.values():
        assert kwargs["revision"] == "v1"
        assert kwargs["trust_remote_code"] is False
    given = asked["model"][1]
    assert given["dtype"] == torch.float32  # auto on the CPU
    assert given["device_map"] == {"": torch.device("cpu")}
    assert given["config"].sliding_window is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_cannot_be_reached_is_one_line(
    load: Callable[[ModelSettings], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="connect") as raised:
        load(ModelSettings(name="any", id="any/model"))
    assert "model.id=any/model" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        for folder, reason in ((tmp_path / "nosuch", "there is no such folder"), (tmp_path, "has no config.json")):
            with pytest.raises(UserError, match=rf"^model\.id={folder} .*{reason}") as raised:
                load(ModelSettings(name="any", id=str(folder)))
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_local_folder_loads(dtype: str, tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    saved = make_model("qwen3")
    saved.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = ["model=hub", f"model.id={tmp_path / 'model'}", f"model.dtype={dtype}"]
    settings = settings_of("train", TrainSettings, *options, "+model.config.rms_norm_eps=0.5", folder=tmp_path).model
    loaded = load_model(settings)
    check_frozen(loaded.model)
    assert loaded.model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert loaded.model.config.rms_norm_eps == 0.5
    assert loaded.name == str(tmp_path / "model")
    assert loaded.source == str(tmp_path / "model")
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor.float(), saved.state_dict()[name], atol=0, rtol=0.01)
    assert loaded.tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "terminal"])
@pytest.mark.parametrize("shown", [True, False], ids=["shown", "disabled"])
def test_without_a_terminal_loading_shows_no_bar(
    terminal: bool,
    shown: bool,
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_model("qwen3").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        capsys.readouterr()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        load_model(ModelSettings(id=str(tmp_path)))
        assert ("Loading weights" in capsys.readouterr().err) == (terminal and shown)
        assert logging.is_progress_bar_enabled() == shown
        disable_progress_bars()
        load_model(ModelSettings(id=str(tmp_path)))
        assert are_progress_bars_disabled()
    finally:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """The hub is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("random weights need no hub")

    with pytest.MonkeyPatch.context() as patch:
        for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
            patch.setattr(kind, "from_pretrained", refuse)
        yield


@pytest.mark.parametrize("name", NAMED)
def test_random_models_have_the_shape_of_their_yaml(name: str, offline: None, tmp_path: Path) -> None:
    settings = settings_of("train", TrainSettings, f"model={name}", "model.init=random", folder=tmp_path).model
    loaded = load_model(settings, "meta")
    check_frozen(loaded.model)
    config, numbers = loaded.model.config, settings.architecture
    for key, value in numbers.items():
        if key != "rope_parameters":
            assert getattr(config, key) == value, key
    for key, value in numbers.get("rope_parameters", {}).items():
        assert config.rope_parameters[key] == value
    assert loaded.max_length == numbers["max_position_embeddings"]
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in NAMED if name != "tiny"])
def test_random_models_compute_at_a_smaller_size(name: str, offline: None) -> None:
    path = conf_dir() / "model" / f"{name}.yaml"
    numbers = OmegaConf.to_object(OmegaConf.load(path).architecture)
    numbers |= {"num_hidden_layers": 2, "hidden_size": 8 * numbers["num_attention_heads"], "head_dim": 8}
    numbers |= {"intermediate_size": 32, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    loaded = load_model(ModelSettings(name=name, id=name, init="random", architecture=numbers))
    check_frozen(loaded.model)
    batch = {"input_ids": loaded.tokenizer("some text", return_tensors="pt")["input_ids"], "attention_mask": None}
    states = loaded.hidden_states(batch)
    assert states.shape == (1, 10, numbers["hidden_size"])
    assert states.isfinite().all()


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    settings = settings_of("train", TrainSettings, "model=tiny", folder=tmp_path).model
    state = torch.get_rng_state()
    first, again, other = (load_model(settings, seed=seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_are_as_the_inner_model_makes_them() -> None:
    """Gemma 3n's function for initial weights works as a method of its trunk alone."""
    numbers = {
        "model_type": "gemma3n_text", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 258,
        "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2,
    }  # fmt: skip
    model = load_model(ModelSettings(name="any", id="any", init="random", architecture=numbers)).model
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.get_input_embeddings().weight.std() > 0


def test_an_impossible_architecture_is_one_line() -> None:
    uneven = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 9}
    for numbers in ({"model_type": "nosuch"}, {"num_hidden_layers": 2}, uneven):
        with pytest.raises(UserError, match=r"model\.architecture") as raised:
            load_model(ModelSettings(name="any", id="any", init="random", architecture=numbers))
        assert "\n" not in str(raised.value)
    assert "64" in str(raised.value), "the reason, not that there is one"


def test_byte_tokenizer_reads_any_text_and_puts_bos_in_front() -> None:
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界!\n\t  two  spaces <bos>"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False).input_ids]
    assert len(tokenizer) == 258
