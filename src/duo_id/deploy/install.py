"""Put a model under a head mask, and take it off again."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from duo_id.attention.gated import bound, routed
from duo_id.attention.heads import Backends, masked_layers
from duo_id.attention.probe import AttentionLayer, gated_layers
from duo_id.deploy.cache import DualCache
from duo_id.errors import UserError
from duo_id.patterns import HeadMask

INSTALLED = "duo_id_deployment"  # the attribute of a model that holds its deployment
STATIC, GROWING = ("static",), (None, "dynamic")  # cache_implementation of generate


class Deployment:
    """A model under a mask: what makes its caches and checks those it is given."""

    def __init__(self, layers: list[AttentionLayer], mask: HeadMask, config: Any, backends: Backends) -> None:
        self.layers, self.mask, self.config, self.backends = layers, mask, config, backends
        self.undo = ExitStack()

    def new_cache(self, max_length: int | None = None) -> DualCache:
        """A cache for the model's mask; see `DualCache`."""
        return DualCache(self.layers, self.mask, self.config, max_length, self.backends)

    def check(self, cache: Any) -> None:
        """Raise a `UserError` unless `cache` is a dual cache for the model's mask."""
        if not isinstance(cache, DualCache):
            raise UserError(
                f"a {type(cache).__name__} cannot hold what a head mask keeps: leave past_key_values out, or give "
                "duo_id.dual_cache(model)"
            )
        if cache.tokens.running:
            raise UserError("the last forward with this cache was interrupted half way: cache.reset() first")
        if cache.mask is not self.mask and cache.mask != self.mask:
            raise UserError("this cache was made for another head mask: use duo_id.dual_cache(model)")
        if cache.dual_layers[0].layer.module is not self.layers[0].module:
            raise UserError("this cache was made for another model: use duo_id.dual_cache(model)")

    def watch(self, module: nn.Module, undo: ExitStack) -> None:
        """Stand at the door of a module's forward."""
        names = list(inspect.signature(module.forward).parameters)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args[:1], self.before_forward(kwargs | dict(zip(names[1:], args[1:], strict=False)))

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if (cache := kwargs.get("past_key_values")) is not None:
                cache.tokens.running = False

        undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def before_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward: a cache that is given is checked, and one that would be made is made here."""
        cache, wanted, mask = kwargs.get("past_key_values"), kwargs.get("use_cache"), kwargs.get("attention_mask")
        given = mask.values() if isinstance(mask, dict) else (mask,)  # generate makes one for each kind of layer
        masks = [x for x in given if isinstance(x, Tensor)]
        if any(x.dim() > 2 for x in masks):
            raise UserError("under a head mask attention_mask must be (batch, tokens), 0 for padding, not a matrix")
        if cache is not None:
            self.check(cache)
        elif self.config.use_cache if wanted is None else wanted:
            cache = kwargs["past_key_values"] = self.new_cache()
        if cache is not None:
            cache.tokens.mask = masks[0] if masks else None
        return kwargs

    def prepare_cache(self, model: Any) -> Any:
        """What stands in for the method of `generate` that makes its cache."""
        original = model._prepare_cache_for_generation

        def prepare(generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, length: int) -> None:
            kind = generation_config.cache_implementation
            if mode == GenerationMode.ASSISTED_GENERATION and not bool(self.mask.retrieval.all()):
                raise UserError(
                    "assisted generation and prompt lookup take tokens back, which streaming heads have forgotten: "
                    "generate without them under a head mask"
                )
            if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
                original(generation_config, model_kwargs, mode, batch, length)
            elif kind in STATIC:
                length = max(length, getattr(generation_config, "max_cache_len", None) or 0)
                model_kwargs["past_key_values"] = self.new_cache(length)
            elif kind in GROWING:
                model_kwargs["past_key_values"] = self.new_cache()
            else:
                raise UserError(f"cache_implementation={kind}: under a head mask choose static, dynamic or none")

        return prepare


def install(model: PreTrainedModel, mask: HeadMask, backends: Backends | None = None) -> None:
    """Put `model` under `mask` until `remove(model)`: every forward is hard-masked, and caches are dual caches.

    Args:
        model: any causal language model of transformers.
        mask: which heads stream, and over which windows.
        backends: attention implementations; all automatic by default.

    Raises:
        UserError: the mask is for another shape, the model is under a mask already, or its attention is not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is no model of transformers: give the model itself, not a wrapper")
    if not isinstance(mask, HeadMask):
        raise UserError(f"a {type(mask).__name__} is no HeadMask: pattern.binarize(sparsity=0.5) makes one")
    if hasattr(model, INSTALLED):
        raise UserError("the model is under duo_attention already: leave that block, or call duo_id.remove(model)")
    backends = backends or Backends()
    config = model.config.get_text_config()
    with ExitStack() as undo:
        layers = undo.enter_context(routed(model, backends))
        gated = gated_layers(model, layers)
        name = config.name_or_path or type(model).__name__
        mask.check_fits(config.num_hidden_layers, gated[0].kv_heads, name)
        indices = {layer.index for layer in gated}
        if surplus := [layer for layer in mask.gated_layers if layer not in indices]:
            raise UserError(f"the head mask decides about layers {surplus}, which have no gates in {name}")
        deployment = Deployment(layers, mask, config, backends)
        undo.enter_context(bound(gated, masked_layers(gated, mask, backends)))
        inner = getattr(model, "get_decoder", lambda: None)()  # what runs where a model goes round its base model
        for module in {id(x): x for x in (model, model.base_model, inner) if isinstance(x, PreTrainedModel)}.values():
            deployment.watch(module, undo)
        # The forward that transformers has compiled and kept knows another attention.
        compiled = model.__dict__.pop("_compiled_call", None)
        undo.callback(_restore, model, "_compiled_call", compiled)
        if hasattr(model, "_prepare_cache_for_generation"):
            undo.callback(_restore, model, "_prepare_cache_for_generation", None)
            model.__dict__["_prepare_cache_for_generation"] = deployment.prepare_cache(model)
        model.__dict__[INSTALLED] = deployment
        undo.callback(_restore, model, INSTALLED, None)
        deployment.undo = undo.pop_all()


def remove(model: PreTrainedModel) -> None:
    """Take the mask off `model` again, which then is as it was.

    Raises:
        UserError: the model is under no mask.
    """
    deployment_of(model).undo.close()


@contextmanager
def duo_attention(model: PreTrainedModel, mask: HeadMask, backends: Backends | None = None) -> Iterator[None]:
    """Put `model` under `mask` for a block; see `install`."""
    install(model, mask, backends)
    try:
        yield
    finally:
        if hasattr(model, INSTALLED):
            remove(model)


def dual_cache(model: PreTrainedModel, max_length: int | None = None) -> DualCache:
    """An empty cache for a model under `duo_attention`.

    Args:
        model: under a mask.
        max_length: tokens to make room for, in a static cache that can be compiled and captured; None: it grows.

    Raises:
        UserError: the model is under no mask.
    """
    if not isinstance(max_length, int | None) or isinstance(max_length, bool):
        raise UserError(f"max_length={max_length!r} must be a whole number of tokens, or None")
    return deployment_of(model).new_cache(max_length)


def deployment_of(model: PreTrainedModel) -> Deployment:
    """What `install` put on a model; a `UserError` if nothing."""
    if not hasattr(model, INSTALLED):
        raise UserError("the model is not under duo_attention: install a head mask first")
    deployment = getattr(model, INSTALLED)
    assert isinstance(deployment, Deployment)
    return deployment


def _restore(model: PreTrainedModel, name: str, value: Any) -> None:
    model.__dict__.pop(name, None)
    if value is not None:
        model.__dict__[name] = value
