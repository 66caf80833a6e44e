"""What a layer of the dual cache hands the model in place of keys."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.common.errors import UserError
from duo_id.deploy.counts import Tokens

TOGETHER = 8192  # tokens up to which padded prompts attend as one batch; beyond, padding costs more than launches
CHANGED = "this model changes its keys behind the cache, which the dual cache does not: use_cache=False"


class Layer(Protocol):
    """What is asked of `duo_id.deploy.layer.DualLayer`."""

    layer: AttentionLayer
    tokens: Tokens

    def attend(  # noqa: D102
        self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, again: bool = False
    ) -> Tensor: ...
    def put(self, key: Tensor, value: Tensor) -> None: ...  # noqa: D102
    def begin(self, new: int) -> None: ...  # noqa: D102


class ArrivingKeys:
    """The keys and values of new tokens, with the layer that will store them."""

    def __init__(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value
        self.begun = self.stored = False

    def __getattr__(self, name: str) -> Any:
        """Nothing else: a model that works on its keys after the cache has taken them cannot use this one."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(CHANGED)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nor by one of torch's functions."""
        raise UserError(CHANGED)

    def _changed(self, *others: Any) -> Any:
        raise UserError(CHANGED)

    __getitem__ = __len__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __neg__ = _changed

    def to(self, device: torch.device | str) -> "ArrivingKeys":
        """Itself, for layers that share keys on one device."""
        if torch.device(device) != self.key.device:
            raise UserError("layers of this model share keys over several devices: use_cache=False")
        return self

    def attend(self, module: nn.Module, query: Tensor, softmax: Softmax) -> Tensor:
        """Store the tokens and attend from them to all that the layer's heads see.

        Args:
            module: the attention module that asks.
            query: (batch, heads, tokens, head_dim).
            softmax: of the layer.

        Returns:
            (batch, heads, tokens, head_dim); zeros for padding.

        Raises:
            UserError: a layer asks that was not found to share keys with this one.
        """
        layer = self.layer.layer
        if module is not layer.module and module not in layer.sharers:
            raise UserError("a layer of this model reads the cache of another: use_cache=False")
        self._begin()
        out = self.layer.attend(query, self.key, self.value, softmax, again=module is not layer.module)
        return Ungraded.apply(out, query, self.key, self.value) if self._graded(query) else out

    def put(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Store the first tokens of a text without attending, where it is better done without the cache.

        That is where a gradient may go through their attention, and where samples of unequal lengths would attend one
        after the other.

        Returns:
            their keys and values, which are all that `query` sees; None if it must `attend`.
        """
        self._begin()
        tokens, new, graded = self.layer.tokens, self.key.shape[2], self._graded(query)
        if not (new > 1 or graded) or not tokens.fresh:
            return None
        if not graded and (tokens.uniform or new > TOGETHER):
            return None
        if not self.stored:
            self.layer.put(self.key, self.value)
        self.stored = True
        return self.key, self.value

    def _begin(self) -> None:
        if not self.begun:
            self.layer.begin(self.key.shape[2])
        self.begun = True

    def _graded(self, query: Tensor) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (query, self.key, self.value))


class Ungraded(torch.autograd.Function):
    """What attends to the past in a cache: a gradient would miss the part that went into it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:  # noqa: D102
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        raise UserError(
            "no gradient goes through tokens that are in the cache: call the model on the whole text at once, or with "
            "use_cache=False"
        )
