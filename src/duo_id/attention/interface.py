"""The one attention function for all model families: registered with transformers, configured layer by layer.

Every attention module of an attached model holds one function `(query, key, value, softmax) -> output`, bound to it
as a plain attribute: one of `duo_id.attention.functions`, which decides what the layer computes.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from duo_id.attention.padding import padding_mask, real_first, reorder
from duo_id.attention.parity import check_parity
from duo_id.attention.softmax import Softmax
from duo_id.attention.ulysses import Exchange
from duo_id.common.compat import attention_configs, implementations_kept, keeps_logits, set_implementations
from duo_id.common.errors import UserError

IMPLEMENTATION = "duo_id"  # the name under which transformers knows the attention function
PROBE = "duo_id_probe"  # the name while layers are being found, so that other models are not affected
PROBING = threading.Lock()  # one probe at a time owns what is registered under that name
EXCHANGE = "duo_id_exchange"  # attribute of attention modules: the `Exchange` of processes that share a sample's tokens


class CachedKeys(Protocol):
    """What a dual cache returns in place of keys: it holds the past and computes attention itself."""

    value: Tensor

    def attend(self, module: nn.Module, query: Tensor, softmax: Softmax) -> Tensor: ...  # noqa: D102
    def put(self, query: Tensor) -> tuple[Tensor, Tensor] | None: ...  # noqa: D102


def register() -> None:
    """Make `attn_implementation="duo_id"` known to transformers; idempotent."""
    for name in (IMPLEMENTATION, PROBE):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, padding_mask)


@contextmanager
def attached(
    model: PreTrainedModel, backends: Backends | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[list[AttentionLayer]]:
    """Route the attention of `model` through this module; restores the model on exit.

    A probe forward over a few tokens finds the attention layers and proves that each reaches our function.

    Args:
        model: any causal language model of transformers.
        backends: implementations; all automatic by default.
        group: processes that share the tokens of each sample; None: this process has them all.

    Yields:
        the layers that can be gated, i.e. those that see the whole context, in the model's order.

    Raises:
        UserError: no layer of the model can be gated, or one that should be does not reach our function.
    """
    with routed(model, backends or Backends()) as layers:
        gated = gated_layers(model, layers)
        with last_mlp_at_rows(model, gated), nullcontext() if group is None else _exchanging(model, layers, group):
            if group is not None:
                gated = [replace(layer, own=getattr(layer.module, EXCHANGE).share.kv_heads) for layer in gated]
            yield gated


@contextmanager
def routed(model: PreTrainedModel, backends: Backends) -> Iterator[list[AttentionLayer]]:
    """Like `attached`, but yields all attention layers, including those that cannot be gated."""
    with PROBING, implementations_kept(model):
        register()
        try:
            model.set_attn_implementation(PROBE)
        except (ValueError, ImportError, KeyError) as error:  # the implementation is named but not installed
            raise UserError(f"{type(model).__name__} cannot be attached: {error}".partition("\n")[0]) from error
        try:
            layers = find_layers(model, PROBE)
        finally:
            register()  # the functions of the probe refer to the model and would keep it in memory
    gated_layers(model, layers)  # raises for models that cannot work at all
    check_parity(model, layers, partial(_attention_replaced, model, layers, backends))
    with _attention_replaced(model, layers, backends):
        yield layers


@contextmanager
def _attention_replaced(model: PreTrainedModel, layers: Sequence[AttentionLayer], backends: Backends) -> Iterator[None]:
    """Compute the attention of these layers here; other parts of the model keep their own."""
    configs = {id(config): config for layer in layers for config in _configs(model, layer.module)}
    with implementations_kept(model):
        set_implementations([(config, IMPLEMENTATION) for config in configs.values()])
        hooks = _pass_all_tokens(model) if any(layer.sharers for layer in layers) else []
        try:
            for layer in layers:
                _bind(layer, partial(own_attention, window=layer.window, backends=backends))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in (module for layer in layers for module in layer.modules):
                module.__dict__.pop(BOUND, None)


def _pass_all_tokens(model: PreTrainedModel) -> list[Any]:
    """Hooks that let layers with shared keys get all tokens: asked for the last n logits, some models pass only those.

    Models do so for `logits_to_keep` as a number, not as the positions of these tokens, which select the same logits.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        keep = kwargs.get("logits_to_keep", 0)
        inputs = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        if isinstance(keep, int):
            kwargs = kwargs | {"logits_to_keep": torch.arange(inputs.shape[1], device=inputs.device)[-keep:]}
        return args, kwargs

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    accepting = [part for part in parts if keeps_logits(part)]
    return [part.register_forward_pre_hook(before, with_kwargs=True) for part in accepting]


def _configs(model: PreTrainedModel, module: nn.Module) -> list[Any]:
    """The configs that name the attention implementation of an attention module and of its masks."""
    module_config = getattr(module, "config", None)
    configs = attention_configs(model)
    matching = [config for config in configs if config is module_config]
    return [*matching, model.config.get_text_config()] if matching else configs


@contextmanager
def _exchanging(model: PreTrainedModel, layers: Sequence[AttentionLayer], group: dist.ProcessGroup) -> Iterator[None]:
    """Each layer's attention gathers the tokens of the whole group, for a share of its heads."""
    depth = model.config.get_text_config().num_hidden_layers
    if len(layers) < depth or any(layer.obstacle for layer in layers):
        raise UserError(
            f"step.sequence_parallel={group.size()}: a layer of the model mixes tokens by something other than gated "
            "attention, but each process has only some of the tokens; use step.sequence_parallel=1"
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
    """Inside the block, each of `layers` computes the function under its index in `functions`, if there is one."""
    previous = bound_functions(layers)
    try:
        for layer in layers:
            _bind(layer, functions.get(layer.index, previous[layer.index]))
        yield
    finally:
        for layer in layers:
            _bind(layer, previous[layer.index])


def _bind(layer: AttentionLayer, function: AttendFunction) -> None:
    for module in layer.modules:
        setattr(module, BOUND, function)


def bound_functions(layers: Sequence[AttentionLayer]) -> dict[int, AttendFunction]:
    """The function bound to each of `layers`, under its index."""
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
    """Attention as transformers calls it in every layer: (batch, heads, tokens, dim) to (batch, tokens, heads, dim)."""
    attend = getattr(module, BOUND, None)
    if attend is None:  # not a layer that the probe found, e.g. cross attention to an image
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
            "packed sequences, images that look ahead and 4D attention masks do not work with gated or masked heads, "
            "nor with a dual cache"
        )
    if not isinstance(key, Tensor):
        if value is not key.value and not torch.compiler.is_compiling():
            raise UserError("this model changes its values after they are cached: pass use_cache=False")
        (query,) = as_autocast(query)
        if (stored := key.put(query)) is None:
            return key.attend(module, query, softmax).transpose(1, 2).contiguous(), None
        key, value = stored
    if key.shape[2] != query.shape[2]:
        raise UserError("this cache does not support gated or masked heads: call the model with use_cache=False")
    query, key, value = as_autocast(query, key, value)
    if (exchange := getattr(module, EXCHANGE, None)) is not None:
        assert attention_mask is None, "`split_batch` leaves no padding that causality does not hide"
        local_softmax = softmax if s_aux is None else softmax._replace(sinks=s_aux[exchange.share.heads])
        out = exchange.to_tokens(attend(*exchange.to_heads(query, key, value), local_softmax))
    elif attention_mask is None:
        out = attend(query, key, value, softmax)
    elif attention_mask.dim() == 4:
        out = dense_attention(query, key, value, softmax, attention_mask)
    else:
        batch, tokens = len(query), query.shape[2]
        if len(attention_mask) != batch or attention_mask.shape[1] < tokens:
            raise UserError(
                f"attention_mask has shape {tuple(attention_mask.shape)} for {batch} samples of {tokens} tokens: pass "
                "(batch, tokens)"
            )
        attention_mask = attention_mask[:, :tokens]  # it may be longer than the text
        # Real tokens first, so that causality alone hides the padding, wherever it was.
        order = real_first(attention_mask)
        out = attend(*(reorder(x, order) for x in (query, key, value)), softmax)
        out = reorder(out, order.argsort(dim=-1))
    return out.transpose(1, 2).contiguous(), None


def unbound_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """Attention of a module that the probe did not find, e.g. cross attention to an image: transformers' SDPA."""
    extras = [name for name in ("softcap", "s_aux") if options.pop(name) is not None]
    causal = options.get("is_causal", getattr(module, "is_causal", True)) is not False
    # Without a dense mask, the offset of a causal mask is unknown.
    dense = attention_mask is not None and attention_mask.dim() == 4
    if extras or not isinstance(key, Tensor) or (attention_mask is not None and not dense) or (causal and not dense):
        raise UserError(
            f"{type(module).__name__} is not gated or masked, but uses the attention of a model that is: give a model "
            "that shares its config with that one a copy of the config and call set_attn_implementation('sdpa'); a "
            "layer that attends only for these inputs may work with use_cache=False"
        )
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast attention's inputs as `torch.autocast` would; by itself it recognises only SDPA."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
