"""Whether a model's attention under our function equals its own, which a list of supported models cannot prove.

Some models branch on the names of attention implementations that they know, and code from a model's repository may do
anything. So when a model is attached, a few hundred tokens go through it twice, and each layer's attention outputs are
compared for the same input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention.layers import AttentionLayer, run_text
from duo_id.common.errors import UserError

TOKENS = 256
TOLERANCES = {torch.bfloat16: 0.04, torch.float16: 0.01}  # of a layer's output; 1e-3 for wider types


_checked: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()  # what each model passed with


class Recorded:
    """The inputs and outputs of attention modules in one forward."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recording(self, modules: Sequence[nn.Module], inputs: dict[nn.Module, Tensor] | None = None) -> Iterator[None]:
        """Record a forward pass, optionally with the inputs of its attention modules replaced by `inputs`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(states, Tensor):
                return None
            if inputs is None:
                self.inputs[module] = states
            elif module in inputs:
                if "hidden_states" in kwargs:
                    return args, kwargs | {"hidden_states": inputs[module]}
                return (inputs[module], *args[1:]), kwargs
            return None

        def after(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor):
                self.outputs[module] = hidden

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
        hooks += [module.register_forward_hook(after) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def check_parity(model: PreTrainedModel, layers: Sequence[AttentionLayer], attached: Callable[[], Any]) -> None:
    """Compare a model's own attention with the one under our function, once for each model.

    Args:
        model: not yet attached.
        layers: its attention layers.
        attached: context manager under which the model attends by our function.

    Raises:
        UserError: a layer's output differs by more than the tolerance of the model's type.
    """
    config = model.config.get_text_config()
    key = (config._attn_implementation, model.dtype, model.device, len(layers))
    offloaded = any(hasattr(part, "_hf_hook") for part in model.modules())
    if (model.device.type == "meta" and not offloaded) or _checked.get(model) == key:
        return
    modules = {module: layer for layer in layers for module in layer.modules}
    tokens = min(TOKENS, (getattr(config, "max_position_embeddings", None) or TOKENS) - 4)  # some start at 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (max(tokens, 1),), generator=generator)
    reference, replaced = Recorded(), Recorded()
    with reference.recording(list(modules)):
        run_text(model, ids)
    with attached(), replaced.recording(list(modules), reference.inputs):
        run_text(model, ids)
    for module, layer in modules.items():
        expected, actual = reference.outputs.get(module), replaced.outputs.get(module)
        if expected is None or actual is None:
            continue
        error = _error(actual.float(), expected.float())
        if not error <= TOLERANCES.get(expected.dtype, 1e-3):
            raise UserError(
                f"{config.name_or_path or type(model).__name__}: over {tokens} tokens {layer.name} differs by "
                f"{error:.1%} from its own attention ({key[0]}) when it is computed here, so the model does "
                "something that gates and masks would skip"
            )
    _checked[model] = key


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative distance of outputs (1, tokens, ...), or half of the largest one of a single token.

    Both are relative to the root mean square norm of all tokens, because some tokens' outputs are close to 0.
    """
    distance, norm = (x.flatten(2).norm(dim=-1) for x in (actual - expected, expected))
    mean = norm.square().mean().sqrt().clamp(min=1e-20)
    return float(torch.maximum(distance.square().mean().sqrt(), distance.max() / 2) / mean)
