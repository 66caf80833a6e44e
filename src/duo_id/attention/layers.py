"""Find a model's attention layers by running a few tokens through it, and say which can be gated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id.attention.padding import no_padding, padding_mask
from duo_id.common.errors import UserError

BOUND = (
    "duo_id_attend"  # the attribute of an attention module that holds its function, see `duo_id.attention.interface`
)

KNOWN_OPTIONS = {  # tensors that an attention function may get: it uses the first, the others do not concern it
    "s_aux", "position_ids", "cache_position", "token_type_ids", "num_items_in_batch", "labels",
}  # fmt: skip
GATED_KINDS = ("full_attention", "attention", "hybrid")  # of config.layer_types; hybrid layers also hold other state


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model, as the probe forward found it.

    Attributes:
        index: the layer's number in the model.
        name: the module's path in the model.
        module: the attention module.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_dim: width of a head.
        window: sliding-window size in tokens; None for a layer that sees the whole context.
        obstacle: why the layer cannot be gated; None if it can.
        sharers: attention modules of later layers that have no keys and values of their own and read those of this
            layer: they attend like it, and have neither gates nor keys in the cache.
        own: the KV heads that this process computes: all of them, unless processes share a sample's tokens.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    obstacle: str | None = None
    sharers: tuple[nn.Module, ...] = field(default=(), repr=False)
    own: slice = field(default_factory=lambda: slice(None), compare=False)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The attention module and those that read its keys: all share one bound function."""
        return (self.module, *self.sharers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionLayer":
        """Itself: copies of objects that refer to a layer refer to the same layer."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is saved with a cache: everything but the model's modules."""
        return vars(self) | {"module": None, "sharers": ()}


def find_layers(model: PreTrainedModel, implementation: str) -> list[AttentionLayer]:
    """Run a few tokens through the model and note which modules call its attention function, and how.

    Args:
        model: set to the attention implementation of this name.
        implementation: whatever is registered under it is replaced; the caller registers its own function afterwards.

    Raises:
        UserError: the model has latent attention, or a sliding window that it does not pass to its layers.
    """
    title = model.config.get_text_config().name_or_path or type(model).__name__
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        raise UserError(f"{title} has latent attention: there are no keys and values per head to stream")
    names = {module: name for name, module in model.named_modules()}
    layers: list[AttentionLayer] = []
    keys: list[Tensor] = []  # of each layer, kept alive so that no two have the same identity

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        index, window = getattr(module, "layer_idx", None), options.get("sliding_window")
        if (option := unknown_option(options)) is not None:
            raise UserError(f"{title}: {names[module]} cannot be gated or masked: {option}")
        owner = next((i for i, earlier in enumerate(keys) if earlier is key and layers[i].module is not module), None)
        if owner is None:
            keys.append(key)
            layers.append(
                AttentionLayer(
                    index=len(layers) if index is None else index,
                    name=names[module],
                    module=module,
                    heads=query.shape[1],
                    kv_heads=key.shape[1],
                    head_dim=query.shape[-1],
                    window=window,
                    obstacle=_obstacle(module, query, key, value, attention_mask, options),
                )
            )
        elif window != layers[owner].window or query.shape[1] != layers[owner].heads:
            raise UserError(
                f"{title}: {names[module]} reads the keys of {layers[owner].name} with another window or head count"
            )
        else:
            layers[owner] = replace(layers[owner], sharers=(*layers[owner].sharers, module))
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None  # never used

    windows: list[int | None] = []

    def note_mask(*args: Any, **options: Any) -> Tensor | None:
        windows.append(options.get("local_size"))
        return padding_mask(*args, **options)

    AttentionInterface.register(implementation, note)
    AttentionMaskInterface.register(implementation, note_mask)
    run_text(model, torch.arange(4))
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    sliding = [layer for layer in layers if layer.index < len(kinds) and kinds[layer.index] == "sliding_attention"]
    sizes = [window for window in windows if window is not None]
    hidden = any(layer.window is None for layer in sliding) or None not in windows
    if sizes and hidden and all(layer.window is None for layer in sliding or layers):
        raise UserError(
            f"{title}: its mask has a sliding window of {sizes[0]} tokens that its layers do not report; "
            "+model.config.sliding_window=null treats them as full attention"
        )
    return layers


def _obstacle(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> str | None:
    if not getattr(module, "is_causal", True):
        return "its attention looks ahead"
    if key.shape[-1] != value.shape[-1]:
        return "its keys and values differ in width, as in latent attention"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads do not divide among {key.shape[1]} KV heads"
    if attention_mask is not None and attention_mask.dim() == 4:
        return "its attention has a mask pattern of its own"
    return None


def unknown_option(options: dict[str, Any]) -> str | None:
    """Why the options that a model passes to its attention function are not supported; None if they are."""
    if options.get("is_causal") is False:
        return "its attention looks ahead"
    tensors = [name for name, value in options.items() if isinstance(value, Tensor) and name not in KNOWN_OPTIONS]
    return f"its attention takes {' and '.join(tensors)}, which is not computed here" if tensors else None


def run_text(model: PreTrainedModel, ids: Tensor) -> None:
    """Run a text (tokens,) of arbitrary token ids through a model, in eval mode and without options.

    Raises:
        UserError: the model does not run on text alone.
    """
    try:
        text = ids.to(_compute_device(model))[None] % model.config.get_text_config().vocab_size
        with as_evaluated(model):
            model(input_ids=text, attention_mask=no_padding(text), use_cache=False)
    except UserError:
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} does not run on {len(ids)} tokens of plain text, which is how its attention "
            f"layers are found: {type(error).__name__}: {reason}"
        ) from error


def _compute_device(model: PreTrainedModel) -> Any:
    """The device that a model computes on: accelerate may keep the weights elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), model.device)


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, autocast or compiled code; restores every module's mode on exit."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    device = "cpu" if device == "meta" else device
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def gated_layers(model: PreTrainedModel, layers: list[AttentionLayer]) -> list[AttentionLayer]:
    """The attention layers that get gates: those that see the whole context.

    Raises:
        UserError: there are none, one of them cannot be gated, or an expected one was not found.
    """
    config = model.config.get_text_config()
    title = config.name_or_path or type(model).__name__
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    shared = {getattr(module, "layer_idx", None) for layer in layers for module in layer.sharers}
    expected = [index for index, kind in enumerate(kinds) if kind == "full_attention" and index not in shared]
    if not layers:
        raise UserError(
            f"{title} has no attention that can be gated: none of its layers calls transformers' attention interface"
        )
    gated = [layer for layer in layers if layer.window is None and kinds[layer.index] in GATED_KINDS]
    if not gated and layers[0].window is None:
        raise UserError(f"{title}: its layers are {', '.join(sorted(set(kinds)))}, none of which can be gated")
    if not gated:
        window = layers[0].window
        lift = "; +model.config.sliding_window=null treats them as full attention"
        raise UserError(
            f"{title}: every layer has a sliding window of {window} tokens, so no head sees the whole context"
            + (lift if getattr(config, "sliding_window", None) == window else "")
        )
    missing = sorted(set(expected) - {layer.index for layer in layers})
    if missing:
        raise UserError(f"{title}: the attention of layers {missing} does not reach transformers' attention interface")
    for layer in gated:
        if layer.obstacle:
            raise UserError(f"{title}: {layer.name} cannot be gated: {layer.obstacle}")
    if len({layer.index for layer in layers}) < len(layers) or len({layer.kv_heads for layer in gated}) > 1:
        raise UserError(f"{title} cannot be gated: its layers share attention modules or differ in their KV heads")
    return gated


def blocks(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> list[nn.Module]:
    """The transformer block around each of the attention layers."""
    stack = layer_list(layers[0].name)
    return [model.get_submodule(f"{stack}.{layer.name.removeprefix(stack + '.').split('.')[0]}") for layer in layers]


def norms_and_mlp(block: nn.Module, layer: AttentionLayer) -> list[nn.Module]:
    """The parts of a transformer block that have parameters and no attention: norms and MLP."""
    return [
        part for part in block.children() if layer.module not in part.modules() and any(True for _ in part.parameters())
    ]


def layer_list(name: str) -> str:
    """`model.layers` of `model.layers.3.self_attn`: the path up to the first number.

    Raises:
        UserError: the path has no number.
    """
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        raise UserError(f"{name} is not in a numbered list of layers: its gates cannot be trained nor heads searched")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])
