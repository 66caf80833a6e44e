"""Models from a wheel, a folder, the hub or nothing: frozen, in eval mode, and read as transformers reads them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer, load_model, load_tokenizer
from duo_id.models.settings import ModelSettings
from duo_id.train.settings import TrainSettings
from tests.support import families
from tests.support.commands import settings_of
from tests.support.tiny import compute_all_logits

# How many parameters each shape has, so that a changed number in a YAML is noticed.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama2-7b-32k": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
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
    model.config = config
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


def wrapped(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_states_and_logits_are_those_of_the_model(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model(family), tokens(2, 17)
    expected = model(ids, output_hidden_states=True)
    batch = {"input_ids": ids, "attention_mask": None}
    states = wrapped(model).hidden_states(batch)
    torch.testing.assert_close(states, expected.hidden_states[-1])
    positions = torch.tensor([0, 5, 16])
    torch.testing.assert_close(wrapped(model).logits(states[:, positions]), expected.logits[:, positions])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])  # the last learns a vector for each position
def test_padding_changes_no_real_token(side: str, family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model(family), tokens(1, 11)
    alone = model(ids, output_hidden_states=True)
    real = slice(6, 17) if side == "left" else slice(0, 11)
    padded, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.bool)
    padded[0, real], mask[0, real] = ids[0], True
    padded[1], mask[1] = tokens(17), True
    batch = {"input_ids": padded, "attention_mask": mask}
    states = wrapped(model).hidden_states(batch)[:1, real]
    torch.testing.assert_close(states, alone.hidden_states[-1], atol=1e-5, rtol=1e-5)
    logits = wrapped(model).logits(states[:, -3:])
    torch.testing.assert_close(logits, alone.logits[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["roberta", "camembert", "data2vec-text", "opt", "biogpt"])
def test_padding_changes_no_real_token_where_positions_do_not_begin_at_0(side: str, family: str) -> None:
    model, ids = wrapped(families.tiny_model(family)), tokens(1, 11).clamp(max=89)
    alone = model.hidden_states({"input_ids": ids, "attention_mask": None})
    placed = {"input_ids": ids, "attention_mask": None, "position_ids": torch.arange(11)[None]}
    torch.testing.assert_close(model.hidden_states(placed), alone)
    real = slice(6, 17) if side == "left" else slice(0, 11)
    padded, mask = torch.zeros(1, 17, dtype=torch.long), torch.zeros(1, 17, dtype=torch.bool)
    padded[0, real], mask[0, real] = ids[0], True
    states = model.hidden_states({"input_ids": padded, "attention_mask": mask})[:, real]
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)


def test_only_the_wanted_logits_are_computed(make_model: Callable[..., PreTrainedModel]) -> None:
    model, seen = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    states = wrapped(model).hidden_states({"input_ids": tokens(1, 20)})
    assert seen == []
    wrapped(model).logits(states[0, [3, 4]])
    assert seen == [2]


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_logits_keep_the_shape_of_their_states(leading: tuple[int, ...], make_model: Callable[..., Any]) -> None:
    model = wrapped(make_model("llama"))
    states = torch.randn(*leading, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = states @ model.model.lm_head.weight.T
    torch.testing.assert_close(model.logits(states), expected)
    torch.testing.assert_close(model.logits(states[..., :0, :]), expected[..., :0, :])


def test_layers_run_again_after_logits_even_after_an_exception(make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model("llama"), tokens(1, 20)
    expected, trunk = model(ids).logits, model.model
    states = wrapped(model).hidden_states({"input_ids": ids})
    own_forward = trunk.forward

    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    for replaced in (False, True):  # such as by a library that wraps the forward of a module
        if replaced:
            trunk.forward = own_forward
        hook = model.lm_head.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            wrapped(model).logits(states)
        hook.remove()
        assert trunk.__dict__.get("forward") == (own_forward if replaced else None)
        assert torch.equal(wrapped(model).logits(states), expected)
        assert trunk.__dict__.get("forward") == (own_forward if replaced else None)
        assert torch.equal(model(ids).logits, expected)


SCORED = torch.tensor([3, 3, 9, 13, 20, 27, 30, 41, 2])  # of 3 samples of 14 tokens; one comes twice


def predictions(model: LanguageModel, batch: dict[str, Any]) -> Tensor:
    """The logits that predict the scored tokens."""
    return model.logits(model.predicting(model.hidden_states(batch), SCORED))


@pytest.mark.parametrize(
    "family",
    "llama gpt2 gpt_neox opt bert bart cohere granite gemma2 gemma3n_text minicpm3 moshi mamba rembert falcon".split(),
)
def test_predictions_are_the_models_own_with_their_gradient(family: str) -> None:
    """Also of models that cap or scale their logits, or change the states in front of the head."""
    model, ids = families.tiny_model(family), tokens(3, 14)
    batch = {"input_ids": ids, "attention_mask": None}
    weight, computed = model.get_input_embeddings().weight.requires_grad_(), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: computed.append(output.shape))
    logits = predictions(wrapped(model), batch)
    assert [tuple(shape[:2]) for shape in computed] == [(1, len(SCORED))]
    expected = model(ids, use_cache=False).logits.flatten(0, 1)[SCORED - 1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().mean(), weight)[0] for x in (logits, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_predictions_without_a_head_that_can_be_found(make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model("llama"), tokens(3, 14)
    batch, expected = {"input_ids": ids, "attention_mask": None}, model(ids).logits.flatten(0, 1)[SCORED - 1]
    for other in (None, torch.nn.Linear(1, 1)):  # there is none, or another module computes the logits
        model.get_output_embeddings = lambda other=other: other
        torch.testing.assert_close(predictions(wrapped(model), batch), expected)


def test_models_that_cannot_leave_logits_out_do_as_well(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama"), tokens(3, 14)
    expected = model(ids).logits.flatten(0, 1)[SCORED - 1]
    compute_all_logits(model, monkeypatch)
    torch.testing.assert_close(predictions(wrapped(model), {"input_ids": ids}), expected)
