"""Put a model under a head mask, and remove the mask."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from duo_id.attention.codes import Kv, bits_by_layer
from duo_id.attention.functions import Backends, Mask, masked_layers
from duo_id.attention.interface import IMPLEMENTATION, bound, routed
from duo_id.attention.layers import AttentionLayer, gated_layers
from duo_id.attention.padding import no_padding
from duo_id.common.argument_names import naming_arguments
from duo_id.common.compat import GENERATE_CACHE, cache_argument, cache_from_arguments, recomputes
from duo_id.common.errors import UserError
from duo_id.deploy.cache import DRAFTED, DualCache
from duo_id.deploy.wrappers import REFUSED, check_prefix, refusal, restarts, unwrapped
from duo_id.patterns.decided import decided
from duo_id.patterns.pattern import HeadMask, HeadPattern
from duo_id.patterns.spans import HeadSpans

INSTALLED = "duo_id_deployment"  # the attribute of a model that holds its deployment
UNBOUND = {"module": None, "sharers": (), "own": None}  # what layers of a cache loaded from a file do not have
STATIC, GROWING = ("static",), (None, "dynamic")  # cache_implementation of generate


class Deployment:
    """A model under a mask: creates its caches and checks those passed to it."""

    def __init__(
        self, layers: list[AttentionLayer], mask: HeadMask | HeadSpans, config: Any, backends: Backends, kv: Kv
    ) -> None:
        self.layers, self.mask, self.config, self.backends, self.kv = layers, mask, config, backends, kv
        self.undo, self.longest = ExitStack(), 0

    def deepcopy_of(self, model: PreTrainedModel) -> Any:
        """The model's `__deepcopy__`: the copy is under the same mask, which can be removed independently."""

        def deepcopy(memo: dict[int, Any]) -> PreTrainedModel:
            remove(model)
            try:
                copied = copy.deepcopy(model, memo)
            finally:
                install(model, self.mask, self.backends, kv=self.kv)
            install(copied, self.mask, self.backends, kv=self.kv)
            return copied

        return deepcopy

    def new_cache(self, max_length: int | None = None, kv: Kv | None = None) -> DualCache:
        """A cache for the model's mask; see `DualCache`."""
        kv = self.kv if kv is None else kv
        return DualCache(self.layers, self.mask, self.config, max_length, self.backends, kv)

    def check(self, cache: Any) -> None:
        """Raise a `UserError` unless `cache` is a dual cache for the model's mask."""
        if not isinstance(cache, DualCache):
            raise UserError(
                f"a {type(cache).__name__} does not work under a head mask: leave {GENERATE_CACHE} out, or pass "
                "duo_id.dual_cache(model)"
            )
        if cache.tokens.running:
            raise UserError("the last forward with this cache was interrupted: call cache.reset() first")
        if not _equal(cache.mask, self.mask):
            raise UserError("this cache was made for another head mask: use duo_id.dual_cache(model)")
        cached, expected = [layer.layer for layer in cache.dual_layers], self.layers[: len(cache.dual_layers)]
        if cached[0].module is None and [vars(x) | UNBOUND for x in cached] == [vars(x) | UNBOUND for x in expected]:
            cache.bind(self.layers)  # loaded from a file
        elif cached[0].module is not expected[0].module:
            raise UserError("this cache was made for another model: use duo_id.dual_cache(model)")
        if any(layer.home is not None for layer in cache.dual_layers):
            raise UserError("this cache is offloaded: call cache.prefetch() first")

    def watch(self, module: nn.Module, undo: ExitStack) -> None:
        """Hook a module's forward: check or create its cache before, reset the running flag after."""
        names, name = list(inspect.signature(module.forward).parameters), cache_argument(module)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (), self.before_forward(kwargs | dict(zip(names, args, strict=False)), name)

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if (cache := cache_from_arguments(kwargs)) is not None:
                cache.tokens.running = cache.tokens.announced = False
            self.watch_backward(module, output)

        undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def watch_backward(self, module: nn.Module, output: Any) -> None:
        """Refuse a backward pass outside the block if gradient checkpoints would recompute without the mask."""
        logits = getattr(output, "logits", None)
        if logits is None or not logits.requires_grad or not recomputes(module):
            return

        def check(gradient: Tensor) -> None:
            if module.__dict__.get(INSTALLED) is not self:
                raise UserError(
                    "gradient checkpointing would recompute the forward without the head mask: call backward inside "
                    "the duo_attention block"
                )

        logits.register_hook(check)

    def before_forward(self, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
        """The arguments of a forward, with its cache checked, or created if the model would create one.

        Args:
            kwargs: all arguments, by name.
            name: the forward's name for its cache.
        """
        if self.config._attn_implementation != IMPLEMENTATION:
            raise UserError(
                f"the attention implementation was set to {self.config._attn_implementation} under a head mask, which "
                "disables the mask: leave duo_attention first"
            )
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise UserError("attention weights are never materialised under a head mask: pass output_attentions=False")
        cache, use_cache, mask = cache_from_arguments(kwargs), kwargs.get("use_cache"), kwargs.get("attention_mask")
        if mask is None and restarts(kwargs.get("position_ids")):
            raise UserError("packed sequences do not work under a head mask: give each a row of the batch")
        mask_values = mask.values() if isinstance(mask, dict) else (mask,)  # generate makes one for each kind of layer
        masks = [x for x in mask_values if isinstance(x, Tensor)]
        if any(x.dim() > 2 for x in masks):
            raise UserError(
                "under a head mask attention_mask must be (batch, tokens), 0 for padding, not a 4D mask, and tokens "
                "cannot see images that follow them"
            )
        if cache is not None:
            self.check(cache)
        elif self.config.use_cache if use_cache is None else use_cache:
            cache = kwargs[name] = self.new_cache()
        if cache is not None:
            cache.tokens.mask, cache.tokens.announced = masks[0] if masks else None, True
        elif mask is None and kwargs.get("position_ids") is None:  # else compiled code would assume packed sequences
            text = next((kwargs[x] for x in ("input_ids", "inputs_embeds") if kwargs.get(x) is not None), None)
            kwargs["attention_mask"] = None if text is None else no_padding(text[..., 0] if text.dim() == 3 else text)
        return kwargs

    def prepare_cache(self, model: Any) -> Any:
        """The replacement for the method of `generate` that creates its cache."""
        original = model._prepare_cache_for_generation

        def prepare(generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int) -> None:
            check_prefix(getattr(model.prepare_inputs_for_generation, "__self__", None))
            kind, mask = generation_config.cache_implementation, model_kwargs.get("attention_mask")
            if (cache := cache_from_arguments(model_kwargs)) is not None:
                self.check(cache)
                if isinstance(mask, Tensor) and mask.dim() == 2:
                    cache.tokens.check_past(mask)
                original(generation_config, model_kwargs, mode, batch, length)
            elif generation_config.use_cache is False:
                original(generation_config, model_kwargs, mode, batch, length)
            elif kind in STATIC:
                # The largest so far, like transformers, so that a compiled step can be reused by the next call.
                capacity = max(length, getattr(generation_config, "max_cache_len", None) or 0)
                self.longest = max(self.longest, capacity)
                cache = self.new_cache(self.longest)
            elif kind in GROWING:
                cache = self.new_cache()
            else:
                raise UserError(f"cache_implementation={kind}: choose static, dynamic or none under a head mask")
            if cache is not None:
                model_kwargs[GENERATE_CACHE] = cache
                if mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
                    drafts = generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens
                    cache.activate_past_recording(max(DRAFTED, *(number or 0 for number in drafts)))

        return prepare


@naming_arguments()
def install(
    model: Any,
    heads: HeadMask | HeadSpans | HeadPattern,
    backends: Backends | None = None,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    kv: Kv = "exact",
) -> None:
    """Put `model` under a head mask until `remove(model)`: every forward is hard-masked, and caches are dual caches.

    Args:
        model: any causal language model of transformers, also inside `torch.compile` or one of PEFT's adapters.
        heads: how far each head sees: a mask, spans, or a pattern with `sparsity` or `threshold`.
        backends: attention implementations; all automatic by default.
        sparsity: of a pattern, the fraction of its KV heads that stream; see `HeadPattern.binarize`.
        threshold: of a pattern of gates, below which heads stream.
        kv: what retrieval heads keep: `exact`, `int8`, `k8v4` or `int4`, or one of these a layer; see `DualCache`.

    Raises:
        UserError: the mask has another shape, the model is already under a mask, or its attention is not supported.
    """
    check_prefix(model)
    model = unwrapped(model)
    mask = decided(heads, sparsity, threshold)
    if hasattr(model, INSTALLED):
        raise UserError("the model is already under duo_attention: leave that block, or call duo_id.remove(model)")
    backends = backends or Backends()
    config = model.config.get_text_config()
    bits_by_layer(kv, config.num_hidden_layers)
    with ExitStack() as undo:
        layers = undo.enter_context(routed(model, backends))
        gated = gated_layers(model, layers)
        name = config.name_or_path or type(model).__name__
        mask.check_fits(config.num_hidden_layers, gated[0].kv_heads, name)
        indices = {layer.index for layer in gated}
        if surplus := [layer for layer in mask.gated_layers if layer not in indices]:
            raise UserError(f"the head mask covers layers {surplus}, which have no gates in {name}")
        deployment = Deployment(layers, mask, config, backends, kv)
        undo.enter_context(bound(gated, masked_layers(gated, mask, backends)))
        inner = getattr(model, "get_decoder", lambda: None)()  # runs where a model bypasses its base model
        for module in {id(x): x for x in (model, model.base_model, inner) if isinstance(x, PreTrainedModel)}.values():
            deployment.watch(module, undo)
        # A forward that transformers has compiled and kept uses another attention.
        replaced: dict[str, Any] = {"_compiled_call": None, "__deepcopy__": deployment.deepcopy_of(model)}
        replaced |= {method: refusal(method) for method in REFUSED if hasattr(model, method)}
        if hasattr(model, "_prepare_cache_for_generation"):
            replaced["_prepare_cache_for_generation"] = deployment.prepare_cache(model)
        for attribute, value in (replaced | {INSTALLED: deployment}).items():
            undo.callback(_restore, model, attribute, model.__dict__.get(attribute))
            _restore(model, attribute, value)
        deployment.undo = undo.pop_all()


def remove(model: PreTrainedModel) -> None:
    """Remove the mask from `model` and restore the model.

    Raises:
        UserError: the model is not under a mask.
    """
    deployment_of(model).undo.close()


@contextmanager
def duo_attention(
    model: Any,
    heads: HeadMask | HeadSpans | HeadPattern,
    backends: Backends | None = None,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    kv: Kv = "exact",
) -> Iterator[None]:
    """Put `model` under a head mask for a block; see `install`."""
    install(model, heads, backends, sparsity=sparsity, threshold=threshold, kv=kv)
    try:
        yield
    finally:
        if hasattr(unwrapped(model), INSTALLED):
            remove(model)


def dual_cache(model: PreTrainedModel, max_length: int | None = None, kv: Kv | None = None) -> DualCache:
    """An empty cache for a model under `duo_attention`.

    Args:
        model: under a mask.
        max_length: tokens to make room for, in a static cache that can be compiled and captured; None: it grows.
        kv: what retrieval heads keep, see `DualCache`; None: as `duo_attention` says.

    Raises:
        UserError: the model is not under a mask.
    """
    if not isinstance(max_length, int | None) or isinstance(max_length, bool):
        raise UserError(f"max_length={max_length!r} must be a whole number of tokens, or None")
    return deployment_of(model).new_cache(max_length, kv)


def deployment_of(model: PreTrainedModel) -> Deployment:
    """The deployment that `install` attached to a model; a `UserError` if there is none."""
    model = unwrapped(model)
    if not hasattr(model, INSTALLED):
        raise UserError("the model is not under duo_attention: install a head mask first")
    deployment = getattr(model, INSTALLED)
    assert isinstance(deployment, Deployment)
    return deployment


def _equal(mask: Mask, other: Mask) -> bool:
    """Whether all heads see the same under both."""
    return mask is other or (mask.sink_size == other.sink_size and torch.equal(mask.spans, other.spans))


def _restore(model: PreTrainedModel, name: str, value: Any) -> None:
    model.__dict__.pop(name, None)
    if value is not None:
        model.__dict__[name] = value
