"""What a layer of the dual cache returns to the model in place of keys."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.common.errors import UserError
from duo_id.deploy.counts import Tokens

MAX_PADDED = 8192  # tokens up to which padded prompts attend as one batch; beyond, padding costs more than launches
CHANGED = "this model changes its keys after they are cached, which a dual cache does not support: pass use_cache=False"


class Layer(Protocol):
    """The part of `duo_id.deploy.layer.DualLayer` that is used here."""

    layer: AttentionLayer
    tokens: Tokens

    def attend(  # noqa: D102
        self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, shared: bool = False
    ) -> Tensor: ...
    def put(self, key: Tensor, value: Tensor) -> None: ...  # noqa: D102
    def begin(self, new: int) -> None: ...  # noqa: D102


class ArrivingKeys:
    """The keys and values of new tokens, and the layer that will store them."""

    def __init__(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.begun = self.stored = False

    def __getattr__(self, name: str) -> Any:
        """Refuse everything else: a model that changes its keys after caching them cannot use this cache."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(CHANGED)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse torch's functions as well."""
        raise UserError(CHANGED)

    def _changed(self, *others: Any) -> Any:
        raise UserError(CHANGED)

    __getitem__ = __len__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __neg__ = _changed

    def to(self, device: torch.device | str) -> "ArrivingKeys":
        """Itself, for layers that share keys on one device."""
        if torch.device(device) != self.key.device:
            raise UserError("layers of this model share keys across devices: pass use_cache=False")
        return self

    def attend(self, module: nn.Module, query: Tensor, softmax: Softmax) -> Tensor:
        """Store the tokens and attend from them to everything that the layer's heads see.

        Args:
            module: the calling attention module.
            query: (batch, heads, tokens, head_dim).
            softmax: of the layer.

        Returns:
            (batch, heads, tokens, head_dim); zeros for padding.

        Raises:
            UserError: the calling layer was not found to share keys with this one.
        """
        layer = self.layer.layer
        if module is not layer.module and module not in layer.sharers:
            raise UserError("a layer of this model reads another layer's cache: pass use_cache=False")
        self._begin()
        out = self.layer.attend(query, self.key, self.value, softmax, shared=module is not layer.module)
        return RefuseGradient.apply(out, query, self.key, self.value) if self._needs_gradient(query) else out

    def put(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Store the first tokens of a text without attending, if attention is better computed without the cache.

        That is so if a gradient may flow through it, or if samples of unequal lengths would attend one by one.

        Returns:
            their keys and values, which are all that `query` sees; None if the caller must use `attend`.
        """
        self._begin()
        tokens, new, graded = self.layer.tokens, self.key.shape[2], self._needs_gradient(query)
        if not (new > 1 or graded) or not tokens.fresh:
            return None
        if not graded and (tokens.uniform or new > MAX_PADDED):
            return None
        if not self.stored:
            self.layer.put(self.key, self.value)
        self.stored = True
        return self.key, self.value

    def _begin(self) -> None:
        if not self.begun:
            self.layer.begin(self.key.shape[2])
        self.begun = True

    def _needs_gradient(self, query: Tensor) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (query, self.key, self.value))


class RefuseGradient(torch.autograd.Function):
    """Refuses a gradient through attention to cached tokens: it would miss the part through the past."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:  # noqa: D102
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        raise UserError(
            "cached tokens have no gradient: call the model on the whole text at once, or with use_cache=False"
        )
