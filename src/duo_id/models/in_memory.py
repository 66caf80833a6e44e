"""A model that a Python program holds, as the language model that the rest of duo_id works on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.deploy.wrappers import check_prefix, unwrapped
from duo_id.models.language_model import LanguageModel
from duo_id.models.quantised import gradients_through, weights_of

ADAPTER_SETTINGS = ("base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules")


def language_model_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """The language model in whatever it is wrapped in, such as `torch.compile` or an adapter of PEFT.

    Raises:
        UserError: it is no model of transformers, lies on several devices or has no weights, or the tokenizer is none
            or another's.
    """
    check_prefix(model)
    adapter = getattr(model, "active_peft_config", None)
    check(
        not getattr(adapter, "is_prompt_learning", False),
        "model: a learned prompt stands before every text, and heads are scored without it: give the model without it",
    )
    inner = unwrapped(model)
    devices = {str(device) for device in getattr(inner, "hf_device_map", {}).values()}
    check(len(devices) < 2, f"model: its layers lie on several devices ({', '.join(sorted(devices))}): load it on one")
    is_meta = any(parameter.is_meta for parameter in inner.parameters())
    check(not is_meta, "model: weights on the meta device hold no numbers: load the model on the device to compute on")
    has_head = inner.get_output_embeddings() is not None or type(inner).__name__.endswith("ForCausalLM")
    check(has_head, f"model: a {type(inner).__name__} predicts no tokens: load it with AutoModelForCausalLM")
    is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase)
    check(is_tokenizer, f"tokenizer: a {type(tokenizer).__name__} is no tokenizer of transformers")
    identifier = inner.config.name_or_path or type(inner).__name__
    revision = getattr(inner.config, "_commit_hash", None)
    name = Path(identifier).name or identifier
    weights, adapters = weights_of(inner), adapters_of(model)
    language_model = LanguageModel(
        inner, tokenizer, name, identifier, revision, "memory", weights=weights, adapters=adapters
    )
    known, words = language_model.vocabulary, tokenizer.vocab_size  # without tokens that were added
    check(words <= known, f"tokenizer: it has {words} tokens and the model {known}: give the one that the model has")
    return language_model


def adapters_of(model: Any) -> list[dict[str, Any]]:
    """The adapters of PEFT that change what a model computes: their names, types and main settings, as plain values.

    PEFT does not remember where an adapter was loaded from.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return []
    active = model.active_adapters
    adapters = []
    for name in active() if callable(active) else active:
        config = configs[name]
        kind = getattr(config.peft_type, "value", config.peft_type)
        values = {key: _plain(getattr(config, key, None)) for key in ADAPTER_SETTINGS}
        chosen = {key: value for key, value in values.items() if value is not None}
        adapters.append({"name": name, "type": str(kind)} | chosen)
    return adapters


def _plain(value: Any) -> Any:
    """A setting as JSON holds it: PEFT keeps the names of modules as a set."""
    if isinstance(value, set | tuple | list):
        return sorted(map(str, value))
    return value if value is None or isinstance(value, str | int | float) else str(value)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Freeze a model, in eval mode, for a block."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with gradients_through(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
