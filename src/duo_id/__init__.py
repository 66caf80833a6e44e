"""duo_id finds the retrieval heads of language models: the few that must see the whole context."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from duo_id.common.errors import naming_extras
from duo_id.common.version import __version__ as __version__

if TYPE_CHECKING:
    from duo_id.deploy.cache import DualCache
    from duo_id.deploy.eviction import Eviction
    from duo_id.deploy.install import dual_cache, duo_attention, install, remove
    from duo_id.deploy.kv_costs import kv_costs
    from duo_id.deploy.prefill import prefill
    from duo_id.evaluate.api import evaluate_pattern
    from duo_id.patterns.mask import HeadMask
    from duo_id.patterns.needs import SpanNeeds
    from duo_id.patterns.pattern import HeadPattern
    from duo_id.patterns.saved import load_pattern, save_pattern
    from duo_id.patterns.sharing import push_to_hub
    from duo_id.patterns.sources import list_patterns
    from duo_id.patterns.spans import HeadSpans
    from duo_id.train.api import identify

_HOMES = {
    "DualCache": "duo_id.deploy.cache",
    "Eviction": "duo_id.deploy.eviction",
    "HeadMask": "duo_id.patterns.mask",
    "HeadPattern": "duo_id.patterns.pattern",
    "HeadSpans": "duo_id.patterns.spans",
    "SpanNeeds": "duo_id.patterns.needs",
    "dual_cache": "duo_id.deploy.install",
    "duo_attention": "duo_id.deploy.install",
    "evaluate_pattern": "duo_id.evaluate.api",
    "identify": "duo_id.train.api",
    "install": "duo_id.deploy.install",
    "kv_costs": "duo_id.deploy.kv_costs",
    "list_patterns": "duo_id.patterns.sources",
    "load_pattern": "duo_id.patterns.saved",
    "prefill": "duo_id.deploy.prefill",
    "push_to_hub": "duo_id.patterns.sharing",
    "remove": "duo_id.deploy.install",
    "save_pattern": "duo_id.patterns.saved",
}
__all__ = [
    "DualCache",
    "Eviction",
    "HeadMask",
    "HeadPattern",
    "HeadSpans",
    "SpanNeeds",
    "dual_cache",
    "duo_attention",
    "evaluate_pattern",
    "identify",
    "install",
    "kv_costs",
    "list_patterns",
    "load_pattern",
    "prefill",
    "push_to_hub",
    "remove",
    "save_pattern",
]


def __dir__() -> list[str]:
    """The public names."""
    return __all__


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import duo_id` alone loads nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'duo_id' has no attribute {name!r}")
    with naming_extras(name):
        return getattr(import_module(_HOMES[name]), name)
