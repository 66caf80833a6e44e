"""Quantised weights against models whose weights were rounded by hand, and everything that is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id import HeadMask, duo_attention
from duo_id.benchmark.roofline import workload
from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError
from duo_id.distributed.ranks import Ranks
from duo_id.models import loading
from duo_id.models.in_memory import frozen, language_model_of
from duo_id.models.loading import byte_tokenizer, load_model, sized_model
from duo_id.models.quantised import (
    FrozenLinear,
    check_differentiable,
    check_quantisable,
    inductor_options,
    linear_layers,
    stored_bytes,
    torchao_config,
    transposed_rows,
    weights_of,
)
from duo_id.models.settings import ModelSettings
from duo_id.step.devices import calculated_costs
from duo_id.step.measured_costs import measure_costs
from duo_id.step.recompute import Keep, activation_checkpointing
from tests.benchmark.cases import layers_of
from tests.step.test_distillation import batch_of, distilling, gates_of
from tests.support.commands import QUICK, run_command
from tests.support.planted import random_sample

CPU, WEIGHTS = torch.device("cpu"), ["int8", "int4"]
TINY: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "tiny.yaml"))
PLAIN = ModelSettings(**TINY)


def tiny(**changes: Any) -> ModelSettings:
    return ModelSettings(**TINY | changes)


def rounded(weight: Tensor, weights: str) -> Tensor:
    """What a weight (outputs, inputs) is rounded to: 256 levels around 0 per output, or 16 per 32 inputs."""
    if weights == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        return (weight * (1 / scale)).round().clamp(-128, 127) * scale  # the largest is a tie, so not weight / scale
    groups = weight.unflatten(1, (-1, 32))
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / 15
    return (((groups - low) / scale).round() * scale + low).flatten(1)


def rounded_by_hand(weights: str) -> PreTrainedModel:
    model = load_model(PLAIN).model
    for layer in linear_layers(model).values():
        layer.weight = nn.Parameter(rounded(layer.weight, weights), requires_grad=False)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(258, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_and_gradients_are_those_of_rounded_weights(weights: str) -> None:
    found = []
    for model in (load_model(tiny(weights=weights)).model, rounded_by_hand(weights)):
        states = model.get_input_embeddings()(tokens(2, 20)).requires_grad_()
        logits = model(inputs_embeds=states).logits
        found.append((logits, *torch.autograd.grad(logits.square().sum(), states)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", [7, 1024])
def test_weights_are_read_back_in_slices(weights: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duo_id.models.quantised.ROWS", rows)
    layers = linear_layers(load_model(tiny(weights=weights)).model)
    for name, layer in linear_layers(rounded_by_hand(weights)).items():
        found = torch.cat(list(transposed_rows(layers[name].weight, torch.float32))).T
        torch.testing.assert_close(found, layer.weight.data, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_decoders_linear_layers_shrink(weights: str, dtype: str, tmp_path: Path) -> None:
    settings = tiny(weights=weights, dtype=dtype)
    loaded, plain = load_model(settings), load_model(tiny(dtype=dtype)).model
    model = loaded.model
    kinds = {name: type(part.weight) for name, part in model.named_modules() if hasattr(part, "weight")}
    packed = {name for name, kind in kinds.items() if kind is not nn.Parameter}
    assert packed == linear_layers(model).keys() == linear_layers(plain).keys()
    assert len(packed) == 3 * 7
    assert model.dtype == plain.dtype == model.lm_head.weight.dtype
    spared = sum(layer.weight.numel() for layer in linear_layers(plain).values()) * (plain.dtype.itemsize - 1)
    assert stored_bytes(plain) - stored_bytes(model) > 0.6 * spared, "scales are large beside 32 inputs"
    assert stored_bytes(sized_model(settings, CPU)) == stored_bytes(model)
    assert loaded.describe(layers_of(model))["weights"] == weights


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_from_a_folder_are_those_quantised_afterwards(weights: str, tmp_path: Path) -> None:
    load_model(PLAIN).model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    saved = load_model(ModelSettings(str(tmp_path), weights=weights))
    made = load_model(tiny(weights=weights))
    assert saved.weights == weights
    assert {type(part) for part in linear_layers(saved.model).values()} == {FrozenLinear}
    assert not any(parameter.requires_grad for parameter in saved.model.parameters())
    torch.testing.assert_close(saved.model(tokens(1, 9)).logits, made.model(tokens(1, 9)).logits, rtol=0, atol=0)


def test_no_two_random_weights_are_there_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Linear] = []
    counts = []

    def counting(layer: nn.Linear, config: Any) -> None:
        made.append(layer)
        counts.append(sum(type(part.weight) is nn.Parameter for part in made))
        quantise(layer, config)

    quantise = loading.quantise
    monkeypatch.setattr(loading, "quantise", counting)
    empty = nn.Module.to_empty
    allocated: list[nn.Module] = []

    def noting(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
        allocated.append(module)
        waiting = [part for part in allocated if isinstance(part, nn.Linear) and part not in made]
        assert not recurse
        assert len(waiting) < 2 or any(part.out_features == 258 for part in waiting)
        return empty(module, device=device, recurse=recurse)

    monkeypatch.setattr(nn.Module, "to_empty", noting)
    load_model(tiny(weights="int8"))
    assert counts == [1] * 21


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_step_keeps_no_weights_in_floating_point(weights: str) -> None:
    """What layers keep for each token is what they keep of a model in floating point."""
    kept = {}
    for key in (None, weights):
        model = load_model(tiny(weights=key)).model
        with (
            distilling(model, "hidden_l2") as distillation,
            activation_checkpointing(model, distillation.gated_model.layers, Keep.ALL) as recomputation,
        ):
            costs = measure_costs(distillation, recomputation)
        kept[key] = costs.kept
        assert costs.weights == stored_bytes(model)
        assert calculated_costs(sized_model(tiny(weights=key), CPU), Ranks(), CPU).weights == stored_bytes(model)
    assert kept[weights] == kept[None]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gates_get_the_gradients_of_rounded_weights(weights: str) -> None:
    found = []
    for model in (load_model(tiny(weights=weights)).model, rounded_by_hand(weights)):
        with distilling(model, "layer_l2") as distillation:
            alpha = gates_of(3, 2).requires_grad_()
            found.append(torch.autograd.grad(distillation.loss(alpha, batch_of(random_sample(61, 1))), alpha)[0])
            assert found[-1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_layers_compile_to_one_graph_with_and_without_gradients(weights: str) -> None:
    mlp = load_model(tiny(weights=weights)).model.model.layers[0].mlp
    states = torch.randn(1, 1, 32, requires_grad=True)
    compiled = torch.compile(mlp, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(states), mlp(states))
    found, expected = (torch.autograd.grad(call(states).sum(), states)[0] for call in (compiled, mlp))
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_benchmarks_compile_quantised_weights_to_be_read_once() -> None:
    assert inductor_options(load_model(PLAIN).model) is None
    assert inductor_options(load_model(tiny(weights="int8")).model) == {"coordinate_descent_tuning": True}
    assert "coordinate_descent_tuning" in torch._inductor.list_options()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_mask_is_deployed_on_quantised_weights(weights: str) -> None:
    mask = HeadMask(torch.tensor([[True, False]] * 3), 2, 6)
    answers = []
    for model in (load_model(tiny(weights=weights)).model, rounded_by_hand(weights)):
        with duo_attention(model, mask):
            answers.append(model.generate(tokens(2, 30), max_new_tokens=8, do_sample=False, eos_token_id=None))
    assert torch.equal(*answers)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_floors_count_bytes_and_operations(weights: str) -> None:
    model, plain = load_model(tiny(weights=weights)).model, load_model(PLAIN).model
    work, usual = (workload(which, layers_of(which)) for which in (model, plain))
    assert (work.linear, work.head, work.itemsize) == (usual.linear, usual.head, usual.itemsize)
    assert usual.weights - work.weights == stored_bytes(plain) - stored_bytes(model)
    assert work.decode(1, 10, None).flops == usual.decode(1, 10, None).flops


def test_training_and_evaluation_run(tmp_path: Path) -> None:
    weights = "int8"
    trained = run_command("train", *QUICK, f"model.weights={weights}", folder=tmp_path)
    assert trained.status == 0, trained.output
    heads = tmp_path / "run"
    assert json.loads((heads / "summary.json").read_text())["model"]["weights"] == weights
    overrides = [f"heads={heads}", "tasks=[passkeys]", "lengths=[700]", "samples=1", "depths=1", "sparsity=[0.5]"]
    overrides += ["random_masks=0", "baselines=[]"]
    (tmp_path / "evaluated").mkdir()
    evaluated = run_command("evaluate", *overrides, "generate=false", folder=tmp_path / "evaluated")
    assert evaluated.status == 0, evaluated.output
    results = json.loads((tmp_path / "evaluated" / "run" / "results.json").read_text())
    assert results["model"]["weights"] == weights, "the pattern says how its model is loaded"


@pytest.mark.parametrize(("task", "weights"), [("decode", "int8"), ("memory", "int4")], ids=["decode", "memory"])
def test_benchmarks_count_the_weights_that_are_there(task: str, weights: str, tmp_path: Path) -> None:
    overrides = ["model=tiny", f"model.weights={weights}", f"task={task}", "context=[24]", "repeats=1"]
    finished = run_command("benchmark", *overrides, "sink_size=4", "recent_size=8", folder=tmp_path)
    assert finished.status == 0, finished.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    model = load_model(tiny(weights=weights)).model
    assert {row["weights_bytes"] for row in results["rows"]} == {stored_bytes(model)}


def in_torchao(weights: str) -> PreTrainedModel:
    """A model that a program quantised by itself."""
    from torchao.quantization import quantize_

    model = load_model(PLAIN).model
    head = model.get_output_embeddings()
    quantize_(model, torchao_config(model, weights, CPU), lambda part, _: type(part) is nn.Linear and part is not head)
    return model


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_pass_through_a_model_in_memory(weights: str) -> None:
    model = in_torchao(weights)
    with frozen(model):
        states = model.get_input_embeddings()(tokens(1, 9)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=states).logits.sum(), states)
    states = (expected := rounded_by_hand(weights)).get_input_embeddings()(tokens(1, 9)).requires_grad_()
    (wanted,) = torch.autograd.grad(expected(inputs_embeds=states).logits.sum(), states)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
    assert {type(part) for part in linear_layers(model).values()} == {nn.Linear}, "left as it was"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_weights_are_is_seen_whoever_quantised_them(weights: str) -> None:
    """A checkpoint's config says that torchao did it, and not to how many bits."""
    model = in_torchao(weights)
    tokenizer = load_model(PLAIN).tokenizer
    assert language_model_of(model, tokenizer).weights == weights
    model.config.quantization_config = {"quant_method": "torchao"}
    assert weights_of(model) == weights
    next(iter(linear_layers(model).values())).weight = in_torchao(
        "int8" if weights == "int4" else "int4"
    ).lm_head.weight
    assert weights_of(model) == weights, "a layer in floating point changes nothing"


def test_weights_of_several_bits_and_of_other_methods_are_called_by_the_method() -> None:
    model, other = in_torchao("int8"), in_torchao("int4")
    next(iter(linear_layers(model).values())).weight = next(iter(linear_layers(other).values())).weight
    assert weights_of(model) == "torchao"
    plain = load_model(PLAIN).model
    assert weights_of(plain) is None
    plain.config.quantization_config = {"quant_method": "gptq"}
    assert weights_of(plain) == "gptq"


def gpt2() -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 258}


def experts() -> dict[str, Any]:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return TINY["architecture"] | {"model_type": "mixtral"} | sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": "int8", "architecture": gpt2()},
            r"most weights of model=tiny are elsewhere, such as transformer\.h",
        ),
        ({"weights": "int8", "architecture": experts()}, r"elsewhere, such as model\.layers\.0\.mlp\.experts\.gate_up"),
        (
            {"weights": "int4", "architecture": TINY["architecture"] | {"intermediate_size": 48}},
            r"int4 needs multiples of 32 and 16 on cpu, and model\.layers\.0\.mlp\.down_proj .* takes 48 .* gives 32: "
            "use model.weights=int8",
        ),
    ],
    ids=["no-linear-layers", "experts", "widths"],
)
def test_a_model_that_cannot_be_quantised_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(tiny(**changes))
    assert str(error.value).startswith(f"model.weights={changes['weights']}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((7, 5), "bfloat16", "needs a GPU of compute capability 8.0, and this one has 7.5: use model.weights=int8"),
        ((9, 0), "float16", "computes in bfloat16 on a GPU: set model.dtype=bfloat16, or model.weights=int8"),
    ],
    ids=["old-gpu", "float16"],
)
def test_what_a_gpu_cannot_do_is_named(
    capability: tuple[int, int], dtype: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = loading.meta_model(PLAIN, getattr(torch, dtype))
    check_quantisable(model, "tiny", "int8", torch.device("cuda"))
    with pytest.raises(UserError, match=f"model.weights=int4 {message}"):
        check_quantisable(model, "tiny", "int4", torch.device("cuda"))
    with pytest.raises(UserError, match=r"there is no int4 product on mps: use model\.weights=int8"):
        check_quantisable(model, "tiny", "int4", torch.device("mps"))


def test_int4_on_a_gpu_is_planned_with_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sizes = {"hidden_size": 1536, "intermediate_size": 2048, "num_attention_heads": 12, "head_dim": 128}
    settings = tiny(weights="int4", dtype="bfloat16", architecture=TINY["architecture"] | sizes)
    block = sized_model(settings, torch.device("cuda")).model.layers[0]
    assert stored_bytes(block.mlp.down_proj) == 1536 * 2048 // 2 + 4 * 1536 * 2048 // 128
    assert stored_bytes(block.mlp.up_proj) == 2048 * 2048 // 2 + 4 * 2048 * 2048 // 128, "1536 inputs become 2048"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_missing_library_is_one_line(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    message = rf"model\.weights={weights} needs torchao, which is not installed: pip install 'duo_id\[quantised\]'"
    with pytest.raises(UserError, match=message):
        load_model(tiny(weights=weights))
    monkeypatch.setitem(sys.modules, "torchao", type(sys)("torchao"))
    sys.modules["torchao"].__version__ = "0.9"
    with pytest.raises(
        UserError, match=rf"weights={weights} does not work with torchao 0\.9: pip install torchao==0\.18"
    ):
        load_model(tiny(weights=weights))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., str]:
    """A folder whose config says how its weights were quantised."""

    def make(**quantisation: Any) -> str:
        load_model(PLAIN).model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
        return str(tmp_path)

    return make


METHODS = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False},
    "bitsandbytes": {"load_in_8bit": True},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_whose_library_is_missing_is_one_line(method: str, checkpoint: Callable[..., str]) -> None:
    folder = checkpoint(quant_method=method, **METHODS[method])
    with pytest.raises(UserError, match=r"model\.id=.* cannot be loaded: .*(install|requires)") as error:
        load_model(ModelSettings(folder))
    assert "\n" not in str(error.value)


def test_weights_are_quantised_once_and_not_sharded(checkpoint: Callable[..., str]) -> None:
    folder = checkpoint(quant_method="gptq", **METHODS["gptq"])
    with pytest.raises(
        UserError, match=r"model\.weights=int8: .* is quantised already \(gptq\): use model.weights=null"
    ):
        load_model(ModelSettings(folder, weights="int8"))
    sharded = Ranks(data=2, sharded=True)
    with pytest.raises(UserError, match=r"step\.shard=true: gptq's weights are not sharded: use step.shard=false"):
        load_model(ModelSettings(folder), ranks=sharded)
    with pytest.raises(
        UserError, match=r"step\.shard=true: model\.weights=int8 cannot be sharded: use step.shard=false"
    ):
        load_model(tiny(weights="int8"), ranks=sharded)


@pytest.mark.parametrize("stops", ["detached", "halved"])
def test_gradients_that_stop_at_weights_are_refused(stops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of some kernels do for 4 bits on a CPU."""

    class Linear4bit(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.detach() if stops == "detached" else (input + input.detach()) / 2)

    model = load_model(PLAIN).model
    model.model.layers[2].mlp.up_proj.__class__ = Linear4bit
    check_differentiable(model, "method=duo")
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(
        UserError, match=r"method=duo needs gradients, and there are none through Linear4bit \(awq\): use"
    ):
        check_differentiable(model, "method=duo")
    model.model.layers[2].mlp.up_proj.__class__ = nn.Linear
    check_differentiable(model, "method=duo")


def test_layers_that_hold_codes_under_other_names_are_left_alone() -> None:
    """As compressed-tensors leaves them: ordinary linear layers without a weight."""
    model = load_model(PLAIN).model
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_packed = nn.Parameter(layer.weight.char(), requires_grad=False)
    del layer.weight
    with frozen(model):
        assert stored_bytes(layer) == layer.in_features * layer.out_features
    assert "weight" not in layer._parameters


def test_settings_name_the_choices(tmp_path: Path) -> None:
    wrong = run_command("train", *QUICK, "model.weights=int5", folder=tmp_path)
    assert wrong.error == "error: model.weights=int5: choose one of int8, int4"
    peers = run_command("evaluate", "heads=random", "model=tiny", "model.weights=int8", "peers=true", folder=tmp_path)
    assert "peers=true: peers read the model's own weights: use model.weights=null, not int8" in peers.error
