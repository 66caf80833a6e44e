"""Find a model's attention layers by running a few tokens through it, and say which can be gated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id.attention.padding import padding_mask
from duo_id.errors import UserError

BOUND = "duo_id_attend"  # the attribute of an attention module that holds what it does, see `duo_id.attention.gated`


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
        obstacle: why the layer cannot be gated, if so.
        own: the KV heads that this process computes: all, but where a sample's tokens are shared.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    obstacle: str | None = None
    own: slice = field(default_factory=lambda: slice(None), compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionLayer":
        """Itself: a copy of what refers to a layer refers to the same one."""
        return self


def find_layers(model: PreTrainedModel, implementation: str) -> list[AttentionLayer]:
    """Run a few tokens through the model and note which modules call its attention function, and how.

    Args:
        model: set to the attention implementation of this name.
        implementation: what is registered under it is replaced; the caller registers its own function afterwards.

    Raises:
        UserError: the model has latent attention, or a sliding window that its layers do not tell of.
    """
    title = model.config.get_text_config().name_or_path or type(model).__name__
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        raise UserError(f"{title} has latent attention: there are no keys and values per head to stream")
    names = {module: name for name, module in model.named_modules()}
    layers: list[AttentionLayer] = []

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        index = getattr(module, "layer_idx", None)
        layers.append(
            AttentionLayer(
                index=len(layers) if index is None else index,
                name=names[module],
                module=module,
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[-1],
                window=options.get("sliding_window"),
                obstacle=_obstacle(module, query, key, value, attention_mask, options),
            )
        )
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None  # nobody looks at it

    windows: list[int | None] = []

    def note_mask(*args: Any, **options: Any) -> Tensor | None:
        windows.append(options.get("local_size"))
        return padding_mask(*args, **options)

    AttentionInterface.register(implementation, note)
    AttentionMaskInterface.register(implementation, note_mask)
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    if windows and None not in windows and all(layer.window is None for layer in layers):
        raise UserError(
            f"{title}: its mask has a sliding window of {windows[0]} tokens, which its layers do not tell of; "
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
        return "its attention has a pattern of its own"
    if options.get("position_bias") is not None:
        return "its attention has a bias, which is not supported yet"
    return None


def gated_layers(model: PreTrainedModel, layers: list[AttentionLayer]) -> list[AttentionLayer]:
    """Those of the model's attention layers that get gates: the ones that see the whole context.

    Raises:
        UserError: there are none, one of them cannot be gated, or one that should be there was not found.
    """
    config = model.config.get_text_config()
    title = config.name_or_path or type(model).__name__
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    expected = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not layers:
        raise UserError(
            f"{title} has no attention that can be gated: none of its layers calls transformers' attention interface"
        )
    gated = [layer for layer in layers if layer.window is None]
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


def beside(block: nn.Module, layer: AttentionLayer) -> list[nn.Module]:
    """The parts of a transformer block with parameters that lie beside its attention: norms and MLP."""
    return [
        part for part in block.children() if layer.module not in part.modules() and any(True for _ in part.parameters())
    ]


def layer_list(name: str) -> str:
    """`model.layers` of `model.layers.3.self_attn`: the path up to the first number.

    Raises:
        UserError: there is none.
    """
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        raise UserError(f"{name} is in no numbered list of layers: gates cannot be trained, nor heads searched")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])
