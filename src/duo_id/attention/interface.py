"""The one attention function of all model families: registered with transformers, steered layer by layer.

Every attention module of an attached model holds one function `(query, key, value, softmax) -> output`, bound to it
as a plain attribute. Which function of `duo_id.attention.functions` that is decides what the layer does.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id.attention.full import dense_attention
from duo_id.attention.functions import AttendFunction, Backends, own_attention
from duo_id.attention.last_layer import last_mlp_at_rows
from duo_id.attention.layers import BOUND, AttentionLayer, find_layers, gated_layers, unknown_option
from duo_id.attention.padding import ordered, padding_mask, real_first
from duo_id.attention.parity import check_parity
from duo_id.attention.softmax import Softmax
from duo_id.attention.ulysses import Exchange
from duo_id.common.compat import attention_configs, implementations_kept, keeps_logits, set_implementations
from duo_id.common.errors import UserError

IMPLEMENTATION = "duo_id"  # the name under which transformers knows the attention function
PROBE = "duo_id_probe"  # and the one that finds the layers, which other models may not notice
PROBING = threading.Lock()  # what is registered under that name belongs to one probe at a time
EXCHANGE = "duo_id_exchange"  # of attention modules: how processes that share a sample's tokens get together there


class CachedKeys(Protocol):
    """What a cache that keeps heads apart returns in place of keys: it holds the past and attends by itself."""

    value: Tensor

    def attend(self, module: nn.Module, query: Tensor, softmax: Softmax) -> Tensor: ...  # noqa: D102
    def put(self, query: Tensor) -> tuple[Tensor, Tensor] | None: ...  # noqa: D102


def register() -> None:
    """Make `attn_implementation="duo_id"` known to transformers; calling it again changes nothing."""
    for name in (IMPLEMENTATION, PROBE):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, padding_mask)


@contextmanager
def attached(
    model: PreTrainedModel, backends: Backends | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[list[AttentionLayer]]:
    """Route the attention of `model` through this module; afterwards the model is as it was.

    A probe forward of a few tokens finds the attention layers and proves that each reaches our function.

    Args:
        model: any causal language model of transformers.
        backends: implementations; all automatic by default.
        group: processes that share the tokens of each sample; None: this one has all.

    Yields:
        the layers that can be gated: those that see the whole context, in the model's order.

    Raises:
        UserError: the model has no layer that can be gated, or one that should be does not reach our function.
    """
    with routed(model, backends or Backends()) as layers:
        gated = gated_layers(model, layers)
        if group is None:
            with last_mlp_at_rows(model, gated):
                yield gated
        else:
            with _exchanging(model, layers, group):
                yield [replace(layer, own=getattr(layer.module, EXCHANGE).own.kv_heads) for layer in gated]


@contextmanager
def routed(model: PreTrainedModel, backends: Backends) -> Iterator[list[AttentionLayer]]:
    """As `attached`, but all attention layers are yielded, also those that cannot be gated."""
    with PROBING, implementations_kept(model):
        register()
        try:
            model.set_attn_implementation(PROBE)
        except (ValueError, ImportError, KeyError) as error:  # of an implementation that is named and not there
            raise UserError(f"{type(model).__name__} cannot be attached: {error}".partition("\n")[0]) from error
        layers = find_layers(model, PROBE)
    gated_layers(model, layers)  # names what cannot work at all
    check_parity(model, layers, partial(_under, model, layers, backends))
    with _under(model, layers, backends):
        yield layers


@contextmanager
def _under(model: PreTrainedModel, layers: Sequence[AttentionLayer], backends: Backends) -> Iterator[None]:
    """Let the attention of these layers be computed here; other parts of the model keep their own."""
    configs = {id(config): config for layer in layers for config in _configs(model, layer.module)}
    with implementations_kept(model):
        set_implementations([(config, IMPLEMENTATION) for config in configs.values()])
        hooks = _whole_texts(model) if any(layer.sharers for layer in layers) else []
        try:
            for layer in layers:
                _bind(layer, partial(own_attention, window=layer.window, backends=backends))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in (module for layer in layers for module in layer.modules):
                module.__dict__.pop(BOUND, None)


def _whole_texts(model: PreTrainedModel) -> list[Any]:
    """Let layers that share keys get all tokens: asked for the logits of the last n, some models hand them those alone.

    They do so for a number, not for the positions of these tokens, which name the same logits.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("logits_to_keep", 0)
        text = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        if isinstance(wanted, int):
            kwargs = kwargs | {"logits_to_keep": torch.arange(text.shape[1], device=text.device)[-wanted:]}
        return args, kwargs

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    keeping = [part for part in parts if keeps_logits(part)]
    return [part.register_forward_pre_hook(before, with_kwargs=True) for part in keeping]


def _configs(model: PreTrainedModel, module: nn.Module) -> list[Any]:
    """The configs that name the attention implementation of an attention module and of the masks that it gets."""
    own = getattr(module, "config", None)
    known = attention_configs(model)
    inside = [config for config in known if config is own]
    return [*inside, model.config.get_text_config()] if inside else known


@contextmanager
def _exchanging(model: PreTrainedModel, layers: Sequence[AttentionLayer], group: dist.ProcessGroup) -> Iterator[None]:
    """Let each layer's attention gather the tokens of the whole group, for a share of its heads."""
    depth = model.config.get_text_config().num_hidden_layers
    if len(layers) < depth or any(layer.obstacle for layer in layers):
        raise UserError(
            f"step.sequence_parallel={group.size()}: a layer of the model mixes tokens otherwise than by attention "
            "that can be gated, and each process has a part of them alone; use step.sequence_parallel=1"
        )
    for layer in layers:
        setattr(layer.module, EXCHANGE, Exchange(group, layer.heads, layer.kv_heads))
    try:
        yield
    finally:
        for layer in layers:
            layer.module.__dict__.pop(EXCHANGE, None)


@contextmanager
def bound(layers: Sequence[AttentionLayer], functions: Mapping[int, AttendFunction]) -> Iterator[None]:
    """Let those of `layers` whose index `functions` holds do that, until the block ends."""
    before = bound_functions(layers)
    try:
        for layer in layers:
            _bind(layer, functions.get(layer.index, before[layer.index]))
        yield
    finally:
        for layer in layers:
            _bind(layer, before[layer.index])


def _bind(layer: AttentionLayer, function: AttendFunction) -> None:
    for module in layer.modules:
        setattr(module, BOUND, function)


def bound_functions(layers: Sequence[AttentionLayer]) -> dict[int, AttendFunction]:
    """What each of `layers` does at present, under its index."""
    return {layer.index: getattr(layer.module, BOUND) for layer in layers}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (batch, heads, tokens, dim) in, (batch, tokens, heads, dim) out."""
    attend = getattr(module, BOUND, None)
    if attend is None:  # not one of the layers that the probe found, as cross attention to an image
        options |= {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
        return unbound_attention(module, query, key, value, attention_mask, options)
    if obstacle := unknown_option(options):
        raise UserError(f"{type(module).__name__} cannot be gated or masked: {obstacle}")
    if dropout:
        raise UserError(
            "attention dropout is not computed under gates or a head mask: call model.eval(), or set the model's "
            "attention dropout to 0"
        )
    softmax = Softmax(scaling, softcap, s_aux)
    matrix = attention_mask is not None and attention_mask.dim() == 4
    if matrix and (getattr(attend, "func", None) is not own_attention or not isinstance(key, Tensor)):
        raise UserError(
            "heads cannot be gated or masked over packed sequences, images that look ahead, or a matrix as "
            "attention_mask, nor does a dual cache take them"
        )
    if not isinstance(key, Tensor):
        if value is not key.value and not torch.compiler.is_compiling():
            raise UserError("this model changes its values behind the cache: use_cache=False")
        (query,) = as_autocast(query)
        if (stored := key.put(query)) is None:
            return key.attend(module, query, softmax).transpose(1, 2).contiguous(), None
        key, value = stored
    if key.shape[2] != query.shape[2]:
        raise UserError("this cache is not for gated or masked heads: call the model with use_cache=False")
    query, key, value = as_autocast(query, key, value)
    if (exchange := getattr(module, EXCHANGE, None)) is not None:
        assert attention_mask is None, "`split_batch` leaves no padding that causality does not hide"
        own = softmax if s_aux is None else softmax._replace(sinks=s_aux[exchange.own.heads])
        out = exchange.to_tokens(attend(*exchange.to_heads(query, key, value), own))
    elif attention_mask is None:
        out = attend(query, key, value, softmax)
    elif attention_mask.dim() == 4:
        out = dense_attention(query, key, value, softmax, attention_mask)
    else:
        batch, tokens = len(query), query.shape[2]
        if len(attention_mask) != batch or attention_mask.shape[1] < tokens:
            raise UserError(
                f"attention_mask is {tuple(attention_mask.shape)} for {batch} samples of {tokens} tokens: give "
                "(batch, tokens)"
            )
        attention_mask = attention_mask[:, :tokens]  # it may go on beyond the text
        # Real tokens come first, so that causality alone hides the padding, wherever it was.
        order = real_first(attention_mask)
        out = attend(*(ordered(x, order) for x in (query, key, value)), softmax)
        out = ordered(out, order.argsort(dim=-1))
    return out.transpose(1, 2).contiguous(), None


def unbound_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """Attention of a module that the probe did not find, as that to an image: SDPA, as transformers has it."""
    special = [name for name in ("softcap", "s_aux") if options.pop(name) is not None]
    causal = options.get("is_causal", getattr(module, "is_causal", True)) is not False
    whole = attention_mask is not None and attention_mask.dim() == 4  # without one, where causality begins is not told
    if special or not isinstance(key, Tensor) or (attention_mask is not None and not whole) or (causal and not whole):
        raise UserError(
            f"{type(module).__name__} is under no gate or mask but has the attention of a model that is: a model that "
            "shares its config with that one must get a copy of its own and set_attn_implementation('sdpa'); a layer "
            "that attends for these inputs alone works with use_cache=False or not at all"
        )
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What `torch.autocast` makes of the inputs of attention, which it knows by SDPA alone."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
