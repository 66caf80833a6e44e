"""Whether a model attends under our function as it does by itself: what a name on a list cannot prove.

Some models branch on the names of attention implementations that they know, and code from a model's repository may do
anything. So when a model is attached, some hundred tokens go through it twice, and each layer's attention is compared,
from the same input.
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


_checked: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()  # models, and as what they passed


class Recorded:
    """The inputs and outputs of attention modules in one forward."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recording(self, modules: Sequence[nn.Module], inputs: dict[nn.Module, Tensor] | None = None) -> Iterator[None]:
        """Record a forward, whose attention modules get `inputs` for theirs where these are given."""

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
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor):
                self.outputs[module] = found

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
        hooks += [module.register_forward_hook(after) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def check_parity(model: PreTrainedModel, layers: Sequence[AttentionLayer], ours: Callable[[], Any]) -> None:
    """Compare the attention of a model by itself with the one under our function; once for a model.

    Args:
        model: as it is by itself.
        layers: its attention layers.
        ours: makes the model attend under our function, in a block.

    Raises:
        UserError: a layer's output differs by more than the tolerance of the model's type.
    """
    config = model.config.get_text_config()
    key = (config._attn_implementation, model.dtype, model.device, len(layers))
    offloaded = any(hasattr(part, "_hf_hook") for part in model.modules())
    if (model.device.type == "meta" and not offloaded) or _checked.get(model) == key:
        return
    modules = {module: layer for layer in layers for module in layer.modules}
    tokens = min(TOKENS, (getattr(config, "max_position_embeddings", None) or TOKENS) - 4)  # some begin with the fourth
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (max(tokens, 1),), generator=draw)
    own, found = Recorded(), Recorded()
    with own.recording(list(modules)):
        run_text(model, ids)
    with ours(), found.recording(list(modules), own.inputs):
        run_text(model, ids)
    for module, layer in modules.items():
        expected, other = own.outputs.get(module), found.outputs.get(module)
        if expected is None or other is None:
            continue
        error = _error(other.float(), expected.float())
        if not error <= TOLERANCES.get(expected.dtype, 1e-3):
            raise UserError(
                f"{config.name_or_path or type(model).__name__}: over {tokens} tokens {layer.name} differs by "
                f"{error:.1%} from its own attention ({key[0]}) when it is computed here, so the model does "
                "something that gates and masks would leave out"
            )
    _checked[model] = key


def _error(found: Tensor, expected: Tensor) -> float:
    """The distance of outputs (1, tokens, ...), relative to their norm; or half of the greatest of a single token.

    The latter is relative to what tokens have in the mean, for some outputs are close to 0.
    """
    far, whole = (x.flatten(2).norm(dim=-1) for x in (found - expected, expected))
    mean = whole.square().mean().sqrt().clamp(min=1e-20)
    return float(torch.maximum(far.square().mean().sqrt(), far.max() / 2) / mean)
