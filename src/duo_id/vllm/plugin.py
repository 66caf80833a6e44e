"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`), and `register`."""

import logging
import os
from functools import wraps
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from duo_id.common.errors import UserError, check
from duo_id.vllm.choices import GROUP, NAME, VARIABLE

if TYPE_CHECKING:
    from duo_id.patterns.spans import HeadSpans

logger = logging.getLogger("vllm.duo_id")  # below vLLM's own, so that its format and level hold


def plugin() -> None:
    """Serve under the heads that `DUO_ID_HEADS` names, if it is set; see `duo_id.vllm.heads.read_spans`."""
    if text := os.environ.get(VARIABLE):
        from duo_id.vllm.heads import read_spans  # PyTorch, which vLLM has by now

        try:
            spans = read_spans(text)
        except UserError as error:
            if VARIABLE in str(error):
                raise
            raise UserError(f"{VARIABLE}={text:.80}: {error}") from error
        install(spans)


def register(heads: Any, sparsity: float | None = None, threshold: float | None = None) -> None:
    """See `duo_id.vllm.register`."""
    from duo_id.vllm.heads import as_spans

    if heads is None:
        check(sparsity is None and threshold is None, "register(None) serves without a mask, and takes nothing else")
        os.environ.pop(VARIABLE, None)
        remove()
        return
    spans = as_spans(heads, sparsity, threshold)
    allowed = os.environ.get("VLLM_PLUGINS")
    found = any(entry.name == NAME for entry in entry_points(group=GROUP))
    check(found, "vLLM's processes do not find the plug-in: install duo_id in this environment (pip install)")
    check(allowed is None or NAME in allowed.split(","), f"VLLM_PLUGINS={allowed} leaves out {NAME}: add it")
    install(spans)
    os.environ[VARIABLE] = spans.as_json()  # for the processes that vLLM starts


def install(spans: "HeadSpans") -> None:
    """Let the engines of this process serve under `spans`; a later call replaces them."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from duo_id.vllm.groups import grouped
    from duo_id.vllm.layers import check_arrived, split_layers
    from duo_id.vllm.limits import check_servable
    from duo_id.vllm.spec import register_spec

    remove()
    register_spec()
    split_layers(spans)
    create, check_specs = EngineArgs.create_engine_config, KVCacheSpecRegistry.check_kv_cache_spec_registry
    group = kv_cache_utils._get_kv_cache_groups_uniform_page_size

    @wraps(create)
    def create_checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        check_servable(config, spans, current_platform.device_name)
        logger.info("serving under a head mask: %s", spans)
        if current_platform.device_name == "cuda":
            logger.warning("vLLM was run under head masks on CPUs alone: compare answers before you rely on a GPU's")
        return config

    @wraps(check_specs)
    def check_all(specs: dict[str, Any]) -> None:
        check_specs(specs)
        check_arrived(spans, specs)

    @wraps(group)
    def group_heads(specs: dict[str, Any]) -> list[Any]:
        return grouped(specs) or group(specs)

    replacements = (create_checked, staticmethod(check_all), group_heads)
    for (owner, name), replacement in zip(_replaced(), replacements, strict=True):
        setattr(owner, name, replacement)


def remove() -> None:
    """Undo `install`."""
    from duo_id.vllm.layers import split_layers

    split_layers(None)
    for owner, name in _replaced():
        if (original := getattr(getattr(owner, name), "__wrapped__", None)) is not None:
            setattr(owner, name, original)


def _replaced() -> list[tuple[Any, str]]:
    """What `install` replaces beside `Attention.__new__`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    return [
        (EngineArgs, "create_engine_config"),
        (KVCacheSpecRegistry, "check_kv_cache_spec_registry"),
        (kv_cache_utils, "_get_kv_cache_groups_uniform_page_size"),
    ]
