"""Which heads of a model share a block table.

vLLM's groups have equally many layers, the last of a kind filled up, and a block holds a page for each. It takes the
rarest kind's count: with 22 streaming and 68 retrieval heads, groups of 22, four for retrieval heads, a fifth of their
pages empty. What holds most blocks is not to be filled up, so here the count of retrieval heads decides.
"""

from collections import defaultdict
from typing import Any

from vllm.v1.core.kv_cache_utils import create_kv_cache_group_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec

MOST = 16  # groups, about: each costs a block table, and its part of every step


def group_size(kinds: dict[Any, list[str]], whole: list[Any]) -> int:
    """The layers of a group.

    Args:
        kinds: the names of the layers of each kind.
        whole: those of `kinds` that keep all tokens, at least one.
    """
    total = sum(map(len, kinds.values()))
    return max([*(len(kinds[kind]) for kind in whole), -(-total // MOST)])


def grouped(specs: dict[str, Any]) -> list[Any] | None:
    """The cache groups of layers with pages of one size; None: none keeps all tokens, and vLLM's groups do.

    Args:
        specs: the cache of each layer, by name.
    """
    kinds = defaultdict(list)
    for name, spec in specs.items():
        kinds[spec].append(name)
    whole = [spec for spec in kinds if isinstance(spec, FullAttentionSpec)]
    if not whole:
        return None
    size = group_size(kinds, whole)
    counts = {spec: -(-len(names) // size) for spec, names in kinds.items()}
    parts = [kinds[spec][first :: counts[spec]] for spec in kinds for first in range(counts[spec])]
    return list(create_kv_cache_group_specs(specs, parts))
