"""Weights of linear layers in 8 or 4 bits, by torchao, and frozen so that gradients pass through without copies.

torchao because it is PyTorch's own, needs no package beside torch, and leaves a model of ordinary modules that
`torch.compile` and CUDA graphs take. Layouts: int8 a scale per output (any device); int4 a scale and a zero per group
of up to 128 inputs, multiplied by the kernels of torch itself (CUDA from compute capability 8.0, in bfloat16; CPUs).
Embeddings and the head that makes logits keep their dtype.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from duo_id.common.errors import UserError, check, naming_extras

GROUPS = (128, 32)  # inputs that share a scale and a zero in int4: the larger number if it divides all widths
CUDA_ROUND = 1024, 8  # inputs and outputs of a layer are padded to multiples of these by int4 on CUDA
CPU_ROUND = 16  # int4 on a CPU: outputs of a layer must be a multiple
ROWS = 1024  # rows of a weight's transpose at a time, where a backward pass needs them in floating point


class FrozenLinear(nn.Linear):
    """A linear layer of a frozen quantised weight, which the backward pass dequantises instead of keeping a copy."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if torch.is_grad_enabled() and input.requires_grad:
            return _FrozenProduct.apply(input, self.weight, self.bias)
        return super().forward(input)


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b, with a gradient for x alone; what is kept is W as it is stored."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return torch.cat([gradient @ rows.T for rows in transposed_rows(weight, gradient.dtype)], dim=-1), None, None


def transposed_rows(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The transpose of a quantised weight (outputs, inputs) in floating point, (at most `ROWS`, outputs) at a time.

    Layouts that only their product can read are multiplied with rows of the identity, which is exact.
    """
    inputs = weight.shape[1]
    if type(weight).dequantize is not Tensor.dequantize:
        yield weight.dequantize().to(dtype).T
        return
    for start in range(0, inputs, ROWS):
        identity = torch.zeros(min(ROWS, inputs - start), inputs, dtype=dtype, device=weight.device)
        identity.diagonal(start).fill_(1)
        yield F.linear(identity, weight)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are quantised, by name: all linear ones but the head that makes logits."""
    head = model.get_output_embeddings()
    parts = model.named_modules()
    return {name: part for name, part in parts if isinstance(part, nn.Linear) and part is not head}


def check_quantisable(model: PreTrainedModel, name: str, weights: str, device: torch.device) -> None:
    """Raise a `UserError` unless a model's weights can be quantised as asked, on this device.

    Args:
        model: may be on the meta device.
        name: of the model, for messages.
        weights: int8 or int4.
        device: where it will be.
    """
    setting, advice = f"model.weights={weights}", "use model.weights=null"
    method = quantised_by(model.config)
    check(method is None, f"{setting}: model={name} is quantised already ({method}): {advice}")
    layers = linear_layers(model)
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    parts = [*layers.values(), *embeddings, model.get_output_embeddings()]
    known = {id(part.weight) for part in parts if part is not None}
    left = {
        key: weight.numel() for key, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in known
    }
    linear = sum(layer.weight.numel() for layer in layers.values())
    check(
        linear > sum(left.values()),
        f"{setting} quantises linear layers, and most weights of model={name} are elsewhere, such as "
        f"{max(left, key=lambda key: left[key], default='in its embeddings')}: {advice}",
    )
    if weights == "int8":
        return
    check(
        device.type in ("cpu", "cuda"), f"{setting}: there is no int4 product on {device.type}: use model.weights=int8"
    )
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        check(
            torch.cuda.get_device_capability(device) >= (8, 0),
            f"{setting} needs a GPU of compute capability 8.0, and this one has {capability}: use model.weights=int8",
        )
        check(
            model.dtype == torch.bfloat16,
            f"{setting} computes in bfloat16 on a GPU: set model.dtype=bfloat16, or model.weights=int8",
        )
    for key, layer in layers.items():
        fits = layer.in_features % GROUPS[-1] == 0 and (device.type == "cuda" or layer.out_features % CPU_ROUND == 0)
        sizes = f"{key} of model={name} takes {layer.in_features} numbers and gives {layer.out_features}"
        rule = f"multiples of {GROUPS[-1]} and {CPU_ROUND}" if device.type == "cpu" else f"a multiple of {GROUPS[-1]}"
        check(fits, f"{setting} needs {rule} on {device.type}, and {sizes}: use model.weights=int8")


def group_size(model: PreTrainedModel) -> int:
    """Inputs of a layer that share a scale and a zero in int4."""
    widths = [layer.in_features for layer in linear_layers(model).values()]
    return next(size for size in GROUPS if all(width % size == 0 for width in widths))


def torchao_config(model: PreTrainedModel, weights: str, device: torch.device) -> Any:
    """How torchao quantises a model's linear layers.

    Args:
        model: passed `check_quantisable`; may be on the meta device.
        weights: int8 or int4.
        device: where the layers are quantised.

    Raises:
        UserError: torchao is not installed, or a release that lacks this.
    """
    with naming_extras(f"model.weights={weights}"):
        import torchao
    try:
        return _torchao_config(model, weights, device)
    except ImportError as error:
        raise UserError(
            f"model.weights={weights} does not work with torchao {torchao.__version__}: pip install torchao==0.18.0"
        ) from error


def _torchao_config(model: PreTrainedModel, weights: str, device: torch.device) -> Any:
    if weights == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(set_inductor_config=False)
    options = {"group_size": group_size(model), "set_inductor_config": False}
    if device.type == "cpu":  # all other layouts are for kernels of accelerators
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(**options)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **options)  # torch's own kernel multiplies it


def quantise(layer: nn.Linear, config: Any) -> None:
    """Replace a layer's weight by its quantised form, see `torchao_config`."""
    from torchao.quantization import quantize_

    quantize_(layer, config)
    layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or its model would initialise it again
    freeze(layer)


def freeze(model: nn.Module) -> list[nn.Linear]:
    """Let gradients pass through linear layers of torchao's weights; returns those that were no `FrozenLinear` yet."""
    linear = [part for part in model.modules() if type(part) is nn.Linear and "weight" in part._parameters]
    layers = [part for part in linear if is_packed(part.weight)]  # others' layers may hold codes under other names
    for layer in layers:
        layer.__class__ = FrozenLinear
    return layers


@contextmanager
def gradients_through(model: nn.Module) -> Iterator[None]:
    """Within the block, gradients pass through linear layers of torchao's weights, in whatever layout."""
    layers = freeze(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def inductor_options(model: nn.Module) -> dict[str, Any] | None:
    """Options of `torch.compile` with which a decode step of one sample reads int8 weights once; None: its defaults.

    By default the weights would be converted first, which moves five bytes a weight. With this option a product with
    one row becomes a sum that converts as it reads. Nothing like it exists for several samples.
    """
    converts = any(isinstance(part, FrozenLinear) for part in model.modules())
    return {"coordinate_descent_tuning": True} if converts else None


def quantised_by(config: Any) -> str | None:
    """The method by which a model was quantised when it was saved or loaded, as its config says; None: it was not."""
    recorded = getattr(config, "quantization_config", None)
    method = recorded.get("quant_method") if isinstance(recorded, dict) else getattr(recorded, "quant_method", None)
    return None if recorded is None else str(getattr(method, "value", method))


def weights_of(model: PreTrainedModel) -> str | None:
    """int8 or int4 where torchao holds linear layers so, else the method of `quantised_by`; None: not quantised.

    A checkpoint's config alone names torchao, whose weights may have any bits, and a program may have left none there.
    """
    weights = [part._parameters.get("weight") for part in linear_layers(model).values()]  # others' layers may have none
    kinds = {type(weight).__name__[:4].lower() for weight in weights if weight is not None and is_packed(weight)}
    if kinds in ({"int8"}, {"int4"}):  # Int8Tensor, Int4TilePackedTo4dTensor and so on
        return kinds.pop()
    return quantised_by(model.config) or ("torchao" if kinds else None)


def check_differentiable(model: PreTrainedModel, needs: str) -> None:
    """Raise a `UserError` if gradients stop at a checkpoint's quantised weights, which some kernels do without a word.

    A linear layer of each kind is tried: along its input x, the gradient of what it computes must give that again.

    Args:
        model: loaded.
        needs: the override that asks for gradients.
    """
    method = quantised_by(model.config)
    if method is None:
        return
    kinds = {
        (type(part), "weight" in part._parameters): part for part in model.modules() if hasattr(part, "in_features")
    }
    for layer in kinds.values():
        check(
            _passes_gradients(layer, model.dtype, model.device),
            f"{needs} needs gradients, and there are none through {type(layer).__name__} ({method}): "
            "use method=retrieval_score, or a model that is not quantised yet with model.weights=int8",
        )


@torch.enable_grad()
def _passes_gradients(layer: Any, dtype: torch.dtype, device: torch.device) -> bool:
    x = torch.ones((2, layer.in_features), dtype=dtype, device=device, requires_grad=True)
    change = layer(x) - layer(torch.zeros_like(x)).detach()
    if not change.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(change, x, change.detach(), allow_unused=True)
    if gradient is None:
        return False
    return abs(float((gradient * x.detach()).sum() / change.detach().square().sum()) - 1) < 0.2


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor stands for others that hold its numbers, such as codes and scales."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that hold the numbers of others: of a quantised weight its codes and scales, of another itself."""
    for tensor in tensors:
        if is_packed(tensor):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from stored(getattr(tensor, name) for name in names)
        else:
            yield tensor


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are stored; of sharded ones the whole."""
    return sum(tensor.nbytes for tensor in stored((*module.parameters(), *module.buffers())))


def plan_quantised(model: PreTrainedModel, weights: str, device: torch.device) -> None:
    """Give the linear layers of a model on the meta device weights of the bytes that quantised ones have.

    Args:
        model: passed `check_quantisable`.
        weights: int8 or int4.
        device: where the weights would be quantised.
    """
    group = group_size(model) if weights == "int4" else 0
    for layer in linear_layers(model).values():
        count = _quantised_bytes(layer, weights, group, device)
        layer.weight = nn.Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)


def _quantised_bytes(layer: nn.Linear, weights: str, group: int, device: torch.device) -> int:
    inputs, outputs, itemsize = layer.in_features, layer.out_features, layer.weight.element_size()
    if weights == "int8":
        return outputs * (inputs + 5)  # a float32 scale and an int8 zero, which is 0
    if device.type == "cuda":
        inputs, outputs = (-(-size // unit) * unit for size, unit in zip((inputs, outputs), CUDA_ROUND, strict=True))
    return outputs * inputs // 2 + 2 * itemsize * outputs * (inputs // group)
